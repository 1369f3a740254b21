"""Own data in every format: the same questions give the same features, and bad input one clear error."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.formats import NESTED, ROWS, rows_of, write_nested, write_rows

from plainloop.data.errors import InputError
from plainloop.data.readers.causalqa import TextOptions, read_text
from plainloop.data.readers.examples import Examples, ReadOptions, read_examples, require_use
from plainloop.data.readers.files import find_files
from plainloop.data.span_features import span_windows
from plainloop.data.types import Answer, Example

CONTEXT = "Ada met Bob. Ada left."
ROW = {"id": "1", "question": "Who left?", "context": CONTEXT, "answers": ["left"]}


@pytest.fixture(scope="module")
def five_hundred(real_data: Path) -> list[Example]:
    return read_examples(real_data / "squad2/train-v2.0.subset.json")[:500]


@pytest.mark.parametrize("form", [*ROWS, *NESTED])
def test_the_same_questions_give_the_same_features(
    form: str, five_hundred: list[Example], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    if form in ROWS:
        path = write_rows(tmp_path, form, rows_of(five_hundred))
    else:
        path = write_nested(tmp_path, form, five_hundred)
    read = read_examples(path)
    assert read == five_hundred
    one, two = (span_windows(e, tiny_tokenizer, max_length=96, stride=24) for e in (five_hundred, read))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    if path.is_file() and form != "parquet":
        packed = path.with_name(path.name + ".gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        assert read_examples(packed) == five_hundred


def test_real_text_without_positions(five_hundred: list[Example], tmp_path: Path) -> None:
    """A text that occurs once is located, one that occurs twice is reported: the positions of SQuAD agree."""
    golds = {e.id: e.answers[:1] for e in five_hundred}
    rows = [
        {**row, "answers": golds[row["id"]][0].text if golds[row["id"]] else ""}
        for row in rows_of(five_hundred)
    ]
    path = write_rows(tmp_path, "csv", rows)
    with pytest.raises(InputError, match=r"\d+ answer\(s\) can't .*\n  line \d+: id .* occurs \d times"):
        read_examples(path)
    once = {e.id for e in five_hundred if not e.answers or e.context.count(e.answers[0].text) == 1}
    kept = Examples([str(path)], ReadOptions(ambiguous="skip"))
    assert {e.id: e.answers for e in kept} == {i: golds[i] for i in golds if i in once}
    left_out = len(golds) - len(once)
    assert len(kept.notes) == 1 and kept.notes[0].startswith(f"warning: {left_out} record(s) left out: an")
    first = Examples([str(path)], ReadOptions(ambiguous="first"))
    by_id = {e.id: e for e in first}
    assert by_id.keys() == golds.keys()
    for i, example in by_id.items():
        assert [a.start for a in example.answers] == [example.context.find(a.text) for a in golds[i]]
    assert first.notes[0].startswith(f"warning: {left_out} answer(s) occur several times")


def made(answers: Any, form: str, folder: Path, **more: Any) -> tuple[Answer, ...]:
    (example,) = read_examples(write_rows(folder, form, [{**ROW, "answers": answers, **more}]))
    return example.answers


@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "list"])
def test_answers_as_text_list_object_or_nothing(form: str, tmp_path: Path) -> None:
    left, bob = Answer("left", 17), Answer("Bob", 8)
    for answers in (
        "left",
        ["left"],
        {"text": ["left"], "answer_start": [17]},
        [{"text": "left", "start": 17}],
    ):
        assert made(answers, form, tmp_path) == (left,)
    assert made(["left", "Bob"], form, tmp_path) == (left, bob)
    assert made("Ada", form, tmp_path, answer_start=13) == (Answer("Ada", 13),)
    assert made(["Bob", "Ada"], form, tmp_path, answer_start=[8, 0]) == (bob, Answer("Ada", 0))
    for nothing in ("", [], {"text": [], "answer_start": []}, [""], "  "):
        assert made(nothing, form, tmp_path) == ()
    assert made("1702", form, tmp_path, context="In 1702 it was.") == (Answer("1702", 3),)
    assert made("[1]", form, tmp_path, context="See [1] there.") == (Answer("[1]", 4),)
    assert made("None", form, tmp_path, context="None came.") == (Answer("None", 0),)
    if form == "csv":
        assert made("{'text': ['left'], 'answer_start': [17]}", form, tmp_path) == (left,)


def test_columns_are_named_found_and_said(tmp_path: Path) -> None:
    row = {"query": "Who left?", "passage": CONTEXT, "target": "left", "extra": "x"}
    found = Examples([str(write_rows(tmp_path, "jsonl", [row]))])
    assert list(found) == [Example("data.jsonl:1", "Who left?", CONTEXT, (Answer("left", 17),))]
    assert found.notes == ["columns: question from 'query', context from 'passage', answer from 'target'"]
    path = write_rows(
        tmp_path, "csv", [{"F": "Who left?", "T": CONTEXT, "A": "left", "key": "k", "question": "?"}]
    )
    columns = {"question": "F", "context": "T", "answer": "A", "id": "key"}
    assert read_examples(path, ReadOptions(columns))[0] == Example(
        "k", "Who left?", CONTEXT, (Answer("left", 17),)
    )
    with pytest.raises(InputError, match=r"no column nowhere \(it has F, T, A, key, question\)"):
        read_examples(path, ReadOptions({**columns, "context": "nowhere"}))
    with pytest.raises(InputError, match="unknown field \\['heading'\\]; choose from id, question"):
        read_examples(path, ReadOptions({"heading": "F"}))


def test_files_patterns_folders_and_lists(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"part-{number}.jsonl").write_text(json.dumps({**ROW, "id": str(number)}))
    (tmp_path / "notes.txt").write_text("not data")
    parts = [str(tmp_path / f"part-{number}.jsonl") for number in range(3)]
    for paths in (
        str(tmp_path),
        str(tmp_path / "part-*.jsonl"),
        parts,
        [parts[0], str(tmp_path / "part-[12].*")],
    ):
        assert find_files(paths) == parts
        assert [e.id for e in read_examples(paths)] == ["0", "1", "2"]
    (tmp_path / "empty").mkdir()
    for paths, message in (
        (str(tmp_path / "empty"), "this folder has no .json"),
        (str(tmp_path / "part-9*"), "no such file"),
        (str(tmp_path / "notes.txt"), "unknown kind of file"),
        ([], "the list is empty"),
        ([parts[0], parts[0]], "this id occurs twice"),
    ):
        with pytest.raises(InputError, match=message):
            read_examples(paths)


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    for lines in (1, 3):
        path.write_text("\n".join(json.dumps({**ROW, "id": str(n)}) for n in range(lines)))
        assert len(read_examples(path)) == lines


def test_mrqa_answers_without_a_position_are_references(tmp_path: Path) -> None:
    qa = {
        "qid": "1", "question": "Who?", "answers": ["ada", "Ada"],
        "detected_answers": [{"text": "ada", "char_spans": [[13, 15], [0, 2]], "token_spans": []}],
    }  # fmt: skip
    lines = [{"header": {}}, {"id": "", "context": CONTEXT, "qas": [qa]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (example,) = read_examples(tmp_path / "a.jsonl")
    assert example.answers == (Answer("Ada", 13), Answer("Ada", 0), Answer("ada", -1))


def test_label_studio(tmp_path: Path) -> None:
    def export(*annotations: Any, **data: str) -> list[Example]:
        task = {
            "id": 7,
            "data": {"text": CONTEXT, "question": "Who?", **data},
            "annotations": list(annotations),
        }
        (tmp_path / "export.json").write_text(json.dumps([task]))
        return read_examples(tmp_path / "export.json")

    def label(start: int, end: int) -> dict[str, Any]:
        value = {"start": start, "end": end, "text": CONTEXT[start:end], "labels": ["A"]}
        return {"type": "labels", "value": value}

    typed = {"type": "textarea", "value": {"text": ["Bob"]}}
    (example,) = export({"result": [label(13, 16), typed]}, {"result": [label(0, 3)], "was_cancelled": True})
    assert example == Example("7", "Who?", CONTEXT, (Answer("Ada", 13), Answer("Bob", 8)))
    assert export({"result": []})[0].answers == ()
    with pytest.raises(InputError, match="task 1: id None: not annotated|task 1: .*not annotated"):
        export()


def test_text_task_needs_neither_positions_nor_contexts(tmp_path: Path) -> None:
    rows = [{**ROW, "answers": "a text that is not there"}, {**ROW, "id": "2", "context": "", "answers": ""}]
    one, two = read_text([str(write_rows(tmp_path, "jsonl", rows))], TextOptions(null_target="none"))
    assert (one.question + one.context, one.target) == (
        f"question: Who left? context: {CONTEXT}", "a text that is not there",
    )  # fmt: skip
    assert (two.question, two.context, two.target, two.references) == ("question: Who left?", "", "none", ())
    (closed,) = read_text(
        [str(write_rows(tmp_path, "csv", [{"question": "Who?", "answer": "Bob"}]))], TextOptions()
    )
    assert (closed.question, closed.context, closed.target) == ("question: Who?", "", "Bob")
    (spaced,) = read_text(
        [str(write_rows(tmp_path, "list", [{**ROW, "context": f"\n  {CONTEXT}"}]))], TextOptions()
    )
    assert spaced.question + spaced.context == f"question: Who left? context: {CONTEXT}"


@pytest.fixture
def tiny_tokenizer(tiny_model: Path) -> Any:
    from plainloop.models.load import load_tokenizer

    return load_tokenizer(str(tiny_model))


def test_an_empty_answer_is_unanswerable_wherever_it_stands(tmp_path: Path) -> None:
    for start in (0, -1, None, float("nan")):
        for answers in ("", [""], [" "], {"text": [""], "answer_start": [start]}):
            assert made(answers, "jsonl", tmp_path, answer_start=start) in ((), None)
    (tmp_path / "a.csv").write_text(
        "question,context,answer,answer_start\nWho?,Ada left,,0\nWho?,Ada left,,-1\n"
    )
    assert [e.answers for e in read_examples(tmp_path / "a.csv")] == [(), ()]
    assert made("left", "jsonl", tmp_path, answer_start=17.0) == (Answer("left", 17),)


def test_a_text_that_looks_like_json_is_a_text(tmp_path: Path) -> None:
    for text in ('{"a": 1}', '["x"]', "[1]", "{'text'"):
        assert made(text, "jsonl", tmp_path, context=f"It is {text}.") == (Answer(text, 6),)


def test_each_json_row_has_its_own_optional_fields(tmp_path: Path) -> None:
    rows = [
        {"question": "Who?", "context": CONTEXT, "answer": None},
        {"question": "Who?", "context": CONTEXT, "answer": "Ada", "answer_start": 13, "id": 7},
    ]
    for form in ("jsonl", "list"):
        one, two = read_examples(write_rows(tmp_path, form, rows))
        assert (one.answers, two.answers, two.id) == ((), (Answer("Ada", 13),), "7")


def test_files_of_one_name_and_folders_of_splits(tmp_path: Path) -> None:
    row = {"question": "Who?", "context": CONTEXT, "answer": "Bob"}
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name, "csv", [row])
    pattern = str(tmp_path / "*/data.csv")
    assert [e.id for e in read_examples(pattern)] == [f"{tmp_path}/{name}/data.csv:2" for name in ("x", "y")]
    write_rows(tmp_path, "saved", [ROW])
    with pytest.raises(InputError, match="several splits; choose one: .*/data.saved"):
        read_examples(str(tmp_path))
    (tmp_path / "x/manifest.json").write_text("{}")
    (tmp_path / "x/._data.csv").write_bytes(b"\xff")
    assert len(read_examples(str(tmp_path / "x"))) == 1


def test_long_lines_and_the_mark_of_windows(tmp_path: Path) -> None:
    long = {**ROW, "context": CONTEXT + " and so on" * 20_000, "answers": "Bob"}
    for content in ([long], [long, {**long, "id": "2"}]):
        (tmp_path / "a.json").write_text("\n".join(map(json.dumps, content)))
        assert len(read_examples(tmp_path / "a.json")) == len(content)
    squad = {"data": [{"paragraphs": [{"context": CONTEXT, "qas": [{**ROW, "answers": []}]}]}]}
    for value in (squad, [ROW]):
        (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(value).encode())
        assert len(read_examples(tmp_path / "b.json")) == 1


def test_saved_datasets_in_another_format_and_with_other_columns(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{**ROW, "label": 1, "page": [1.0] * 50}]).with_format("numpy")
    rows.save_to_disk(tmp_path / "saved")
    assert read_examples(tmp_path / "saved")[0].answers == (Answer("left", 17),)


def test_columns_without_effect_are_refused(tmp_path: Path) -> None:
    path = write_nested(tmp_path, "squad", [Example("1", "Who?", CONTEXT)])
    with pytest.raises(InputError, match="--columns has no effect on SQuAD's JSON"):
        require_use({"question": "q"}, [str(path)], "--columns")

"""Bad input in every format: one line that names the file and the record, and exit code 2."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.formats import ROWS, write_rows

CONTEXT = "Ada met Bob. Ada left."
ROW = {"id": "1", "question": "Who left?", "context": CONTEXT, "answers": ["left"]}
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(options: dict[str, Any], tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command of the package in this process; return its exit code and what it printed as an error."""
    from plainloop.trainer.cli import main

    def go(*command: Any) -> tuple[int, str]:
        fixed = ["--model.path", tiny_model, "--run_dir", options["run_dir"], "--precision", "fp32"]
        fixed += [
            "--data.cache_dir",
            options["data.cache_dir"],
            "--data.max_length",
            "96",
            "--data.stride",
            "24",
        ]
        code = main(list(map(str, [*command, *fixed])))
        lines = capsys.readouterr().err.splitlines(keepends=True)
        return code, "".join(line for line in lines if not line.startswith(("precision", "columns")))

    return go


def changed(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in {**ROW, **fields}.items() if value is not ...}


# What is wrong with a row in a file of rows -> what the error says.
BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    (changed(question=...), "no column question or query"),
    (changed(context=...), "no column context or passage"),
    (changed(answers=...), "no column answers or answer"),
    (changed(question=""), "the question is empty"),
    (changed(question="   "), "the question is empty"),
    (changed(answers="nowhere"), "'nowhere' does not occur in its context"),
    (changed(answers="Ada"), "'Ada' occurs 2 times in its context"),
    (changed(answers=["left", "Ada"]), "'Ada' occurs 2 times"),
    (changed(answers="left", answer_start=3), "answer_start 3: the context has ' met'"),
    (changed(answers="left", answer_start=-1), "answer_start -1"),
    (changed(answers="left", answer_start=999), "answer_start 999"),
    (changed(answers="left", answer_start="x"), "whole number 'answer_start'"),
    (changed(answers="left", answer_start=1.5), "whole number 'answer_start'"),
    (changed(answers=["left"], answer_start=[1, 2]), "'answers' is missing or not a text, a list"),
    (
        changed(answers={"text": ["left"], "answer_start": [1, 2]}),
        "'answers' is missing or not a text, a list",
    ),
    (changed(answers={"text": ["left"], "answer_start": [16]}), "answer_start 16"),
    (changed(answers=[{"answer_start": 3}]), "an answer needs a 'text'"),
    (changed(id=""), "the id is empty"),
    (changed(answers="{'text': array(['left'], dtype=object), 'answer_start': array([17])}"), ""),
    (changed(context=""), "'left' does not occur"),
]
TYPES: list[tuple[dict[str, Any], str]] = [  # where cells have types
    (changed(answers={"value": "left", "aliases": ["Bob"]}), "'answers' is missing or not a text, a list"),
    (changed(question=5), "'question' is missing or not text"),
    (changed(context=["x"]), "'context' is missing or not text"),
    (changed(answers=7), "an answer needs a 'text'"),
    (changed(question=None), "'question' is missing or not text"),
]


def refused(path: Path, message: str, run: Run) -> None:
    code, error = run("train", "--data.train", path)
    assert code == 2 and message in error, (message, error)
    assert path.name in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=() if form in ("jsonl", "csv") else pytest.mark.slow) for form in ROWS]
)
def test_twenty_bad_rows_of_each_format(
    form: str, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = BAD_ROWS + ([] if form in ("csv", "tsv") else TYPES)
    for number, (row, message) in enumerate(cases):
        (folder := tmp_path / str(number)).mkdir()
        if form in ("csv", "tsv") and row.get("answer_start") == 1.5:
            continue
        path = write_rows(folder, form, [row])
        capsys.readouterr()  # datasets shows its progress
        refused(path, message, run)


BAD_FILES: dict[str, list[tuple[bytes, str]]] = {
    "a.jsonl": [
        (b"", "holds no question"),
    (b"\n\n", "holds no question"),
        (b"{", "line 1: not valid JSON"),
        (b'{"id": ' + b"9" * 5000 + b"}", "line 1: not valid JSON"),
        (b"[" * 20_000, "line 1: not valid JSON (RecursionError)"),
        (json.dumps({**ROW, "question": "\ud83d"}).encode(), "'question' has half of a character"),
        (b'{"a": 1}\n[', "no column question"),
    (b"[1]", "line 1: not an object"),
        (json.dumps(ROW).encode() + b"\n[2]", "line 2: not an object"),
        (json.dumps(ROW).encode() + b"\n{", "line 2: not valid JSON"),
        (json.dumps(ROW).encode() + b"\n\xff", "line 2: not UTF-8"),
        (json.dumps(ROW).encode() + b'\n{"id": "2"}', "line 2: id '2': 'question' is missing"),
        ((json.dumps(ROW) + "\n").encode() * 2, "line 2: id '1': this id occurs twice"),
    ],
    "a.csv": [
        (b"", "no column question"),
    (b"question,context,answer\n", "holds no question"),
        (b"question,context,answer\na,b\n", "line 2: fewer cells"),
        (b"question,context,answer\na,b,b,c\n", "line 2: more cells"),
        (b'question,context,answer\n"a,b,b\n', "not valid CSV"),
    (b"\xff,b\n", "not UTF-8"),
        (b"question,context,answer\n" + b"a,b,b\n" * 5000 + b"\xff,b,b\n", "not UTF-8"),
        (b"question;context;answer\na;b;b\n", "no column question"),
        (b"question,context,answer,id\na,b,b,1\na,b,b,1\n", "line 3: id '1': this id occurs twice"),
    ],
    "a.parquet": [(b"", "not a Parquet file"),
    (b"PAR1", "not a Parquet file"),
    (b"x" * 999, "not a Parquet file")],
    "a.jsonl.gz": [(b"", "holds no question"),
    (b"\x1f\x8b\x08", "not a complete gzip file"),
    (b"{}", "not a complete gzip")],
    "list.json": [
        (b"[", "list.json:1:2: not valid JSON"),
    (b"[]", "holds no question"),
    (b"[1]", "item 1: not an object"),
        (b'[{"a": 1}]', "no column question"),
    (b'[{"a": }]', "list.json:1:8: not valid JSON"),
    ],
    "a.txt": [(b"{}", "unknown kind of file")],
}  # fmt: skip


def test_damaged_files(tmp_path: Path, run: Run) -> None:
    for name, cases in BAD_FILES.items():
        for content, message in cases:
            (tmp_path / name).write_bytes(content)
            refused(tmp_path / name, message, run)


def mrqa(**changes: Any) -> list[Any]:
    qa = {"qid": "1", "question": "Who?", "answers": ["Ada"], **changes}
    qa.setdefault("detected_answers", [{"text": "Ada", "char_spans": [[0, 2]]}])
    context = qa.pop("context", CONTEXT)
    return [{"header": {}}, {"context": context, "qas": [{k: v for k, v in qa.items() if v is not ...}]}]


BAD_MRQA: list[tuple[list[Any], str]] = [
    ([{"header": {}}], "holds no question"),
    ([{"header": {}}, {"context": CONTEXT}], "line 2: not MRQA: no list 'qas'"),
    ([{"header": {}}, 3], "line 2: not MRQA"),
    ([{"header": {}}, {"context": CONTEXT, "qas": 3}], "line 2: not MRQA"),
    ([{"header": {}}, {"context": CONTEXT, "qas": [3]}], "line 2: qid None: not MRQA"),
    (mrqa(qid=...), "KeyError('qid')"),
    (mrqa(qid=3), "'id' is missing or not text"),
    (mrqa(question=...), "KeyError('question')"),
    (mrqa(question=3), "'question' is missing or not text"),
    (mrqa(question=" "), "the question is empty"),
    (mrqa(answers=...), "KeyError('answers')"),
    (mrqa(answers=3), "not MRQA"),
    (mrqa(detected_answers=3), "not MRQA"),
    (mrqa(detected_answers=[{"text": "Ada"}]), "KeyError('char_spans')"),
    (mrqa(detected_answers=[{"text": "Ada", "char_spans": [[1]]}]), "not MRQA"),
    (mrqa(detected_answers=[{"text": "Ada", "char_spans": [["a", "b"]]}]), "not MRQA"),
    (mrqa(context=None), "line 2: qid '1': not MRQA"),
    (mrqa(context=5, detected_answers=[]), "'context' is missing"),
    (mrqa(detected_answers=[]), "'Ada' occurs 2 times"),
    (mrqa(detected_answers=[], answers=["Eve"]), "does not occur"),
    (mrqa(detected_answers=[{"text": "left", "char_spans": [[0, 2]]}]), "the context has 'Ada' at 0 to 2"),
    (mrqa(detected_answers=[{"text": "x", "char_spans": [[500, 503]]}]), "the context has '' at 500 to 503"),
    (mrqa(answers="left"), "'answers' is not a list of texts"),
    (mrqa() + mrqa()[1:], "line 3: id '1': this id occurs twice"),
]  # fmt: skip


def test_twenty_bad_mrqa_files(tmp_path: Path, run: Run) -> None:
    assert len(BAD_MRQA) >= 20
    for lines, message in BAD_MRQA:
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
        refused(tmp_path / "a.jsonl", message, run)


def studio(value: Any = ..., **changes: Any) -> list[Any]:
    whole = {"start": 8, "end": 11, "text": "Bob", "labels": ["A"]} if value is ... else value
    result = [{"type": "labels", "value": whole}]
    data = {"text": CONTEXT, "question": "Who?", **changes.pop("data", {})}
    return [{"id": 1, "data": data, "annotations": [{"result": result}], **changes}]


BAD_STUDIO: list[tuple[list[Any], str]] = [
    (studio(annotations=[]), "not annotated"),
    (studio(annotations=None), "not annotated"),
    (studio(annotations=[{"result": [], "was_cancelled": True}]), "not annotated"),
    (studio(annotations=3), "annotation can't be read"),
    (studio(annotations=[3]), "annotation can't be read"),
    (studio(annotations=[{}]), "KeyError('result')"),
    (
        studio(annotations=[{"result": [{"type": "paragraphlabels", "value": {"start": "0"}}]}]),
        "a span of type",
    ),
    (studio(annotations=[{"result": [{"type": "textarea", "value": {}}]}]), "KeyError('text')"),
    (studio({"start": 0}), "KeyError('text')"),
    (studio({"text": "Bob"}), "KeyError('start')"),
    (studio({"start": "x", "text": "Bob"}), "annotation can't be read"),
    (studio({"start": 9, "text": "Bob"}), "answer_start 9"),
    (studio({"start": -3, "text": "Bob"}), "answer_start -3"),
    (studio({"start": 99, "text": "Bob"}), "answer_start 99"),
    (studio(data={"question": ""}), "the question is empty"),
    (studio(data={"question": 3}), "'question' is missing or not text"),
    (studio(data={"text": None}), "'context' is missing or not text"),
    ([{"data": {"text": CONTEXT}, "annotations": []}], "no column question"),
    ([{"data": {"question": "Who?"}, "annotations": []}], "no column context"),
    ([*studio(), 3], "task 2: not a Label Studio task"),
    ([*studio(), {"id": 2}], "task 2: not a Label Studio task"),
    ([*studio(), *studio()], "task 2: id '1': this id occurs twice"),
    (
        [*studio(), {"id": 2, "data": {}, "annotations": [{"result": []}]}],
        "task 2: id '2': 'question' is missing",
    ),
]  # fmt: skip


def test_twenty_bad_label_studio_files(tmp_path: Path, run: Run) -> None:
    assert len(BAD_STUDIO) >= 20
    for tasks, message in BAD_STUDIO:
        (tmp_path / "export.json").write_text(json.dumps(tasks))
        refused(tmp_path / "export.json", message, run)

import json
from pathlib import Path
from typing import Any

import pytest

from plainloop.data.errors import InputError
from plainloop.data.readers.examples import read_examples
from plainloop.data.types import Answer


def content(**changes: Any) -> dict[str, Any]:
    qa = {"id": "1", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 3}]} | changes
    return {"data": [{"title": "t", "paragraphs": [{"context": qa.pop("context", "So Ada."), "qas": [qa]}]}]}


def written(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_squad_1_and_2(tmp_path: Path) -> None:
    (example,) = read_examples(written(tmp_path / "one.json", content()))
    assert (example.id, example.answers) == ("1", (Answer("Ada", 3),))
    (example,) = read_examples(written(tmp_path / "two.json", content(is_impossible=True, answers=[])))
    assert example.answers == ()


def test_real_files(real_data: Path) -> None:
    assert len(read_examples(real_data / "squad2/train-v2.0.subset.json")) == 11578
    held_out = read_examples(real_data / "squad2/dev-v2.0.heldout.json")
    assert (len(held_out), sum(not e.answers for e in held_out)) == (5014, 2408)
    assert len(read_examples(real_data / "xquad/xquad.zh.json")) == 1190


def test_saved_datasets_folder_gives_the_same_examples(tmp_path: Path) -> None:
    import datasets

    row = {"id": "1", "title": "t", "context": "So Ada.", "question": "Who?"}
    rows = [{**row, "answers": {"text": ["Ada"], "answer_start": [3]}}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert read_examples(tmp_path / "saved") == read_examples(written(tmp_path / "one.json", content()))
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(tmp_path / "both")
    with pytest.raises(InputError, match="both/train"):
        read_examples(tmp_path / "both")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{"data": [\n  {"x": }]}', r"bad.json:2:9: not valid JSON"),
        ('{"data": [', r"bad.json:1:11"),
        ("[1, 2]", "item 1: not an object"),
        ({"data": {}}, "no list 'data'"),
        ({"data": [{"title": "t"}]}, r"data\[0\]: .* 'paragraphs'"),
        (content(id=7), "id 7: 'id' is missing or not text"),
        (content(context=None), "'context' is missing"),
        (content(question="  "), "the question is empty"),
        (content(answers=[{"text": "Ada", "answer_start": 2}]), r"id '1': answer_start 2: .* ' Ad'.*'Ada'"),
        (content(answers=[{"text": "Ada", "answer_start": -1}]), "answer_start -1"),
        (content(answers=[{"text": "Ada", "answer_start": "3"}]), "whole number 'answer_start'"),
        (content(answers=["Ada"]), "whole number 'answer_start'"),
        ({"data": []}, "holds no question"),
    ],
)
def test_errors_name_the_location(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_examples(written(tmp_path / "bad.json", value))
    assert "bad.json" in str(caught.value)


def test_invalid_utf8_missing_file_and_duplicate_ids(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b'{"data": "\xe9"}')
    with pytest.raises(InputError, match="byte 10: not UTF-8"):
        read_examples(tmp_path / "latin.json")
    with pytest.raises(InputError, match="nowhere.json: no such file"):
        read_examples(tmp_path / "nowhere.json")
    doubled = content()
    doubled["data"] *= 2
    with pytest.raises(InputError, match="this id occurs twice"):
        read_examples(written(tmp_path / "doubled.json", doubled))


def test_first_twenty_errors_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    value = content()
    qas = value["data"][0]["paragraphs"][0]["qas"]
    qas[:] = [{"id": str(i), "question": "", "answers": []} for i in range(30)]
    with pytest.raises(InputError) as caught:
        read_examples(written(tmp_path / "bad.json", value))
    assert "30 bad record(s)" in str(caught.value) and str(caught.value).count("\n") == 20

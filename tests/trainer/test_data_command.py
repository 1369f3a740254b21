"""plainloop data: planted leaks, duplicates and faults are found and counted; what train would refuse."""

import json
from pathlib import Path
from typing import Any

import pytest

from plainloop.trainer.cli import main
from plainloop.trainer.commands.data_check import distribution, normalize


def paragraph(number: int, text: str, questions: list[tuple[str, str]]) -> dict[str, Any]:
    """(question, answer) pairs; the answer must be in the text, or is "" for none."""
    return {
        "context": text,
        "qas": [
            {
                "id": f"{number}-{i}", "question": question, "is_impossible": not answer,
                "answers": [{"text": answer, "answer_start": text.index(answer)}] if answer else [],
            }
            for i, (question, answer) in enumerate(questions)
        ],
    }  # fmt: skip


def write(path: Path, *articles: list[dict[str, Any]]) -> str:
    data = [{"title": f"{path.stem} {i}", "paragraphs": of} for i, of in enumerate(articles)]
    path.write_text(json.dumps({"version": "v2.0", "data": data}))
    return str(path)


RIVER = "The Rhine rises in Switzerland and flows through six countries to the North Sea."
TOWER = "The tower was built in 1889. It is 330 metres high, and an old landmark."


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """In train: one repeated question, one with another answer, a cut word, a lost character. In dev: a
    context of train with other punctuation, two of its questions, and one question of its own.
    """
    train = write(
        tmp_path / "train.json",
        [
            paragraph(0, RIVER, [
                ("Where does the Rhine rise?", "Switzerland"), ("where does the RHINE rise", "Switzerland"),
                ("How many countries?", "six"), ("How many countries ?", "six countries"), ("Why?", ""),
                ("What does it reach?", "North Se"),
            ]),
        ],
        [paragraph(1, TOWER, [("Why?", ""), ("What was\ufffd lost?", "1889"), ("Which article?", "an")])],
    )  # fmt: skip
    dev = write(
        tmp_path / "dev.json",
        [
            paragraph(2, RIVER.replace(" and", ",  and"), [("How many countries?", "six")]),
            paragraph(3, "Another page, with an end.", [("Why?", ""), ("Is it new?", "an end")]),
        ],
    )
    return train, dev


def look(capsys: Any, *arguments: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["data", *arguments, "--json"]) == code
    return dict(json.loads(capsys.readouterr().out))


def test_planted_leaks_and_duplicates(files: tuple[str, str], capsys: Any) -> None:
    found = look(capsys, *files)
    train = found["train"]
    assert (train["questions"], train["unanswerable"], train["contexts"], train["articles"]) == (9, 2, 2, 2)
    counted = {finding["what"]: finding["count"] for finding in train["findings"]}
    assert list(counted.values()) == [2, 1, 2, 0, 2, 0, 1, 1]
    assert train["findings"][1]["examples"] == ["0-3: How many countries ?"]
    assert train["findings"][4]["examples"] == ["0-5: What does it reach?", "1-2: Which article?"]
    assert [finding["count"] for finding in found["shared"]] == [1, 2, 1, 0, 0]
    assert train["lengths"]["context"]["max"] == len(TOWER.split())
    assert main(["data", *files]) == 0
    text = capsys.readouterr().out
    assert "9 questions, 2 (22.2%) of them unanswerable; 2 contexts, 2 articles" in text
    assert "!       1 dev questions whose context is in train" in text
    with_itself = look(capsys, files[0], files[0])
    assert [finding["count"] for finding in with_itself["shared"]] == [9] * 5


def test_what_the_model_would_see(
    files: tuple[str, str], tiny_model: Path, tiny_t5: Path, capsys: Any
) -> None:
    options = ["--model", str(tiny_model), "--max_length", "24", "--stride", "4"]
    rows = look(capsys, *files, *options)["train"]["rows"]
    assert rows["rows"] > 9 and rows["length"]["unit"] == "tokens" and rows["length"]["max"] <= 24
    assert look(capsys, *files, "--model", str(tiny_t5))["dev"]["rows"]["rows"] == 3


def test_what_train_would_refuse(files: tuple[str, str], tmp_path: Path, capsys: Any) -> None:
    bad = json.loads(Path(files[0]).read_text())
    bad["data"][0]["paragraphs"][0]["qas"][2]["answers"][0]["answer_start"] = 3
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    found = look(capsys, str(tmp_path / "bad.json"), files[1], code=2)
    assert "answer_start 3" in found["train"]["faults"] and found["dev"]["questions"] == 3
    assert main(["data", str(tmp_path / "bad.json")]) == 2
    assert "train would refuse it" in capsys.readouterr().out
    assert main(["data"]) == 2 and main(["data", "nowhere.json"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "data needs a file" in errors[0] and "no such file" in errors[1]


def test_real_data(real_data: Path, capsys: Any) -> None:
    """The figures of the data's own description: the subset and the held-out part share nothing."""
    squad = real_data / "squad2"
    train, held_out, whole = (
        str(squad / name)
        for name in ("train-v2.0.subset.json", "dev-v2.0.heldout.json", "dev-v2.0.full-rebuilt.json")
    )
    found = look(capsys, train, held_out)
    assert (found["train"]["questions"], found["train"]["unanswerable"]) == (11_578, 3_885)
    assert (found["dev"]["questions"], found["dev"]["unanswerable"]) == (5_014, 2_408)
    assert [f["count"] for f in found["shared"]] == [0, 1, 0, 0, 0]
    leaking = {f["what"]: f["count"] for f in look(capsys, train, whole)["shared"]}
    assert leaking["dev questions whose context is in train"] == 11_873 - 5_014
    rows = look(capsys, str(real_data / "causalqa/squad2_valid_original_split.csv"))["train"]
    assert rows["questions"] == 252


def test_small_things() -> None:
    assert normalize("  Ｔhe  “Rhine” —\n FLOWS_on! ") == "the rhine flows on"
    import numpy as np

    of = distribution(np.array([1, 2, 2, 3, 900]), "words")
    assert of["histogram"][-1][1] == 900 and sum(count for *_, count in of["histogram"]) == 5
    assert distribution(np.array([4, 4]), "words")["histogram"] == [[4, 4, 2]]

"""CausalQA readers: cells that look like missing values, TAB-joined references, folders, and bad files."""

import csv
import json
from pathlib import Path

import pytest

from plainloop.data.errors import InputError
from plainloop.data.readers.causalqa import COLUMNS, TextOptions, data_files, read_text, row_of_each_target

HEADER = ["id", "question", *COLUMNS[:1], "context", *COLUMNS[1:]]


def write(path: Path, *rows: dict[str, str]) -> str:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, HEADER)
        writer.writeheader()
        for number, row in enumerate(rows):
            full = {"id": f"{number:03}", "question_processed": "why"}
            full |= {"answer": "so", "answer_processed": "so"}
            writer.writerow(full | row)
    return str(path)


def read(path: str, **options: str) -> list[tuple[str, str, tuple[str, ...], str]]:
    rows = row_of_each_target(read_text([path], TextOptions(**options)))
    return [(e.id, e.question + e.context, e.references, e.target) for e in rows]


def test_cells_that_look_like_missing_values_are_text(tmp_path: Path) -> None:
    words = ["None", "NA", "nan", "null", "n/a", "N/A", "#N/A", "NULL"]
    path = write(tmp_path / "a.csv", *({"answer": w, "context_processed": w} for w in words))
    assert [(source, refs) for _, source, refs, _ in read(path)] == [(rf"why \n {w}", (w,)) for w in words]
    assert read(path)[0][0] == "000"  # an id is text


def test_only_an_empty_cell_means_no_context(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", {"context_processed": ""}, {"context_processed": "c" * 200_000})
    assert [source for _, source, _, _ in read(path)] == ["why", r"why \n " + "c" * 200_000]


def test_joined_references_never_become_one_target(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.csv", {"answer": "Time\tSpace\tSpace", "answer_processed": "time\tspace\tspace"}
    )
    assert read(path) == [("000", "why", ("Time", "Space", "Space"), "Time")]
    assert [row[3] for row in read(path, target="most_frequent")] == ["Space"]
    assert [row[3] for row in read(path, target="each")] == ["Time", "Space"]
    assert [row[3] for row in read(path, target_column="answer_processed")] == ["time"]
    both = read(path, target="each", target_column="answer_processed")
    assert [row[3] for row in both] == ["time", "space"]


def test_json_lines(tmp_path: Path) -> None:
    row = {"id": "7", "question_processed": "why", "context_processed": None, "answer": "a\u2028b"}
    row["answer_processed"] = "a"
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert read(str(path)) == [("7", "why", ("a\u2028b",), "a\u2028b")]
    without = {name: value for name, value in row.items() if name != "context_processed"}
    path.write_text(json.dumps(without), encoding="utf-8")
    assert read(str(path))[0][1] == "why"
    path.write_text(json.dumps(row) + "\n{", encoding="utf-8")
    with pytest.raises(InputError, match="line 2: not valid JSON"):
        read(str(path))


def test_errors_name_the_file_and_line(tmp_path: Path) -> None:
    for content, message in (
        ("id\n1\n2\n", "ELI5"),
        ("id,question_processed\n", "no context_processed, answer, answer_processed"),
        (",".join(HEADER) + "\n1,q,q,,,,\n", "line 2: 'answer' is empty"),
        (",".join(HEADER) + "\n1,q,q,c,c,a,a,a\n", "line 2: more cells"),
        (",".join(HEADER) + "\n", "holds no row"),
        (",".join(HEADER) + '\n1,q,"q,c,c,a,a\n', "not valid CSV"),
    ):
        (tmp_path / "bad.csv").write_text(content)
        with pytest.raises(InputError, match=message):
            read(str(tmp_path / "bad.csv"))
    (tmp_path / "bad.csv").write_bytes(b"id,\xff\n")
    with pytest.raises(InputError, match="not UTF-8"):
        read(str(tmp_path / "bad.csv"))


def test_folders_and_mixtures(tmp_path: Path) -> None:
    write(tmp_path / "gooaq_valid_random_split.csv", {})
    with pytest.raises(InputError, match="it has gooaq"):
        data_files(str(tmp_path), "valid", TextOptions())
    found = data_files(str(tmp_path), "valid", TextOptions(dataset="gooaq", split="random"))
    assert found == [str(tmp_path / "gooaq_valid_random_split.csv")]
    with pytest.raises(InputError, match="gooaq_train_random_split.csv: no such file"):
        data_files(str(tmp_path), "train", TextOptions(dataset="gooaq", split="random"))
    (tmp_path / "squad.json").write_text("{}")
    with pytest.raises(InputError, match="can't be mixed"):
        data_files([*found, str(tmp_path / "squad.json")], "valid", TextOptions())


def test_squad_as_text(squad_file: Path) -> None:
    with pytest.raises(InputError, match="this id occurs twice"):
        read_text([str(squad_file)] * 2, TextOptions())
    t5 = read_text([str(squad_file)], TextOptions(null_target="<no answer>"))
    assert len(t5) == 120
    assert t5[0].question.startswith("question: ") and t5[0].question.endswith(" context: ")
    assert {e.target for e in t5 if not e.references} == {"<no answer>"}
    unified = read_text([str(squad_file)], TextOptions(format="unifiedqa"))
    assert unified[0].question.endswith(r" \n ") and unified[0].context == t5[0].context.lower()
    assert unified[0].target == t5[0].target or not unified[0].references


def test_real_files(real_data: Path) -> None:
    folder = real_data / "causalqa"
    for name, count in (("squad2_valid_original_split.csv", 252), ("squad1_extra_train.csv", 152)):
        rows = read_text([str(folder / name)], TextOptions())
        assert len(rows) == count and all("\t" not in row.target for row in rows)
    files = data_files(str(folder), "valid", TextOptions(dataset="squad2"))
    assert read_text(files, TextOptions())[0].references == ("time or space",) * 3

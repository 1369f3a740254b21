"""Write the same questions in every format that the readers know."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plainloop.data.types import Example

NESTED = ("squad", "mrqa", "label_studio")
ROWS = ("jsonl", "csv", "tsv", "parquet", "list", "saved")


def rows_of(examples: Sequence[Example]) -> list[dict[str, Any]]:
    return [
        {
            "id": e.id, "question": e.question, "context": e.context,
            "answers": {"text": [a.text for a in e.answers], "answer_start": [a.start for a in e.answers]},
        }
        for e in examples
    ]  # fmt: skip


def write_rows(folder: Path, form: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows as they are; in CSV and TSV, lists and dictionaries as JSON in a cell."""
    path = folder / f"data.{'json' if form == 'list' else form}"
    if form == "jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    elif form == "list":
        path.write_text(json.dumps(list(rows), ensure_ascii=False, indent=1), encoding="utf-8")
    elif form in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="," if form == "csv" else "\t")
            writer.writeheader()
            for row in rows:
                plain = {k: v if isinstance(v, str) or v is None else json.dumps(v) for k, v in row.items()}
                writer.writerow(plain)
    elif form == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=100)
    else:
        import datasets

        datasets.Dataset.from_list(list(rows)).save_to_disk(path)
    return path


def write_nested(folder: Path, form: str, examples: Sequence[Example]) -> Path:
    """One context per question, so that the order stays."""
    if form == "squad":
        path, paragraphs = folder / "squad.json", []
        for e in examples:
            answers = [{"text": a.text, "answer_start": a.start} for a in e.answers]
            paragraphs.append(
                {"context": e.context, "qas": [{"id": e.id, "question": e.question, "answers": answers}]}
            )
        content = {"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}
        path.write_text(json.dumps(content), encoding="utf-8")
    elif form == "mrqa":
        path, lines = folder / "mrqa.jsonl", [json.dumps({"header": {"dataset": "d", "split": "train"}})]
        for e in examples:
            found = [
                {"text": a.text, "char_spans": [[a.start, a.start + len(a.text) - 1]]} for a in e.answers
            ]
            qa = {"qid": e.id, "question": e.question, "answers": [a.text for a in e.answers]}
            qa["detected_answers"] = found
            lines.append(json.dumps({"id": "", "context": e.context, "qas": [qa]}))
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        path, tasks = folder / "project.json", []
        for e in examples:
            result = [
                {
                    "type": "labels", "from_name": "answer", "to_name": "text",
                    "value": {
                        "start": a.start, "end": a.start + len(a.text), "text": a.text, "labels": ["Answer"],
                    },
                }
                for a in e.answers
            ]  # fmt: skip
            data = {"id": e.id, "text": e.context, "question": e.question}
            tasks.append({"id": len(tasks) + 1, "data": data, "annotations": [{"id": 1, "result": result}]})
        path.write_text(json.dumps(tasks), encoding="utf-8")
    return path

"""Read files of rows (CSV, TSV, JSON lines, a JSON list, Parquet, saved datasets) as records.

A record is a dict with id, question, context and answers, not yet checked; or with `fault`, and an id.
"""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from plainloop.data.errors import InputError
from plainloop.data.readers.files import csv_rows, json_lines
from plainloop.data.readers.nested import json_items


def rows_of(path: str, kind: str) -> tuple[Iterator[tuple[int, Any]], str]:
    """(number, row) of a file of rows, and what the number counts. The first of CSV is its header."""
    if kind in ("csv", "tsv"):
        return csv_rows(path), "line"
    if kind == "jsonl":
        return json_lines(path), "line"
    if kind == "list":
        return enumerate(json_items(path), start=1), "item"
    return enumerate(_saved_rows(path) if kind == "saved" else _parquet_rows(path), start=1), "row"


def _parquet_rows(path: str) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: not a Parquet file ({reason}). Is the download complete?") from None


def _saved_rows(path: str) -> Iterator[dict[str, Any]]:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(path)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not a folder written by datasets.save_to_disk ({error}).") from None
    if isinstance(dataset, DatasetDict):
        raise InputError(f"{path}: contains several splits; choose one: {path}/{'|'.join(dataset)}")
    yield from dataset


def flat_record(row: Any, columns: Mapping[str, str], name: str, cells: bool) -> dict[str, Any]:
    """The record of a row. name: its id, if it has none. cells: the row is from CSV or TSV."""
    if not isinstance(row, dict):
        return {"fault": "not an object"}
    if cells and (None in row or None in row.values()):
        return {"fault": f"{'more' if None in row else 'fewer'} cells than the header has columns"}
    record = renamed(row, columns)
    if "id" not in columns:
        record["id"] = name
    elif isinstance(record["id"], int):
        record["id"] = str(record["id"])
    return record


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    if "fault" in row:
        return {"id": row.get("id"), "fault": row["fault"]}
    if missing := [
        column for name, column in columns.items() if column not in row and name != "answer_start"
    ]:
        return {"id": row.get("id"), "fault": f"'{missing[0]}' is missing"}
    record = {name: row.get(column) for name, column in columns.items()}
    record.setdefault("context", "")
    record["answers"] = _answers(record.pop("answer"), record.pop("answer_start", None))
    return record


def _answers(value: Any, start: Any) -> list[Any] | None:
    """Answers as [{text[, answer_start]}]: given as a text, a list of texts or of objects, SQuAD's object
    {text: [...], answer_start: [...]}, or any of these as a cell. None, "" and [] mean unanswerable.
    """
    value, start = _decoded(value, "[{"), _decoded(start, "[-0123456789")
    if isinstance(value, dict):
        value, start = value.get("text"), value.get("answer_start", value.get("start"))
    if value is None or (isinstance(value, str) and not value.strip() and start in (None, "")):
        return []
    values = value if isinstance(value, list) else [value]
    starts = start if isinstance(start, list) else [start] * len(values)
    if len(values) != len(starts):
        return None
    answers: list[Any] = []
    for text, at in zip(values, starts, strict=True):
        if isinstance(text, dict):
            item: dict[str, Any] = text
            text, at = item.get("text"), item.get("answer_start", item.get("start"))
        if text == "" and at in (None, ""):
            continue
        answers.append({"text": text} if at in (None, "") else {"text": text, "answer_start": at})
    return answers


def _decoded(cell: Any, beginnings: str) -> Any:
    """The value of a text cell that begins so and is written as JSON or by Python; else the cell itself."""
    if isinstance(cell, str) and cell.strip().startswith(tuple(beginnings)):
        for decode in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                value = decode(cell.strip())
                texts = value if isinstance(value, list) else [value]
                if "{" not in beginnings or all(isinstance(text, (str, dict)) for text in texts):
                    return value
    return cell

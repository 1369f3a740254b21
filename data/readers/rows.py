"""Read files of rows (CSV, TSV, JSON lines, a JSON list, Parquet, saved datasets) as records.

A record is a dict with id, question, context and answers, not yet checked; or with `fault`, and an id.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from plainloop.data.errors import InputError
from plainloop.data.readers.files import csv_rows, json_lines, require_distinct
from plainloop.data.readers.nested import json_items

OPTIONAL = ("id", "answer_start", "title")


def rows_of(path: str, kind: str, wanted: Collection[str]) -> tuple[Iterator[tuple[int, Any]], str]:
    """(number, row) of a file of rows, and what the number counts. The first of CSV is its header."""
    if kind in ("csv", "tsv"):
        return csv_rows(path), "line"
    if kind == "jsonl":
        return json_lines(path), "line"
    if kind == "list":
        return enumerate(json_items(path), start=1), "item"
    return enumerate(
        _saved_rows(path, wanted) if kind == "saved" else _parquet_rows(path, wanted), start=1
    ), "row"


def _parquet_rows(path: str, wanted: Collection[str]) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = _chosen(path, file.schema_arrow.names, wanted)
            for batch in file.iter_batches(batch_size=1000, columns=columns):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: not a Parquet file ({reason}). Is the download complete?") from None


def _saved_rows(path: str, wanted: Collection[str]) -> Iterator[dict[str, Any]]:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a folder written by datasets.save_to_disk ({error}).") from None
    if isinstance(dataset, DatasetDict):
        raise InputError(f"{path}: contains several splits; choose one: {path}/{'|'.join(dataset)}")
    yield from dataset.with_format(None).select_columns(_chosen(path, dataset.column_names, wanted))


def _chosen(path: str, there: list[str], wanted: Collection[str]) -> list[str]:
    """The columns to read: those that may be needed, since others may be large; all, for an error to list."""
    require_distinct(path, there)
    chosen = [name for name in there if name in wanted]
    return chosen if len(chosen) > 2 else there


def flat_record(row: Any, columns: Mapping[str, str], name: str, cells: bool) -> dict[str, Any]:
    """The record of a row. name: its id, if it has none. cells: the row is from CSV or TSV."""
    if not isinstance(row, dict):
        return {"fault": "not an object"}
    if cells and (None in row or None in row.values()):
        return {"fault": f"{'more' if None in row else 'fewer'} cells than the header has columns"}
    record = renamed(row, columns, cells=cells)
    record.setdefault("id", name)
    return record


def renamed(row: Mapping[str, Any], columns: Mapping[str, str], *, cells: bool = False) -> dict[str, Any]:
    """The record of a row with these columns: field -> column."""
    if "fault" in row:
        return {"id": row.get("id"), "fault": row["fault"]}
    needed = [column for name, column in columns.items() if name not in OPTIONAL]
    if missing := [column for column in needed if column not in row]:
        return {"id": row.get("id"), "fault": f"'{missing[0]}' is missing"}
    record = {name: row[column] for name, column in columns.items() if column in row}
    record.setdefault("context", "")
    if isinstance(record.get("id"), int):
        record["id"] = str(record["id"])
    answer, start = record.pop("answer", None), record.pop("answer_start", None)
    if cells:
        answer, start = _decoded(answer, "[{"), _decoded(start, "[-0123456789")
    record["answers"], record["unlabelled"] = _answers(answer, start), row.get("unlabelled")
    return record


def _answers(value: Any, start: Any) -> list[Any] | None:
    """Answers as [{text[, answer_start]}]: given as a text, a list of texts or of objects, or SQuAD's object
    {text: [...], answer_start: [...]}. None, "" and [] mean unanswerable. Returns None for anything else.
    """
    if isinstance(value, dict):
        if "text" not in value:
            return None
        value, start = value["text"], value.get("answer_start", value.get("start"))
    if value is None:
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
        if isinstance(text, str) and not text.strip():
            continue
        if isinstance(at, float):  # a number in a table with gaps
            at = None if math.isnan(at) else int(at) if at.is_integer() else at
        answers.append({"text": text} if at in (None, "") else {"text": text, "answer_start": at})
    return answers


def _decoded(cell: Any, beginnings: str) -> Any:
    """The value of a cell that begins so and is written as JSON or by Python; else the cell itself. 0, which
    is no answer, for an object with `text` that can't be decoded.
    """
    if not isinstance(cell, str) or not cell.strip().startswith(tuple(beginnings)):
        return cell
    for decode in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            value = decode(cell.strip())
            if "{" not in beginnings or (isinstance(value, dict) and "text" in value):
                return value
            if isinstance(value, list) and all(isinstance(text, (str, dict)) for text in value):
                return value
    return 0 if re.match(r"""\s*\{\s*['"]text['"]\s*:""", cell) else cell

"""Read SQuAD 1.1 and 2.0 as Examples: the official JSON, or a folder written by `datasets.save_to_disk`.

Every record is validated before training; the first 20 faults are listed with their ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from plainloop.data.errors import InputError
from plainloop.data.types import Answer, Example

MAX_FAULTS_SHOWN = 20


def read_squad(path: str | Path) -> list[Example]:
    """Read all questions of a SQuAD file or saved `datasets` folder, in file order.

    Raises InputError if the file is missing, is not SQuAD, has no questions, or has a bad record.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file. Give a SQuAD JSON file or a folder saved by datasets.")
    records = _saved_dataset(path) if path.is_dir() else _official_json(path)
    examples: list[Example] = []
    faults: list[str] = []
    seen: set[str] = set()
    for record in records:
        fault = _fault(record, seen)
        if fault:
            faults.append(f"id {record.get('id')!r}: {fault}")
            continue
        seen.add(record["id"])
        answers = tuple(Answer(a["text"], a["answer_start"]) for a in record["answers"])
        examples.append(Example(record["id"], record["question"], record["context"], answers))
    if faults:
        shown = "\n  ".join(faults[:MAX_FAULTS_SHOWN])
        raise InputError(f"{path}: {len(faults)} bad record(s); correct or remove them:\n  {shown}")
    if not examples:
        raise InputError(f"{path}: holds no question.")
    return examples


def read_json(path: Path) -> Any:
    """Parse a UTF-8 JSON file; an error names file, line and column."""
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}.") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno}:{error.colno}: not valid JSON ({error.msg}). Is the download complete?"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8. Convert the file to UTF-8.") from None


def _official_json(path: Path) -> Iterator[dict[str, Any]]:
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise InputError(f"{path}: not a SQuAD file: no list 'data' at the top level.")
    for i, article in enumerate(content["data"]):
        for j, paragraph in enumerate(_items(article, "paragraphs", f"{path}: data[{i}]")):
            where = f"{path}: data[{i}].paragraphs[{j}]"
            for qa in _items(paragraph, "qas", where):
                if not isinstance(qa, dict):
                    raise InputError(f"{where}: an entry of 'qas' is not an object.")
                yield {**qa, "context": paragraph.get("context")}


def _items(container: Any, key: str, where: str) -> list[Any]:
    if not isinstance(container, dict) or not isinstance(container.get(key), list):
        raise InputError(f"{where}: not a SQuAD file: no list '{key}'.")
    return container[key]


def _saved_dataset(path: Path) -> Iterable[dict[str, Any]]:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: not a folder written by datasets.save_to_disk.") from None
    if isinstance(dataset, DatasetDict):
        raise InputError(f"{path}: contains several splits; choose one: {path}/{'|'.join(dataset)}")
    missing = {"id", "context", "question", "answers"} - set(dataset.column_names)
    if missing:
        raise InputError(f"{path}: the dataset has no column {sorted(missing)}; is it SQuAD?")
    for row in dataset:
        try:
            pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
            answers: Any = [{"text": text, "answer_start": start} for text, start in pairs]
        except (TypeError, KeyError, ValueError):
            answers = None  # _fault reports this with the record's id
        yield {**row, "answers": answers}


def _fault(record: dict[str, Any], seen: set[str]) -> str | None:
    """What is wrong with a record, or None."""
    for key, kind in (("id", str), ("question", str), ("context", str), ("answers", list)):
        if not isinstance(record.get(key), kind):
            return f"'{key}' is missing or not {'text' if kind is str else 'a list'}"
    if record["id"] in seen:
        return "this id occurs twice"
    if not record["question"].strip():
        return "the question is empty"
    for answer in record["answers"]:
        text, start = (answer.get("text"), answer.get("answer_start")) if isinstance(answer, dict) else (0, 0)
        if not isinstance(text, str) or not isinstance(start, int):
            return "an answer needs a 'text' and a whole number 'answer_start'"
        found = record["context"][max(start, 0) : max(start, 0) + len(text)]
        if start < 0 or found != text:
            return f"answer_start {start}: the context has {found!r} there, but the answer is {text!r}"
    return None

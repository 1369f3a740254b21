"""Read Webis-CausalQA-22 (CSV or JSONL) and SQuAD files as TextExamples, for text-to-text models.

CausalQA: the source is `question_processed \\n context_processed`. The separator is a literal backslash and
n, as in UnifiedQA, because T5's vocabulary silently drops a real newline. `answer` holds the references,
joined by TAB; a target is one of them, never the joined string. The cells `None` and `NA` are text; only an
empty cell means no context.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plainloop.data.errors import InputError
from plainloop.data.readers.squad import MAX_FAULTS_SHOWN, read_squad
from plainloop.data.types import TextExample

SEPARATOR = " \\n "
COLUMNS = ("question_processed", "context_processed", "answer", "answer_processed")


@dataclass(frozen=True)
class TextOptions:
    """How to turn rows into sources and targets.

    target: the reference to train on: "first", "most_frequent", or "each" (one row per distinct reference).
    target_column: CausalQA's `answer` or `answer_processed`. format: for SQuAD questions, "t5" (`question: Q
    context: C`) or "unifiedqa" (`q \\n c`, lower-cased). null_target: the target for an unanswerable
    question. dataset, split: select a file of a CausalQA folder, named
    `{dataset}_{train|valid}_{split}_split.csv`.
    """

    target: str = "first"
    target_column: str = "answer"
    format: str = "t5"
    null_target: str = ""
    dataset: str | None = None
    split: str = "original"


def is_squad(path: str) -> bool:
    """True for a .json file or a folder saved by `datasets`; anything else is CausalQA."""
    saved = (Path(path) / name for name in ("state.json", "dataset_dict.json"))
    return path.endswith(".json") or any(file.exists() for file in saved)


def data_files(path: str | Sequence[str], part: str, options: TextOptions) -> list[str]:
    """Resolve a data option to its files; a CausalQA folder resolves to its file for `part`.

    part: "train" or "valid". Raises InputError if a file is missing, or if SQuAD and CausalQA are mixed.
    """
    files = []
    for name in [path] if isinstance(path, str) else path:
        folder = Path(name)
        if folder.is_dir() and not is_squad(name):
            if not options.dataset:
                found = sorted({f.name.split(f"_{part}_")[0] for f in folder.glob(f"*_{part}_*_split.csv")})
                there = f"it has {', '.join(found)}" if found else f"it has no *_{part}_*_split.csv"
                raise InputError(f"{name}: set text.dataset to choose a dataset of this folder; {there}.")
            name = str(folder / f"{options.dataset}_{part}_{options.split}_split.csv")
        if not Path(name).exists():
            raise InputError(f"{name}: no such file. Give CausalQA CSV or JSONL, SQuAD JSON, or a folder.")
        files.append(name)
    if len({is_squad(name) for name in files}) > 1:
        raise InputError(
            f"{', '.join(files)}: SQuAD and CausalQA files can't be mixed: their metrics differ."
        )
    return files


def read_text(files: Sequence[str], options: TextOptions) -> list[TextExample]:
    """Read all examples of the files, in order.

    Raises InputError that lists the first bad rows with their line numbers.
    """
    examples: list[TextExample] = []
    for name in files:
        examples += (squad_as_text if is_squad(name) else read_causalqa)(name, options)
    if is_squad(files[0]):
        ((most, count),) = Counter(e.id for e in examples).most_common(1)
        if count > 1:
            raise InputError(f"{', '.join(files)}: id {most!r} occurs {count} times; ids must be unique.")
    return examples


def row_of_each_target(examples: Sequence[TextExample]) -> list[TextExample]:
    """Expand each example into one per target, for training."""
    return [dataclasses.replace(e, targets=(target,)) for e in examples for target in e.targets]


def read_causalqa(path: str, options: TextOptions) -> list[TextExample]:
    """Read a CausalQA CSV or JSONL file, in file order."""
    rows = _json_lines(Path(path)) if path.endswith(".jsonl") else _csv_rows(Path(path))
    examples, faults = [], []
    for line, row in rows:
        fault = _fault(row, options.target_column)
        if fault:
            faults.append(f"line {line}: {fault}")
            continue
        context = row.get("context_processed") or ""
        references = _references(row["answer"])
        targets = _chosen(_references(row[options.target_column]), options.target)
        question = row["question_processed"] + (SEPARATOR if context else "")
        examples.append(TextExample(str(row.get("id", line)), question, context, references, targets))
    if faults:
        shown = "\n  ".join(faults[:MAX_FAULTS_SHOWN])
        raise InputError(f"{path}: {len(faults)} bad row(s); correct or remove them:\n  {shown}")
    if not examples:
        raise InputError(f"{path}: holds no row.")
    return examples


def squad_as_text(path: str, options: TextOptions) -> list[TextExample]:
    """Read a SQuAD file as text-to-text examples; without answers, the target is `null_target`."""
    examples = []
    for e in read_squad(path):
        question, context = e.question.strip(), e.context
        if options.format == "unifiedqa":
            question, context = (question + SEPARATOR).lower(), context.lower()
        else:
            question = f"question: {question} context: "
        texts = tuple(answer.text for answer in e.answers)
        targets = _chosen(texts, options.target) if texts else (options.null_target,)
        examples.append(TextExample(e.id, question, context, texts, targets, is_squad=True))
    return examples


def _chosen(texts: tuple[str, ...], target: str) -> tuple[str, ...]:
    """Choose the targets among the references; ties in frequency go to the first."""
    if target == "each":
        return tuple(dict.fromkeys(texts))
    return (Counter(texts).most_common(1)[0][0] if target == "most_frequent" else texts[0],)


def _references(cell: str) -> tuple[str, ...]:
    return tuple(text.strip() for text in cell.split("\t") if text.strip())


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, row) pairs. Not with pandas, which reads `None`, `NA`, `null`, ... as missing values."""
    csv.field_size_limit(2**31 - 1)  # a context may be a whole page
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            header = reader.fieldnames or []
            if list(header) == ["id"]:
                raise InputError(
                    f"{path}: contains only ids: ELI5's texts may not be redistributed. Rebuild the file from"
                    " the original posts (see the Webis-CausalQA-22 repository), or leave this dataset out."
                )
            missing = [name for name in COLUMNS if name not in header]
            if missing:
                raise InputError(f"{path}: not a CausalQA file: its header has no {', '.join(missing)}.")
            for row in reader:
                yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: not valid CSV ({error}).") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8. Convert the file to UTF-8.") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}.") from None


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8. Convert the file to UTF-8.") from None
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(): it splits at U+2028 too
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}: line {number}: not valid JSON ({error.msg}).") from None


def _fault(row: Any, target_column: str) -> str | None:
    """What is wrong with a row, or None. The context and an unused `answer_processed` may be empty."""
    if not isinstance(row, dict) or None in row:
        return "not an object" if not isinstance(row, dict) else "more cells than the header has columns"
    for name in COLUMNS:
        value = row.get(name)
        if name == "context_processed" and value is None:
            continue
        if not isinstance(value, str):
            return f"'{name}' is missing or not text"
        if name in ("question_processed", "answer", target_column) and not value.strip():
            return f"'{name}' is empty"
    return None

"""Read Webis-CausalQA-22 (CSV or JSONL), and any data that examples.py reads, as TextExamples.

CausalQA: the source is `question_processed \\n context_processed`. The separator is a literal backslash and
n, as in UnifiedQA, because T5's vocabulary silently drops a real newline. `answer` holds the references,
joined by TAB; a target is one of them, never the joined string. The cells `None` and `NA` are text; only an
empty cell means no context.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plainloop.data.errors import InputError
from plainloop.data.readers.examples import Examples, ReadOptions
from plainloop.data.readers.files import (
    MAX_FAULTS_SHOWN,
    csv_rows,
    find_files,
    is_saved,
    json_lines,
    suffix_of,
)
from plainloop.data.types import Example, TextExample

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


def is_causalqa(path: str) -> bool:
    """Whether this file has CausalQA's columns, or ids alone, as ELI5's."""
    if is_saved(path) or suffix_of(path) not in (".csv", ".jsonl"):
        return False
    _, row = next(csv_rows(path) if suffix_of(path) == ".csv" else json_lines(path), (0, None))
    return isinstance(row, dict) and (COLUMNS[0] in row or list(row) == ["id"])


def data_files(path: str | Sequence[str], part: str, options: TextOptions) -> list[str]:
    """Resolve a data option to its files; a CausalQA folder resolves to its file for `part`.

    part: "train" or "valid". Raises InputError if a file is missing, or if SQuAD and CausalQA are mixed.
    """
    files: list[str] = []
    for name in [path] if isinstance(path, str) else path:
        folder = Path(name)
        there = sorted({f.name.split(f"_{part}_")[0] for f in folder.glob(f"*_{part}_*_split.csv")})
        if folder.is_dir() and options.dataset:
            name = str(folder / f"{options.dataset}_{part}_{options.split}_split.csv")
        elif there:
            raise InputError(
                f"{name}: set text.dataset to choose a dataset of this folder; it has {', '.join(there)}."
            )
        files += find_files(name)
    if len({is_causalqa(name) for name in files}) > 1:
        raise InputError(
            f"{', '.join(files)}: SQuAD and CausalQA files can't be mixed: their metrics differ."
        )
    return files


class TextExamples:
    """The examples of these files as TextExamples, in order; iterated and reported like Examples."""

    def __init__(
        self, files: Sequence[str], options: TextOptions, columns: Mapping[str, str] | None = None
    ) -> None:
        self.files, self.options = files, options
        self.causalqa = is_causalqa(files[0])
        if self.causalqa and columns:
            raise InputError("data.columns has no effect on CausalQA data; leave it out.")
        self._examples = Examples(files, ReadOptions(columns or {}, locate=False))

    @property
    def notes(self) -> list[str]:
        return self._examples.notes

    def __iter__(self) -> Iterator[TextExample]:
        if self.causalqa:
            return itertools.chain.from_iterable(read_causalqa(name, self.options) for name in self.files)
        return (as_text(example, self.options) for example in self._examples)


def read_text(files: Sequence[str], options: TextOptions) -> list[TextExample]:
    """All examples of the files. Raises InputError that lists the first bad rows with their line numbers."""
    return list(TextExamples(files, options))


def row_of_each_target(examples: Sequence[TextExample]) -> list[TextExample]:
    """Expand each example into one per target, for training."""
    return [dataclasses.replace(e, targets=(target,)) for e in examples for target in e.targets]


def read_causalqa(path: str, options: TextOptions) -> Iterator[TextExample]:
    """Read a CausalQA CSV or JSONL file, in file order."""
    rows = json_lines(path) if suffix_of(path) == ".jsonl" else _checked_csv(path)
    faults, count = [], 0
    for line, row in rows:
        fault = _fault(row, options.target_column)
        if fault:
            faults.append(f"line {line}: {fault}")
            continue
        context = row.get("context_processed") or ""
        references = _references(row["answer"])
        targets = _chosen(_references(row[options.target_column]), options.target)
        question = row["question_processed"] + (SEPARATOR if context else "")
        count += 1
        if not faults:
            yield TextExample(str(row.get("id", line)), question, context, references, targets)
    if faults:
        shown = "\n  ".join(faults[:MAX_FAULTS_SHOWN])
        raise InputError(f"{path}: {len(faults)} bad row(s); correct or remove them:\n  {shown}")
    if not count:
        raise InputError(f"{path}: holds no row.")


def as_text(example: Example, options: TextOptions) -> TextExample:
    """A question on a context as a text-to-text example; without answers, the target is `null_target`.

    Blanks in front of a context are dropped, as in the published code. A blank context is left out.
    """
    question, context = example.question.strip(), example.context.lstrip()
    if options.format == "unifiedqa":
        question, context = (question + (SEPARATOR if context else "")).lower(), context.lower()
    else:
        question = f"question: {question}" + (" context: " if context else "")
    texts = tuple(answer.text for answer in example.answers)
    targets = _chosen(texts, options.target) if texts else (options.null_target,)
    return TextExample(example.id, question, context, texts, targets, is_squad=True)


def _chosen(texts: tuple[str, ...], target: str) -> tuple[str, ...]:
    """Choose the targets among the references; ties in frequency go to the first."""
    if target == "each":
        return tuple(dict.fromkeys(texts))
    return (Counter(texts).most_common(1)[0][0] if target == "most_frequent" else texts[0],)


def _references(cell: str) -> tuple[str, ...]:
    return tuple(text.strip() for text in cell.split("\t") if text.strip())


def _checked_csv(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv_rows(path)
    _, header = next(rows)
    if list(header) == ["id"]:
        raise InputError(
            f"{path}: contains only ids: ELI5's texts may not be redistributed. Rebuild the file from"
            " the original posts (see the Webis-CausalQA-22 repository), or leave this dataset out."
        )
    if missing := [name for name in COLUMNS if name not in header]:
        raise InputError(f"{path}: not a CausalQA file: its header has no {', '.join(missing)}.")
    yield from rows


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

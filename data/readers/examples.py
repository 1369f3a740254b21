"""Read data files of any format as Examples, one at a time; every record is checked.

A faulty record never becomes an example: the first 20 faults of a file are listed, all are counted.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from plainloop.data.errors import InputError
from plainloop.data.readers.files import MAX_FAULTS_SHOWN, find_files, format_of
from plainloop.data.readers.nested import label_studio_records, mrqa_records, squad_records
from plainloop.data.readers.rows import OPTIONAL, flat_record, renamed, rows_of
from plainloop.data.types import Answer, Example

# Field -> the columns that are taken for it unless data.columns names another one.
COLUMNS = {
    "id": ("id", "qid", "question_id", "_id"),
    "question": ("question", "query"),
    "context": ("context", "passage", "paragraph", "document", "text"),
    "answer": ("answers", "answer", "answer_text", "target"),
    "answer_start": ("answer_start", "start"),
    "title": ("title",),
}
REQUIRED = ("question", "context", "answer")


@dataclass(frozen=True)
class ReadOptions:
    """How to read records.

    columns: field (a key of COLUMNS) -> name of the column. ambiguous: what to do with an answer without a
    start that occurs in its context several times or not at all; locate: whether answers need a start at all;
    answers: whether to read them; without, unlabelled data will do.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    ambiguous: Literal["error", "skip", "first"] = "error"
    locate: bool = True
    answers: bool = True


DEFAULT = ReadOptions()


class Examples:
    """The examples of these files, in order. Each iteration reads them anew and raises InputError at the end
    of a file with bad records. notes: lines for the log, complete after an iteration.
    """

    def __init__(self, files: Sequence[str], options: ReadOptions = DEFAULT) -> None:
        unknown = set(options.columns) - {*COLUMNS, "answers"}
        if unknown:
            raise InputError(
                f"data.columns: unknown field {sorted(unknown)}; choose from {', '.join(COLUMNS)}."
            )
        self.files, self.options = files, options
        self.notes: list[str] = []
        self.names = {key.replace("answers", "answer"): name for key, name in options.columns.items()}

    def __iter__(self) -> Iterator[Example]:
        self.notes, count = [], 0
        seen: set[str] = set()
        located: Counter[str] = Counter()
        for path in self.files:
            faults: list[str] = []
            lost: list[str] = []
            for where, record in self._records(path):
                made = self._example(record, located)
                if isinstance(made, _Lost):
                    lost.append(f"{where}: id {made.id!r}: {made.reason}")
                    located["left out"] += self.options.ambiguous != "error"
                    continue
                if isinstance(made, Example) and made.id in seen:
                    made = "this id occurs twice"
                if isinstance(made, str):
                    name = f" id {record['id']!r}:" if record.get("id") is not None else ""
                    faults.append(f"{where}:{name} {made}")
                    continue
                seen.add(made.id)
                if not faults:  # else nothing is made of this data; only the other faults are of interest
                    count += 1
                    yield made
            _raise_faults(path, faults, lost if self.options.ambiguous == "error" else [])
        if not count:
            raise InputError(f"{', '.join(self.files)}: holds no question.")
        self.notes += [f"warning: {number} {NOTES[what]}" for what, number in located.items() if number]

    def _records(self, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        kind = format_of(path)
        if kind == "squad":
            return squad_records(path)
        wanted = {*self.names.values(), *itertools.chain.from_iterable(COLUMNS.values())}
        rows, unit = rows_of(path, kind, wanted)
        first = next(rows, None)
        if first is None:
            return iter(())
        rows = itertools.chain([first], rows)
        if kind == "jsonl" and isinstance(first[1], dict) and {"header", "qas"} & first[1].keys():
            return mrqa_records(path, rows)
        if kind == "list" and isinstance(first[1], dict) and _is_label_studio(first[1]):
            if not isinstance(first[1].get("data"), dict):
                raise InputError(f"{path}: task 1: not a Label Studio task: no object 'data'.")
            if "answer" in self.names:
                raise InputError(
                    f"{path}: Label Studio's annotations are the answers; name no column for them."
                )
            columns = self._columns(path, {**first[1]["data"], "id": "", "answers": ""})
            tasks = label_studio_records(row for _, row in rows)
            return ((where, renamed(record, columns)) for where, record in tasks)
        if not isinstance(first[1], dict):
            raise InputError(f"{path}: {unit} {first[0]}: not an object with question, context and answer.")
        columns, cells = self._columns(path, first[1]), kind in ("csv", "tsv")
        if cells:
            next(rows)  # the header
        many = len({Path(file).name for file in self.files}) < len(self.files)
        base = path if many else Path(path).name
        if kind in ("jsonl", "list"):  # each row may have other optional fields
            return (
                (f"{unit} {n}", flat_record(row, self._more(columns, row), f"{base}:{n}", False))
                for n, row in rows
            )
        return ((f"{unit} {n}", flat_record(row, columns, f"{base}:{n}", cells)) for n, row in rows)

    def _more(self, columns: dict[str, str], row: Any) -> dict[str, str]:
        """These columns, and the optional ones that this row has."""
        if not isinstance(row, dict):
            return columns
        more = {n: next((c for c in COLUMNS[n] if c in row), None) for n in OPTIONAL if n not in columns}
        return columns | {name: column for name, column in more.items() if column}

    def _columns(self, path: str, row: Mapping[str, Any]) -> dict[str, str]:
        """Field -> column of this file. Raises InputError for one that is needed and not there."""
        columns = {}
        for name, usual in COLUMNS.items():
            wanted = [self.names[name]] if name in self.names else usual
            if found := next((column for column in wanted if column in row), None):
                columns[name] = found
            elif name in self.names or self._required(name):
                there = ", ".join(map(str, row))
                raise InputError(
                    f"{path}: no column {' or '.join(wanted)} (it has {there}); name the {name}'s column with"
                    f' --data.columns "{{{name}: NAME}}".'
                )
        renamed = [name for name, column in columns.items() if column != COLUMNS[name][0]]
        if renamed:
            line = "columns: " + ", ".join(f"{name} from '{columns[name]}'" for name in renamed)
            if line not in self.notes:
                self.notes.append(line)
        return columns

    def _required(self, name: str) -> bool:
        if name == "context":
            return self.options.locate
        return name in REQUIRED and (name != "answer" or self.options.answers)

    def _example(self, record: dict[str, Any], located: Counter[str]) -> Example | str | _Lost:
        """The example, what is wrong with the record, or an answer that can't be located."""
        if record.get("context") is None and not self.options.locate:
            record["context"] = ""
        if not self.options.answers:
            record = {**record, "answers": [], "unlabelled": None}
        if fault := record.get("fault") or record.get("unlabelled") or _fault(record):
            return str(fault)
        if not self.options.answers and self.options.locate and not record["context"].strip():
            return "the context is empty"
        context, several = record["context"], 0
        found: list[Answer] = []
        for answer in record["answers"]:
            if not isinstance(answer, dict):
                return NO_ANSWER
            text, start = answer.get("text"), answer.get("answer_start")
            if "answer_start" not in answer and isinstance(text, str):
                text = text.strip()
                times = _occurrences(context, text) if self.options.locate else 1
                if times == 0 or (times > 1 and self.options.ambiguous != "first"):
                    what = f"occurs {times} times in" if times else "does not occur in"
                    return _Lost(record["id"], f"{text!r} {what} its context")
                several += times > 1
                start = context.find(text)
            elif not isinstance(text, str) or not isinstance(start, int) or isinstance(start, bool):
                return NO_ANSWER
            elif not answer.get("reference"):
                there = context[max(start, 0) : max(start, 0) + len(text)]
                if start < 0 or there != text:
                    return (
                        f"answer_start {start}: the context has {there!r} there, but the answer is {text!r}"
                    )
            found.append(Answer(text, start))
        located["first taken"] += several
        title = record.get("title")
        return Example(
            record["id"], record["question"], context, tuple(found), title if isinstance(title, str) else ""
        )


NO_ANSWER = "an answer needs a 'text' and a whole number 'answer_start'"
NOTES = {
    "first taken": "answer(s) occur several times in their context: the first occurrence is used",
    "left out": "record(s) left out: an answer occurs several times in its context, or not at all",
}


@dataclass(frozen=True)
class _Lost:
    id: str
    reason: str


def read_examples(paths: str | Path | Sequence[str], options: ReadOptions = DEFAULT) -> list[Example]:
    """All examples of these files, patterns or folders. Raises InputError."""
    return list(Examples(find_files(str(paths) if isinstance(paths, Path) else paths), options))


def _occurrences(context: str, text: str) -> int:
    """How often a text occurs, overlapping occurrences included."""
    count, at = 0, context.find(text)
    while text and at >= 0:
        count, at = count + 1, context.find(text, at + 1)
    return count


def _raise_faults(path: str, faults: list[str], lost: list[str]) -> None:
    if faults:
        raise InputError(f"{path}: {len(faults)} bad record(s); correct or remove them:{_listed(faults)}")
    if lost:
        raise InputError(
            f"{path}: {len(lost)} answer(s) can't be located in their context. Add answer_start, or set"
            f" --data.ambiguous first (use the first occurrence) or skip (leave it out):{_listed(lost)}"
        )


def _listed(faults: list[str]) -> str:
    return f" {faults[0]}" if len(faults) == 1 else "".join(f"\n  {f}" for f in faults[:MAX_FAULTS_SHOWN])


def _fault(record: dict[str, Any]) -> str | None:
    """What is wrong with the fields of a record, or None."""
    for key in ("id", "question", "context"):
        if not isinstance(record.get(key), str):
            return f"'{key}' is missing or not text"
        try:
            record[key].encode()
        except UnicodeEncodeError:
            return f"'{key}' has half of a character that UTF-16 writes in two (a surrogate)"
    if not isinstance(record.get("answers"), list):
        return (
            "'answers' is missing or not a text, a list of texts, or an object with 'text' and 'answer_start'"
        )
    empty = [key for key in ("id", "question") if not record[key].strip()]
    return f"the {empty[0]} is empty" if empty else None


def require_use(columns: Mapping[str, str], files: Sequence[str], option: str) -> None:
    """Raise InputError if none of these files has columns that could be named."""
    if columns and all(format_of(path) == "squad" for path in files):
        raise InputError(f"{option} has no effect on SQuAD's JSON; leave it out.")


def _is_label_studio(task: dict[str, Any]) -> bool:
    return bool({"annotations", "completions"} & task.keys()) or isinstance(task.get("data"), dict)

"""Find the files of a data option, tell their format, and open them. Errors name the file."""

from __future__ import annotations

import contextlib
import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from plainloop.data.errors import InputError

MAX_FAULTS_SHOWN = 20
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")  # all but parquet also with .gz
NOT_UTF8 = "not UTF-8; convert the file."
ACCEPTED = "Give SQuAD JSON, JSONL, CSV, TSV, Parquet, a folder of such files, or one saved by datasets."


def find_files(paths: str | Sequence[str], option: str = "--data") -> list[str]:
    """Resolve files, patterns and folders, in order; those of a pattern or a folder sorted by name.

    option: what to call the list in an error.
    A folder written by `datasets.save_to_disk` counts as one file. Raises InputError if there is none.
    """
    found: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        if Path(path).is_dir() and not is_saved(path):
            inside = sorted(str(file) for file in Path(path).iterdir() if suffix_of(str(file)) in SUFFIXES)
            if not inside:
                raise InputError(f"{path}: this folder has no {', '.join(SUFFIXES)} file. {ACCEPTED}")
            found += inside
        elif Path(path).exists():
            found.append(path)
        elif matching := sorted(glob.glob(path, recursive=True)):
            found += matching
        else:
            raise InputError(f"{path}: no such file. {ACCEPTED}")
    if not found:
        raise InputError(f"{option}: the list is empty. {ACCEPTED}")
    return found


def is_saved(path: str) -> bool:
    """Whether this is a folder written by `datasets.save_to_disk`."""
    return any((Path(path) / name).exists() for name in ("state.json", "dataset_dict.json"))


def suffix_of(path: str) -> str:
    return Path(path.removesuffix(".gz")).suffix.lower()


def format_of(path: str) -> str:
    """saved, parquet, csv, tsv, jsonl, squad (a JSON object with `data`), or list (a JSON list of objects).

    The content of a .json file decides: many programs write JSON lines under this name. Raises InputError.
    """
    if is_saved(path):
        return "saved"
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: unknown kind of file. {ACCEPTED}")
    if suffix != ".json":
        return {".ndjson": "jsonl"}.get(suffix, suffix[1:])
    with reading(path), open_bytes(path) as stream:
        start = stream.read(1 << 16).decode("utf-8-sig", errors="replace").lstrip()
    if start.startswith("["):
        return "list"
    try:
        first, end = json.JSONDecoder().raw_decode(start)
    except json.JSONDecodeError:
        return "squad"  # longer than what was read, or not valid, which its reader explains
    several = bool(start[end:].strip())
    return "jsonl" if isinstance(first, dict) and (several or "data" not in first) else "squad"


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what can go wrong while reading into an InputError that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start}: {NOT_UTF8}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: not a complete gzip file ({error}). Is the download complete?") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}.") from None


def open_bytes(path: str) -> IO[bytes]:
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def read_json(path: str | Path) -> Any:
    """Parse a UTF-8 JSON file whole; an error names file, line and column."""
    try:
        with reading(str(path)), open_bytes(str(path)) as stream:
            return json.loads(stream.read().decode("utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno}:{error.colno}: not valid JSON ({error.msg}). Is the download complete?"
        ) from None


def csv_rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, row) of a CSV or TSV file; the header comes first, as a row of its names with line 0.

    Not with pandas, which reads `None`, `NA`, `null`, ... as missing values. A row with more cells than the
    header has the key None, one with fewer the value None.
    """
    csv.field_size_limit(2**31 - 1)  # a context may be a whole page
    separator = "\t" if suffix_of(path) == ".tsv" else ","
    with reading(path), open_bytes(path) as raw:
        reader = csv.DictReader(
            io.TextIOWrapper(raw, encoding="utf-8-sig", newline=""), strict=True, delimiter=separator
        )
        try:
            yield 0, {name: name for name in reader.fieldnames or []}
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise InputError(f"{path}: line {reader.line_num}: not valid CSV ({error}).") from None
        except UnicodeDecodeError:
            raise InputError(f"{path}: after line {reader.line_num}: {NOT_UTF8}") from None


def json_lines(path: str) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) of a JSON lines file; blank lines are skipped."""
    with reading(path), open_bytes(path) as stream:
        for number, line in enumerate(stream, start=1):  # bytes: only \n ends a line, not U+2028
            try:
                if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    yield number, json.loads(text)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}: line {number}: not valid JSON ({error.msg}).") from None
            except UnicodeDecodeError:
                raise InputError(f"{path}: line {number}: {NOT_UTF8}") from None

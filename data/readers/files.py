"""Find the files of a data option, tell their format, and open them. Errors name the file."""

from __future__ import annotations

import codecs
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
            inside = sorted(str(file) for file in Path(path).iterdir() if _is_data(file))
            splits = sorted(folder.name for folder in Path(path).iterdir() if is_saved(str(folder)))
            if splits:
                raise InputError(f"{path}: contains several splits; choose one: {path}/{'|'.join(splits)}")
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


def _is_data(file: Path) -> bool:
    return suffix_of(str(file)) in SUFFIXES and not file.name.startswith(".") and file.name != "manifest.json"


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
    with reading(path), open_json(path) as stream:
        start = stream.read(1 << 16).lstrip()
        if not start or start.startswith(b"["):
            return "list" if start else "squad"
        stream.seek(0)
        return "squad" if _has_data(skip_mark(stream)) else "jsonl"


def _has_data(stream: IO[bytes]) -> bool:
    """Whether the first JSON object has a key `data`; True also for what is not valid JSON."""
    import ijson

    depth = 0
    try:
        for event, value in ijson.basic_parse(stream):
            depth += {"start_map": 1, "start_array": 1, "end_map": -1, "end_array": -1}.get(event, 0)
            if depth == 1 and event == "map_key" and value == "data":
                return True
            if depth == 0:
                return False
    except (ijson.JSONError, ValueError):
        pass
    return True


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


def open_json(path: str) -> IO[bytes]:
    """Open a JSON file behind the mark that Windows puts in front of UTF-8."""
    return skip_mark(open_bytes(path))


def skip_mark(stream: IO[bytes]) -> IO[bytes]:
    if stream.read(3) != codecs.BOM_UTF8:
        stream.seek(0)
    return stream


def open_bytes(path: str) -> IO[bytes]:
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def read_json(path: str | Path) -> Any:
    """Parse a UTF-8 JSON file whole; an error names file, line and column."""
    try:
        with reading(str(path)), open_bytes(str(path)) as stream:
            return json.loads(stream.read().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno}:{error.colno}: not valid JSON ({error.msg}). Is the download complete?"
        ) from None
    except RecursionError:
        raise InputError(f"{path}: not valid JSON (nested too deeply).") from None


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
            require_distinct(path, reader.fieldnames or [])
            yield 0, {name: name for name in reader.fieldnames or []}
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise InputError(f"{path}: line {reader.line_num}: not valid CSV ({error}).") from None
        except UnicodeDecodeError:
            raise InputError(f"{path}: after line {reader.line_num}: {NOT_UTF8}") from None


def require_distinct(path: str, columns: Sequence[str]) -> None:
    if twice := sorted({name for name in columns if list(columns).count(name) > 1}):
        raise InputError(f"{path}: two columns are named {twice[0]}; rename one.")


def json_lines(path: str) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) of a JSON lines file; blank lines are skipped."""
    with reading(path), open_bytes(path) as stream:
        for number, line in enumerate(stream, start=1):  # bytes: only \n ends a line, not U+2028
            try:
                if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    yield number, json.loads(text)
            except UnicodeDecodeError:
                raise InputError(f"{path}: line {number}: {NOT_UTF8}") from None
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", type(error).__name__)
                raise InputError(f"{path}: line {number}: not valid JSON ({reason}).") from None

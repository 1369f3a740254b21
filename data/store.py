"""Features as flat memory-mapped arrays, cached on disk under a digest of all their inputs.

A store is a folder of .npy files, published by an atomic rename: once visible, it is complete. A row is a
slice of an array, so loader workers share pages and hold no Python objects.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from plainloop.data.errors import InputError

# Part of the key of every cached store, and so of a run's fingerprint: by the kind of rows. Raise it when the
# readers or tokenisation change what they produce; tests/data/test_store.py notices if you forget.
FEATURES_VERSION = {"span": 1, "text": 2}


class Store:
    """Features as arrays. lengths (N,) in tokens; starts (N,) index flat arrays."""

    name = ""  # of the folder, if it was opened from one: the digest of what the features depend on

    def __init__(self, arrays: dict[str, np.ndarray], meta: dict[str, Any] | None = None) -> None:
        self.arrays, self.meta = arrays, meta or {}
        self.lengths = np.asarray(self.arrays["length"])
        self.starts = _starts(self.lengths)
        self._target_starts = (
            _starts(self.arrays["target_length"]) if "target_length" in self.arrays else None
        )

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open a store folder, read-only."""
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        if "questions" in meta:  # written by version 0.1
            meta["counts"] = {**meta["questions"], "squad": int(meta.get("is_squad", 0))}
        store = cls({file.stem: np.load(file, mmap_mode="r") for file in sorted(path.glob("*.npy"))}, meta)
        store.name = path.name
        return store

    @property
    def row_lengths(self) -> np.ndarray:
        """(N,) tokens of each row, or for text-to-text (N, 2): tokens of source and target."""
        if "target_length" not in self.arrays:
            return self.lengths
        return np.stack([self.lengths, self.arrays["target_length"].astype(np.int64)], axis=1)

    @property
    def num_targets(self) -> np.ndarray:
        """(N,) what each row adds to the divisor of the summed loss: 1, or its target tokens."""
        return np.asarray(self.arrays.get("target_length", np.ones(len(self)))).astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, name: str, index: int) -> np.ndarray:
        """The slice of a flat (per-token) array that belongs to row `index`."""
        start = self.starts[index]
        return self.arrays[name][start : start + self.lengths[index]]

    def target(self, index: int) -> np.ndarray:
        """The slice of target_ids that belongs to row `index` of a text-to-text store."""
        assert self._target_starts is not None
        start = self._target_starts[index]
        return self.arrays["target_ids"][start : start + self.arrays["target_length"][index]]


def _starts(lengths: np.ndarray) -> np.ndarray:
    """(N,) lengths -> (N,) where each row of a flat array starts."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)[:-1]])


def digest(*parts: Any) -> str:
    """Hex digest of JSON-serialisable parts; a Path stands for its content (a folder: all its files)."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            for file in sorted(part.rglob("*")) if part.is_dir() else [part]:
                if file.is_file():
                    try:
                        with open(file, "rb") as stream:
                            total.update(_file_digest(stream))
                    except OSError as error:
                        raise InputError(f"{file}: {error.strerror or error}.") from None
        else:
            total.update(json.dumps(part, sort_keys=True).encode())
        total.update(b"\0")
    return total.hexdigest()[:32]


def _file_digest(stream: Any) -> bytes:
    running = hashlib.sha256()
    while block := stream.read(1 << 20):
        running.update(block)
    return running.digest()


def cache_folder(configured: str | None) -> Path:
    """The folder that holds the stores: the option, else $PLAINLOOP_CACHE, else ~/.cache/plainloop."""
    return Path(configured or os.environ.get("PLAINLOOP_CACHE") or Path.home() / ".cache" / "plainloop")


class Writer:
    """Appends chunks of arrays to .npy files, so that a store of any size needs little memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, tuple[IO[bytes], dict[str, Any]]] = {}

    def append(self, arrays: dict[str, np.ndarray]) -> None:
        """Append along the first axis. Raises InputError if a dtype or another axis is not as before."""
        for name, array in arrays.items():
            with writing(self.folder):
                if name not in self._files:
                    header = np.lib.format.header_data_from_array_1_0(np.ascontiguousarray(array[:0]))
                    self._files[name] = open(self.folder / f"{name}.npy", "wb"), header
                    np.lib.format.write_array_header_1_0(*self._files[name])
                file, header = self._files[name]
                same = header["shape"][1:] == array.shape[1:]
                if not same or np.lib.format.descr_to_dtype(header["descr"]) != array.dtype:
                    raise InputError(
                        f"the task's array {name!r} has dtype {array.dtype}, shape {array.shape}, but other"
                        " examples gave another dtype or other axes; make them the same."
                    )
                file.write(np.ascontiguousarray(array).data)
                header["shape"] = (header["shape"][0] + len(array), *array.shape[1:])

    def close(self) -> None:
        """Write the final shapes: numpy leaves room in a header for the first axis to grow."""
        with writing(self.folder):
            for file, header in self._files.values():
                file.seek(0)
                np.lib.format.write_array_header_1_0(file, header)
                file.close()


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an OSError into an InputError that names the cache folder."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"data.cache_dir {folder.parent}: {reason}; choose a writable folder with room."
        ) from None


def build(path: Path, fill: Callable[[Writer], dict[str, Any]]) -> Store:
    """Open the store at `path`, building it first if missing. Safe to call from several processes at once.

    fill: appends the arrays, returns the meta data. Raises InputError.
    """
    if not (path / "meta.json").exists():
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=path.parent))
        try:
            writer = Writer(temporary)
            meta = fill(writer)
            writer.close()
            with writing(path):
                (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
                temporary.chmod(0o755)
                try:
                    os.rename(temporary, path)
                except OSError:
                    if not (path / "meta.json").exists():  # else another process was first: same content
                        raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # gone if it was published
    return Store.open(path)


def wait_for(path: Path, *, poll_s: float = 0.2, report_s: float = 300) -> Store:
    """Wait, outside any collective, until another process has built the store; report every `report_s`."""
    started = reported = time.monotonic()
    while not (path / "meta.json").exists():
        time.sleep(poll_s)
        if time.monotonic() - reported > report_s:
            reported = time.monotonic()
            print(
                f"waiting for rank 0 to tokenise ({reported - started:.0f} s): {path}",
                file=sys.stderr,
                flush=True,
            )
    return Store.open(path)

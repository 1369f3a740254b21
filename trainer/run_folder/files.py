"""Write and check files so that a crash, a full disk or a planted link can't leave a wrong one unnoticed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    running = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            running.update(block)
    return running.hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """The entry of a file in a manifest: its size in bytes and its SHA-256."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def file_fault(path: Path, name: str, expected: dict[str, Any], *, links: bool = False) -> str | None:
    """How a file differs from its manifest entry, or None. links: it may be a link. Raises OSError."""
    if path.is_symlink() and not links:
        return f"{name} is a symbolic link"
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != expected["size"]:
        return f"{name} has {path.stat().st_size} bytes, expected {expected['size']}"
    if sha256(path) != expected["sha256"]:
        return f"{name} has a different SHA-256 than when it was written"
    return None


def no_follow(path: str, flags: int) -> int:
    """For open(opener=...): raise OSError if the path is a symbolic link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_atomically(path: Path, text: str, *, durable: bool = False) -> None:
    """Atomically replace a small file. A symlink at `path` is replaced, not followed. durable: it is on the
    disk before it replaces the one before.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with open(temporary, "x", encoding="utf-8", opener=no_follow) as stream:
        stream.write(text)
        if durable:
            stream.flush()
            os.fsync(stream.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def rust_errors(path: Path) -> Iterator[None]:
    """Make an OSError of an I/O error in Rust code: safetensors, tokenizers."""
    try:
        yield
    except Exception as error:
        if (found := re.search(r"os error (\d+)", str(error))) and not isinstance(error, OSError):
            number = int(found.group(1))
            raise OSError(number, os.strerror(number), str(path)) from None
        raise


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_durable(folder: Path) -> None:
    """Set permissions from the umask (safetensors writes 0600) and fsync everything."""
    umask = _umask()
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)
        sync(file)
    sync(folder)


def _umask() -> int:
    """Read the umask. On Linux without setting it, since another thread may be creating a file."""
    if not sys.platform.startswith("linux"):
        umask = os.umask(0)
        os.umask(umask)
        return umask
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1], 8) for line in lines if line.startswith("Umask:"))


def sweep(folder: Path, prefix: str = ".tmp-") -> None:
    """Rank 0 only. Remove leftover temporary folders. Safe, because a run folder has only one writer."""
    for path in folder.glob(f"{prefix}*"):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


def write_manifest(folder: Path, source: dict[str, Any], *, without: Collection[str] = ()) -> None:
    """Write the manifest of a folder made by fetch or export, including subfolders. source: where it came
    from. without: files that may change.
    """
    (folder / MANIFEST).unlink(missing_ok=True)  # left by an interrupted attempt
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in without)
    listed = {str(path.relative_to(folder)): describe_file(path) for path in files}
    content = {"source": source, "files": listed}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def read_source(folder: Path) -> dict[str, Any] | None:
    """Where a fetched or exported folder came from; None for any other folder."""
    try:
        return dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def fault_of(folder: Path) -> str | None:
    """The first file that is missing or changed since the manifest was written, and how; None if all are
    intact. Raises OSError.
    """
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    return next(
        filter(None, (file_fault(folder / name, name, files[name], links=True) for name in files)), None
    )

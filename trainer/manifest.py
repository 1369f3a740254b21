"""What a folder is made of: sizes and digests of its files, so that a cut or changed one is found."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    running = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            running.update(block)
    return running.hexdigest()


def write_manifest(folder: Path, source: dict[str, Any]) -> None:
    """Of a folder of `plainloop fetch`, subfolders included; source tells where it is from."""
    (folder / MANIFEST).unlink(missing_ok=True)  # of a try that was broken off
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256(path)} for path in files
    }
    content = {"source": source, "files": listed}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def read_source(folder: Path) -> dict[str, Any] | None:
    """Where a fetched folder is from; None for any other folder."""
    try:
        return dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def fault_of(folder: Path) -> str | None:
    """The first file of a fetched folder that is not as it was fetched, and how; None when all are.

    Raises OSError.
    """
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes, expected {expected['size']}"
        if sha256(path) != expected["sha256"]:
            return f"{name} has another SHA-256 than when it was fetched"
    return None

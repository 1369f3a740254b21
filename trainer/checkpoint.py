"""Checkpoint folders that appear whole or not at all, are verified when read, and hold no pickle.

RUN/checkpoints/step-00000500/
    config.json, model.safetensors, tokenizer ...   what from_pretrained reads
    optimizer.safetensors                           '<parameter>/<key>' -> tensor
    state.json                                      step, counters, loss scale, evaluations, config
    manifest.json                                   size and SHA-256 of every other file, written last

The folder is written as .tmp-*, files and folder are synced, and one rename makes it visible.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plainloop.data.types import InputError
from plainloop.trainer.state import TrainState

FORMAT = 1
PREFIX = "step-"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose manifest was verified, and its state.json."""

    path: Path
    state: dict[str, Any]


def save_checkpoint(
    folder: Path, state: TrainState, save_model: Callable[[Path], None], extra: dict[str, Any]
) -> Path:
    """Rank 0 only. Write the checkpoint of `state.step` into `folder`; on an error nothing of it is left.

    save_model writes what from_pretrained reads; extra goes into state.json. Raises OSError.
    """
    final = folder / f"{PREFIX}{state.step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, checkpoint_bytes(state.model))
    temporary = folder / f".tmp-{final.name}-{os.getpid()}"
    temporary.mkdir()
    try:
        save_model(temporary)
        _save_tensors(state.optimizer_tensors(), temporary / "optimizer.safetensors")
        _write_json(temporary / "state.json", {"format": FORMAT, **_counters(state), **extra})
        manifest = {
            f.name: {"size": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(temporary.iterdir())
        }
        _write_json(temporary / MANIFEST, manifest)
        _settle(temporary)
        if final.exists():  # a damaged one of the same step was set aside before; this one is good
            shutil.rmtree(final)
        os.rename(temporary, final)
        _sync(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if "os error" in str(error) and not isinstance(error, OSError):  # of Rust: safetensors, tokenizers
            raise OSError(errno.EIO, str(error), str(temporary)) from None
        raise
    return final


def restore(state: TrainState, checkpoint: Checkpoint, *, is_main: bool) -> None:
    """All ranks. Everything but the weights, which the model was loaded with. Rank 0 takes the loss sum."""
    from safetensors.torch import load_file

    saved = checkpoint.state
    state.load_optimizer_tensors(load_file(checkpoint.path / "optimizer.safetensors"))
    state.step = saved["step"]
    state.evaluations = saved["evaluations"]
    state.loss_count = saved["loss_count"]
    state.loss_sum += saved["loss_sum"] if is_main else 0.0
    state.nonfinite_run += saved["nonfinite_run"]
    state.nonfinite_worst += saved["nonfinite_run"]
    state.nonfinite_total += saved["nonfinite_total"]
    if saved["scaler"]:
        state.scaler.load_state_dict(saved["scaler"])


def newest_good(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """Rank 0 only. The newest checkpoint (by step) that verifies; damaged ones are reported and set aside.

    Raises InputError when there are checkpoints and none is good: never a silent start from scratch.
    """
    reasons: dict[Path, str] = {}
    for path in sorted(folder.glob(f"{PREFIX}*"), reverse=True):
        fault = verify(path)
        if fault is None:
            for damaged, reason in reasons.items():
                report(f"damaged checkpoint set aside: {damaged}: {reason}")
                os.rename(damaged, damaged.with_name(f".bad-{damaged.name}-{os.getpid()}"))
            return Checkpoint(path, json.loads((path / "state.json").read_text(encoding="utf-8")))
        reasons[path] = fault
    if reasons:
        listed = "\n  ".join(f"{path}: {reason}" for path, reason in reasons.items())
        raise InputError(f"no checkpoint in {folder} is good; remove the folder to start afresh:\n  {listed}")
    return None


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None: every file of the manifest by size and digest."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["size"]:
                return f"{name} has {file.stat().st_size} bytes, expected {expected['size']}"
            if _sha256(file) != expected["sha256"]:
                return f"{name} has another SHA-256 than when it was written"
        missing = {"state.json", "optimizer.safetensors"} - set(manifest)
        if missing:
            return f"{MANIFEST} does not list {sorted(missing)}"
        found = json.loads((path / "state.json").read_text(encoding="utf-8")).get("format")
        return None if found == FORMAT else f"state.json has format {found}, this version reads {FORMAT}"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} can't be read ({error})"


def retain(folder: Path, *, keep_last: int, best_step: int | None) -> None:
    """Rank 0 only. Delete all but the last K and the best, by step number; sweep what crashed saves left."""
    steps = sorted(folder.glob(f"{PREFIX}*"))
    for path in steps[:-keep_last]:
        if path.name != f"{PREFIX}{best_step or -1:08d}":
            doomed = path.with_name(f".tmp-delete-{path.name}")
            os.rename(path, doomed)  # first out of sight: a kill in between leaves no half checkpoint
    sweep(folder)


def sweep(folder: Path) -> None:
    """Rank 0 only. Remove left-over temporary folders; nobody else writes into a run folder."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def checkpoint_bytes(model: torch.nn.Module) -> int:
    """Estimated size: fp32 weights and AdamW's two moments, and room for the small files."""
    return 3 * 4 * sum(p.numel() for p in model.parameters()) + (4 << 20)


def require_space(folder: Path, needed: int) -> None:
    """Raises OSError (ENOSPC) before anything is written."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"{free / 1e6:.0f} MB free, a checkpoint needs {needed / 1e6:.0f} MB", str(folder)
        )


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file as a whole."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _counters(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "loss_count": state.loss_count,
        "nonfinite_run": int(state.nonfinite_run),
        "nonfinite_total": int(state.nonfinite_total),
        "scaler": state.scaler.state_dict(),
        "evaluations": state.evaluations,
    }


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _sha256(path: Path) -> str:
    running = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            running.update(block)
    return running.hexdigest()


def _settle(folder: Path) -> None:
    """Permissions by the umask (safetensors writes 0600), and everything on the disk."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)
        _sync(file)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

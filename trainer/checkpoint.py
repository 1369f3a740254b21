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
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plainloop.data.types import InputError
from plainloop.trainer.manifest import MANIFEST, sha256
from plainloop.trainer.state import TrainState

FORMAT = 2
PREFIX = "step-"
STATE_KEYS = set(
    "step order order_since loss_count loss_sum nonfinite_run nonfinite_total scaler evaluations config"
    " fingerprint surroundings".split()
)


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose manifest was verified, and its state.json."""

    path: Path
    state: dict[str, Any]


def save_checkpoint(
    folder: Path, save_model: Callable[[Path], None], optimizer: dict[str, torch.Tensor],
    state: dict[str, Any], *, size: int, still_ours: Callable[[], None] = lambda: None,
) -> Path:  # fmt: skip
    """Rank 0 only. Write the checkpoint of state["step"] into `folder`; on an error nothing of it is left.

    save_model writes what from_pretrained reads; state is state.json. size: estimated bytes, which must be
    free. still_ours is asked before the checkpoint appears, and raises what ends the run. Raises OSError.
    """
    final = folder / f"{PREFIX}{state['step']:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, size)
    temporary = folder / f".tmp-{final.name}-{os.getpid()}"
    temporary.mkdir()  # not if it is there: somebody else's folder or link is not written into
    try:
        save_model(temporary)
        _save_tensors(optimizer, temporary / "optimizer.safetensors")
        _write_json(temporary / "state.json", {"format": FORMAT, **state})
        manifest = {
            f.name: {"size": f.stat().st_size, "sha256": sha256(f)} for f in sorted(temporary.iterdir())
        }
        _write_json(temporary / MANIFEST, manifest)
        _settle(temporary)
        still_ours()
        if final.exists():  # a damaged one of the same step was set aside before; this one is good
            shutil.rmtree(final)
        os.rename(temporary, final)
        _sync(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if (found := re.search(r"os error (\d+)", str(error))) and not isinstance(error, OSError):
            number = int(found.group(1))  # of Rust: safetensors, tokenizers
            raise OSError(number, os.strerror(number), str(temporary)) from None
        raise
    return final


def restore(state: TrainState, checkpoint: Checkpoint, *, is_main: bool) -> None:
    """All ranks. Everything but the weights, which the model was loaded with. Rank 0 takes the loss sum.

    Raises InputError for a state that is not this model's.
    """
    from safetensors.torch import load_file

    saved = checkpoint.state
    try:
        state.load_optimizer_tensors(load_file(checkpoint.path / "optimizer.safetensors"))
    except ValueError as error:
        raise InputError(f"{checkpoint.path / 'optimizer.safetensors'}: {error}.") from None
    state.step = state.place.step = saved["step"]
    state.order, state.order_since = saved["order"], saved["order_since"]
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
    """What is wrong with a checkpoint folder, or None: every file of the manifest by size and digest.

    Raises OSError when it can't be read just now, which says nothing about the checkpoint.
    """
    try:
        if fault := _foreign(path):
            return fault
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            file = path / name
            if name != Path(name).name or file.is_symlink() or not file.is_file():
                return f"{name} is {'a symbolic link' if file.is_symlink() else 'missing'}"
            if file.stat().st_size != expected["size"]:
                return f"{name} has {file.stat().st_size} bytes, expected {expected['size']}"
            if sha256(file) != expected["sha256"]:
                return f"{name} has another SHA-256 than when it was written"
            if file.suffix == ".safetensors" and (fault := _unreadable(file)):
                return fault
        if missing := {"config.json", "state.json", "optimizer.safetensors"} - set(manifest):
            return f"{MANIFEST} does not list {sorted(missing)}"
        if not any(name.startswith("model") and name.endswith(".safetensors") for name in manifest):
            return f"{MANIFEST} lists no weights"
        return _incomplete(json.loads((path / "state.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} can't be read ({error})"


def _foreign(path: Path) -> str | None:
    """Links and other people's folders are not read: who planted them decides what they hold."""
    if path.is_symlink():
        return "is a symbolic link"
    owner = path.stat().st_uid
    return f"belongs to user {owner}" if owner not in (os.getuid(), path.parent.stat().st_uid) else None


def _unreadable(file: Path) -> str | None:
    """Opens the header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            return None
    except SafetensorError as error:
        return f"{file.name} is no safetensors file ({error})"


def _incomplete(state: dict[str, Any]) -> str | None:
    """What state.json lacks: a counter or the loss scale that began anew would change the run in silence."""
    if state.get("format") != FORMAT:
        return f"state.json has format {state.get('format')}, this version reads {FORMAT}"
    if missing := STATE_KEYS - set(state):
        return f"state.json lacks {', '.join(sorted(missing))}"
    if state["config"]["precision"] == "fp16" and not state["scaler"]:
        return "state.json lacks the loss scale of fp16"
    return None


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
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


def checkpoint_bytes(parameters: int) -> int:
    """Estimated size: fp32 weights and AdamW's two moments, and room for the small files."""
    return 3 * 4 * parameters + (4 << 20)


def require_space(folder: Path, needed: int) -> None:
    """Raises OSError (ENOSPC) before anything is written."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"{free / 1e6:.0f} MB free, a checkpoint needs {needed / 1e6:.0f} MB", str(folder)
        )


def no_follow(path: str, flags: int) -> int:
    """For open(opener=...): an OSError where somebody has put a symbolic link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file as a whole. A link that was planted in its place is replaced, not followed."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with open(temporary, "x", encoding="utf-8", opener=no_follow) as stream:
        stream.write(text)
    os.replace(temporary, path)


def counters(state: TrainState) -> dict[str, Any]:
    """What state.json holds of the state. Waits for the device."""
    return {
        "step": state.step,
        "order": state.order,
        "order_since": state.order_since,
        "loss_count": state.loss_count,
        "nonfinite_run": int(state.nonfinite_run),
        "nonfinite_total": int(state.nonfinite_total),
        "scaler": state.scaler.state_dict(),
        "evaluations": list(state.evaluations),
    }


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _settle(folder: Path) -> None:
    """Permissions by the umask (safetensors writes 0600), and everything on the disk."""
    umask = _umask()
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)
        _sync(file)
    _sync(folder)


def _umask() -> int:
    """Without setting it, on Linux: this may be a thread, and another one create a file meanwhile."""
    if not sys.platform.startswith("linux"):
        umask = os.umask(0)
        os.umask(umask)
        return umask
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1], 8) for line in lines if line.startswith("Umask:"))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

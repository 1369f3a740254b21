"""Checkpoint folders: published atomically, verified on read, no pickle.

RUN/checkpoints/step-00000500/
    config.json, model.safetensors, tokenizer ...   what from_pretrained reads
    optimizer.safetensors                           '<parameter>/<key>' -> tensor
    state.json                                      step, counters, loss scale, evaluations, config
    manifest.json                                   size and SHA-256 of every other file, written last

With checkpoint.keep_optimizer last, a checkpoint kept only as the best loses optimizer.safetensors. Its
manifest then has null there, and a run can't be resumed from it.
A checkpoint is written to a .tmp-* folder, fsynced, and published by one atomic rename.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from plainloop.trainer.config.options import MOMENTS
from plainloop.trainer.errors import InputError
from plainloop.trainer.run_folder.files import (
    MANIFEST,
    describe_file,
    file_fault,
    make_durable,
    rust_errors,
    sync,
)
from plainloop.trainer.run_folder.plain_weights import save_tensors
from plainloop.trainer.run_folder.tensors import (
    SHARD,
    complete_set,
    has_plain_weights,
    open_shards,
    open_tensors,
)
from plainloop.trainer.state import TrainState

FORMAT = 3  # of state.json; `upgrade` reads the one before
PREFIX, OPTIMIZER = "step-", "optimizer.safetensors"
STATE_KEYS = set(
    "step order order_since loss_count loss_sum nonfinite_streak nonfinite_total scaler evaluations config"
    " fingerprint environment".split()
)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder and the contents of its state.json."""

    path: Path
    state: dict[str, Any]


def save_checkpoint(
    folder: Path,
    save_model: Callable[[Path], None],
    optimizer: dict[str, torch.Tensor],
    state: dict[str, Any],
    *,
    size: int,
    require_ownership: Callable[[], None] = lambda: None,
) -> Path:
    """Rank 0 only. Write the checkpoint of state["step"] into `folder`. An error leaves no partial files.

    save_model writes the files that from_pretrained reads; state goes to state.json. size: estimated bytes,
    which must be free on the disk. require_ownership is called before the rename, and raises if this process
    no longer owns the folder, which ends the run. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, size)
    temporary = folder / f".tmp-{PREFIX}{state['step']:08d}-{os.getpid()}"
    temporary.mkdir()  # fails if it exists: never write into someone else's folder or symlink

    def fill(into: Path) -> None:
        save_model(into)
        save_tensors(optimizer, into / OPTIMIZER)

    return publish(temporary, state, fill, require_ownership=require_ownership)


def publish(
    temporary: Path,
    state: dict[str, Any],
    fill: Callable[[Path], None],
    *,
    known: dict[str, dict[str, Any]] | None = None,
    require_ownership: Callable[[], None] = lambda: None,
) -> Path:
    """Rank 0 only. Complete a temporary folder and rename it to the checkpoint of state["step"]. An error
    removes it. fill writes what is missing in it; known: manifest entries of files that are there already.
    """
    folder = temporary.parent
    final = folder / f"{PREFIX}{state['step']:08d}"
    try:
        with rust_errors(temporary):
            fill(temporary)
        _write_json(temporary / "state.json", {"format": FORMAT, **state})
        known = known or {}
        manifest = {f.name: known.get(f.name) or describe_file(f) for f in sorted(temporary.iterdir())}
        _write_json(temporary / MANIFEST, manifest)
        make_durable(temporary)
        require_ownership()
        if final.exists():  # damaged ones were set aside on resume, so this one is good
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def restore(state: TrainState, checkpoint: Checkpoint, *, is_main: bool) -> None:
    """All ranks. Restore everything but the weights, which are already loaded. Rank 0 gets the loss sum.

    Raises InputError if the state does not belong to this model.
    """
    saved = checkpoint.state
    try:
        shards = open_shards(checkpoint.path)
        state.load_optimizer_tensors(
            open_tensors([checkpoint.path / OPTIMIZER]) if shards is None else shards.below("optimizer/")
        )
    except ValueError as error:
        raise InputError(f"{checkpoint.path}: optimizer state: {error}.") from None
    state.step = state.heartbeat.step = saved["step"]
    state.order, state.order_since = saved["order"], saved["order_since"]
    state.evaluations = saved["evaluations"]
    state.loss_count = saved["loss_count"]
    state.loss_sum += saved["loss_sum"] if is_main else 0.0
    state.nonfinite_streak += saved["nonfinite_streak"]
    state.nonfinite_worst += saved["nonfinite_streak"]
    state.nonfinite_total += saved["nonfinite_total"]
    if saved["scaler"]:
        state.scaler.load_state_dict(saved["scaler"])


def newest_good(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """Rank 0 only. Return the newest checkpoint (by step) that verifies; report damaged ones, set them aside.

    Raises InputError if checkpoints exist but none is good: a run never silently starts from scratch.
    """
    reasons: dict[Path, str] = {}
    kept: list[Path] = []
    for path in sorted(folder.glob(f"{PREFIX}*"), reverse=True):
        fault = verify(path)
        if fault is None and not has_optimizer(path):
            kept.append(path)  # as the best, for evaluation
        elif fault is None:
            for damaged, reason in reasons.items():
                report(f"damaged checkpoint set aside: {damaged}: {reason}")
                os.rename(damaged, damaged.with_name(f".bad-{damaged.name}-{os.getpid()}"))
            return Checkpoint(path, upgrade(json.loads((path / "state.json").read_text(encoding="utf-8"))))
        else:
            reasons[path] = fault
    reasons |= {path: "was kept without its optimizer (checkpoint.keep_optimizer last)" for path in kept}
    if reasons:
        listed = "\n  ".join(f"{path}: {reason}" for path, reason in reasons.items())
        raise InputError(f"no checkpoint in {folder} is good; remove the folder to start over:\n  {listed}")
    return None


def upgrade(state: dict[str, Any]) -> dict[str, Any]:
    """Convert state.json from format 2 to format 3. In format 2 the fingerprint hashed the source code of the
    data readers; it can't be compared with today's, so it becomes None.
    """
    if state.get("format") != 2:
        return state
    renamed = {"nonfinite_run": "nonfinite_streak", "surroundings": "environment"}
    return {renamed.get(key, key): value for key, value in state.items()} | {"format": 3, "fingerprint": None}


def verify(path: Path) -> str | None:
    """Check the size and SHA-256 of every file in the manifest. Return what is wrong, or None.

    Raises OSError if the folder can't be read right now, which does not mean that it is damaged.
    """
    try:
        if fault := _foreign(path):
            return fault
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        threads = ThreadPoolExecutor(len(os.sched_getaffinity(0)))  # hashing a file keeps one core busy
        try:
            faults = threads.map(partial(_fault, path), *zip(*manifest.items(), strict=True))
            if fault := next(filter(None, faults), None):
                return fault
        finally:
            threads.shutdown(cancel_futures=True)
        shards = complete_set(manifest)
        optimizer = shards or {OPTIMIZER}
        if missing := {"config.json", "state.json", *optimizer} - set(manifest):
            return f"{MANIFEST} does not list {sorted(missing)}"
        if not has_plain_weights(manifest) and not (shards and has_optimizer(path)):
            return f"{MANIFEST} lists no weights"
        return _incomplete(upgrade(json.loads((path / "state.json").read_text(encoding="utf-8"))))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} can't be read ({error})"


def _fault(path: Path, name: str, expected: dict[str, Any] | None) -> str | None:
    """What is wrong with one file of a checkpoint, given its entry in the manifest."""
    if expected is None:
        return None if holds_optimizer(name) else f"{MANIFEST} does not describe {name}"
    if name != Path(name).name:
        return f"{MANIFEST} names {name}, which is not a file of this folder"
    file = path / name
    try:
        fault = file_fault(file, name, expected)
        if not fault and file.suffix == ".safetensors":
            fault = _unreadable(file)
    except FileNotFoundError:
        fault = f"{name} is missing"
    dropped = fault and holds_optimizer(name) and not has_optimizer(path)  # meanwhile, by retention
    return None if dropped else fault


def _foreign(path: Path) -> str | None:
    """Reject symlinks and folders owned by other users: their contents can't be trusted."""
    if path.is_symlink():
        return "is a symbolic link"
    owner = path.stat().st_uid
    return f"belongs to user {owner}" if owner not in (os.getuid(), path.parent.stat().st_uid) else None


def _unreadable(file: Path) -> str | None:
    """Check the safetensors header only."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):  # "pt" opens it twice; deleted in between: RuntimeError
            return None
    except SafetensorError as error:
        return f"{file.name} is not a safetensors file ({error})"


def _incomplete(state: dict[str, Any]) -> str | None:
    """Return what state.json lacks. Resetting a counter or the loss scale would silently change the run."""
    if state.get("format") != FORMAT:
        return f"state.json has format {state.get('format')}, this version reads {FORMAT}"
    if missing := STATE_KEYS - set(state):
        return f"state.json lacks {', '.join(sorted(missing))}"
    if state["config"]["precision"] == "fp16" and not state["scaler"]:
        return "state.json lacks the fp16 loss scale"
    return None


def has_optimizer(path: Path) -> bool:
    """Whether a run can be resumed from this checkpoint. Raises OSError, ValueError, KeyError."""
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    return all(manifest[name] is not None for name in filter(holds_optimizer, manifest))


def holds_optimizer(name: str) -> bool:
    """Whether a file of a checkpoint has optimizer state: the one of the whole state, or a shard."""
    return name == OPTIMIZER or SHARD.fullmatch(name) is not None


def checkpoint_bytes(parameters: int, optimizer: str) -> int:
    """Estimated bytes: fp32 weights, the state of this optimizer (optim.name), and room for small files."""
    return int((4 + MOMENTS[optimizer]) * parameters) + (4 << 20)


def require_space(folder: Path, needed: int) -> None:
    """Raise OSError (ENOSPC) before writing if fewer than `needed` bytes are free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"{free / 1e6:.0f} MB free, a checkpoint needs {needed / 1e6:.0f} MB", str(folder)
        )


def counters(state: TrainState) -> dict[str, Any]:
    """Return the part of the state that goes to state.json. Waits for the device."""
    return {
        "step": state.step,
        "order": state.order,
        "order_since": state.order_since,
        "loss_count": state.loss_count,
        "nonfinite_streak": int(state.nonfinite_streak),
        "nonfinite_total": int(state.nonfinite_total),
        "scaler": state.scaler.state_dict(),
        "evaluations": list(state.evaluations),
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")

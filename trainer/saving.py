"""Saving that hardly stalls: a copy into host memory, then a thread that writes, hashes and publishes it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plainloop.trainer import checkpoint as checkpoints
from plainloop.trainer.config import CheckpointConfig
from plainloop.trainer.deadline import StopTime
from plainloop.trainer.distributed import World, broadcast_json, sum_over_ranks
from plainloop.trainer.errors import IO, RunError
from plainloop.trainer.hooks import Stopwatch, best_step, due, every_or_epoch
from plainloop.trainer.log import Log
from plainloop.trainer.loop import Progress
from plainloop.trainer.run_folder import RunFolder
from plainloop.trainer.state import Place, TrainState

FULL = (errno.ENOSPC, errno.EDQUOT)
ALIGNMENT = 64  # bytes

Tensors = dict[str, torch.Tensor]


class HostCopy:
    """Copies in host memory, made into the same block of it every time. Tied tensors stay tied.

    For a GPU the block is page-locked, so that the copies run at full speed. torch's own pinned tensors would
    be rounded up to a power of two each, to 1.7 times the size for T5-base.
    """

    def __init__(self) -> None:
        self._block = np.zeros(0, dtype=np.uint8)
        self._pinned = False

    def __call__(self, tensors: Tensors) -> Tensors:
        places: dict[tuple[Any, ...], tuple[int, torch.Tensor]] = {}  # each tensor's first byte in the block
        keys, size = {}, 0
        for name, tensor in tensors.items():
            keys[name] = key = (tensor.data_ptr() or name, tensor.shape, tensor.stride(), tensor.dtype)
            if key not in places:
                places[key] = (size, tensor)
                size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
        self._reserve(size, device)
        copies = {key: self._view(start, tensor) for key, (start, tensor) in places.items()}
        for key, (_, tensor) in places.items():
            copies[key].copy_(tensor, non_blocking=True)
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)
        return {name: copies[key] for name, key in keys.items()}

    def close(self) -> None:
        """Let go of the memory."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._block.ctypes.data)
        self._block, self._pinned = np.zeros(0, dtype=np.uint8), False

    def _reserve(self, size: int, device: torch.device) -> None:
        if size <= len(self._block):
            return
        self.close()
        self._block = np.empty(size, dtype=np.uint8)
        if device.type == "cuda":  # where locking fails, as at a limit of `ulimit -l`, copies are slower
            code = torch.cuda.cudart().cudaHostRegister(self._block.ctypes.data, size, 0)
            self._pinned = int(code) == 0
            if not self._pinned:  # CUDA would raise this error at the next operation
                with contextlib.suppress(RuntimeError):
                    torch.zeros(1, device=device)

    def _view(self, start: int, tensor: torch.Tensor) -> torch.Tensor:
        """A part of the block as a tensor with a storage of its own, so that nothing takes two for shared."""
        part = torch.from_numpy(self._block[start : start + tensor.nbytes])
        return part.view(tensor.dtype).view(tensor.shape)


@dataclass
class Save:
    """One save under way: what it will tell."""

    step: int
    stalled_s: float
    result: Future[tuple[Path, float]]


class SaveCheckpoint:
    """Rank 0 writes when due, at a new best, and at a stop; the others wait only for the last one.

    One save at a time: the next waits for it. A save that fails is told at the next step boundary, and does
    not end the run; but a run never ends well with its last state unwritten.
    """

    def __init__(
        self, folder: RunFolder, save_model: Callable[[Path, Tensors], None], log: Log,
        watch: Stopwatch, world: World, config: CheckpointConfig, *, metric: str, saved_step: int,
        extra: dict[str, Any], stop_time: StopTime,
    ) -> None:  # fmt: skip
        self.folder, self.save_model = folder, save_model
        self.log, self.watch, self.world, self.config = log, watch, world, config
        self.metric, self.extra, self.stop_time = metric, extra, stop_time
        self._warned = False  # of a stop that takes too long
        self.saved_step = saved_step  # the newest on disk, or on its way there
        self.failure: str | None = None  # of the last save
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._copies = HostCopy(), HostCopy()
        self._under_way: Save | None = None
        self._place = Place()

    def __call__(self, progress: Progress) -> None:
        state, self._place = progress.state, progress.state.place
        self._collect(wait=False)
        ending = state.step == progress.total_steps or state.stop is not None
        best = best_step(state.evaluations, self.metric)
        wanted = ending or due(state.step, every_or_epoch(self.config.every_steps, progress), 0)
        if state.step == self.saved_step and not self._under_way and self.world.is_main:
            self._retain_and_point(state.evaluations)  # an evaluation that was made up for may be the best
        if (wanted or best == state.step) and state.step not in (0, self.saved_step):
            self._save(state)
        if ending:
            self._collect(wait=True)
            if failure := broadcast_json(self.failure):
                raise RunError(
                    f"the last checkpoint could not be written: {failure}; make room and start again.", IO
                )

    def reserve(self, state: TrainState) -> None:
        """Take the host memory that saves will need: if there is too little, that shows before training."""
        if self.config.async_ and self.world.is_main:
            self._copies[0](state.model.state_dict())
            self._copies[1](state.optimizer_tensors())

    def close(self) -> None:
        """Join the thread: what is under way is written to its end. For a run that ends by an error."""
        if self._under_way:
            self._wait_for(self._under_way)
        self._thread.shutdown(wait=True)
        for copy in self._copies:
            copy.close()

    def _save(self, state: TrainState) -> None:
        """All ranks sum up the open log line; rank 0 saves."""
        self._require_finite(state)
        window = sum_over_ranks(state.loss_sum.clone()).item()
        if self.world.is_main:
            self.watch.time("save", lambda: self._start(state, {**self.extra, "loss_sum": window}))
        self.saved_step = state.step

    def _require_finite(self, state: TrainState) -> None:
        """All ranks; one host sync. Weights that are broken are never saved."""
        norms = torch._foreach_norm([p.detach() for p in state.model.parameters()])
        if not torch.stack(list(norms)).isfinite().all():
            raise RunError(
                f"the weights are NaN or Inf after step {state.step}, which is not saved;"
                f" continue from the last checkpoint, of step {self.saved_step}."
            )

    def _start(self, state: TrainState, extra: dict[str, Any]) -> None:
        """Rank 0 only. Copy what changes, and hand it to the thread; without `async`, wait for it."""
        started = time.perf_counter()
        self._collect(wait=True)
        weights, optimizer = state.model.state_dict(), state.optimizer_tensors()
        if self.config.async_:
            weights, optimizer = self._copies[0](weights), self._copies[1](optimizer)
        record = {**checkpoints.counters(state), **extra}
        size = sum(t.nbytes for t in [*weights.values(), *optimizer.values()]) + (4 << 20)
        result = self._thread.submit(self._write, weights, optimizer, record, size)
        self._under_way = Save(state.step, time.perf_counter() - started, result)
        if not self.config.async_:
            self._collect(wait=True)

    def _write(
        self, weights: Tensors, optimizer: Tensors, record: dict[str, Any], size: int
    ) -> tuple[Path, float]:
        """In the thread. On a full disk: once more, when the checkpoints are gone that would go after it."""
        started = time.perf_counter()

        def write() -> Path:
            return checkpoints.save_checkpoint(
                self.folder.path / "checkpoints", lambda path: self.save_model(path, dict(weights)),
                optimizer, record, size=size, still_ours=self.folder.still_ours,
            )  # fmt: skip

        try:
            path = write()
        except OSError as error:
            if error.errno not in FULL:
                raise
            self.folder.still_ours()
            self._retain_and_point(record["evaluations"], making_room=True)
            path = write()
        self._retain_and_point(record["evaluations"])
        seconds = time.perf_counter() - started
        self.stop_time.save_s = round(seconds, 3)
        self.folder.progress(step=record["step"], stop_time=asdict(self.stop_time))
        return path, seconds

    def _collect(self, *, wait: bool) -> None:
        """Rank 0 only has one under way. Tell how it ended, if it has (or wait until it has)."""
        save = self._under_way
        if save is None or not (wait or save.result.done()):
            return
        self._wait_for(save)
        self._under_way = None
        try:
            path, seconds = save.result.result()
        except OSError as error:
            self.failure = f"{error.filename or self.folder.path}: {error.strerror or error}"
            self.saved_step = 0  # so the next boundary that wants a save makes one
            self.log.say(f"WARNING: step {save.step}: checkpoint NOT saved: {self.failure}")
            return
        self.failure = None
        self.log.say(f"step {save.step}: saved {path}")
        self.log.record("save", save.step, {"seconds": save.stalled_s, "write_s": seconds})
        if not self._warned and (warning := self.stop_time.too_long(self.config.grace_s)):
            self._warned = True
            self.log.say(warning)

    def _wait_for(self, save: Save) -> None:
        while not save.result.done():  # a long write is no hang
            self._place.tick()
            concurrent.futures.wait([save.result], timeout=1)

    def _retain_and_point(self, evaluations: list[dict[str, Any]], making_room: bool = False) -> None:
        """Rank 0 only. Delete what is no longer kept; RUN/best leads to the best that could be saved."""
        folder = self.folder.path / "checkpoints"
        saved = [r for r in evaluations if (folder / f"{checkpoints.PREFIX}{r['step']:08d}").exists()]
        best = best_step(saved, self.metric)
        if best is not None:  # first the link, so that a reader finds what it leads to
            _point(self.folder.path / "best", Path("checkpoints") / f"{checkpoints.PREFIX}{best:08d}")
        keep = max(1, self.config.keep_last - making_room)
        checkpoints.retain(folder, keep_last=keep, best_step=best)


def _point(link: Path, target: Path) -> None:
    """Replace a symbolic link as a whole."""
    temporary = link.with_name(f".tmp-{link.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)

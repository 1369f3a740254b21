"""Saving that hardly stalls: a copy into host memory, then a thread that writes, hashes and publishes it."""

from __future__ import annotations

import concurrent.futures
import errno
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plainloop.trainer import checkpoint as checkpoints
from plainloop.trainer.config import CheckpointConfig
from plainloop.trainer.distributed import World, broadcast_json, sum_over_ranks
from plainloop.trainer.errors import IO, RunError
from plainloop.trainer.hooks import Stopwatch, best_step, due, every_or_epoch
from plainloop.trainer.log import Log
from plainloop.trainer.loop import Progress
from plainloop.trainer.run_folder import RunFolder
from plainloop.trainer.state import Place, TrainState

FULL = (errno.ENOSPC, errno.EDQUOT)

Tensors = dict[str, torch.Tensor]


class HostCopy:
    """Copies in host memory, made into the same buffers every time. Tied tensors stay tied."""

    def __init__(self) -> None:
        self._buffers: Tensors = {}

    def __call__(self, tensors: Tensors) -> Tensors:
        copies: Tensors = {}
        made: dict[tuple[Any, ...], torch.Tensor] = {}
        for name, tensor in tensors.items():
            same = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if same not in made or not tensor.numel():
                made[same] = self._buffer(name, tensor).copy_(tensor, non_blocking=True)
            copies[name] = made[same]
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return copies

    def _buffer(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        return buffer


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
        extra: dict[str, Any],
    ) -> None:  # fmt: skip
        self.folder, self.save_model = folder, save_model
        self.log, self.watch, self.world, self.config = log, watch, world, config
        self.metric, self.extra = metric, extra
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

    def close(self) -> None:
        """Join the thread: what is under way is written to its end. For a run that ends by an error."""
        if self._under_way:
            self._wait_for(self._under_way)
        self._thread.shutdown(wait=True)

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
        self.folder.progress(step=record["step"], save_s=round(seconds, 3))
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
        if seconds > self.config.grace_s:
            self.log.say(too_slow(seconds, self.config.grace_s))

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


def too_slow(seconds: float, grace_s: float) -> str:
    return (
        f"WARNING: a save takes {seconds:.0f} s, and after a signal there are {grace_s:.0f} s: a stop may"
        " lose the steps since the last checkpoint. Ask for an earlier signal (sbatch --signal), and set"
        " --checkpoint.grace_s to the time it gives."
    )


def _point(link: Path, target: Path) -> None:
    """Replace a symbolic link as a whole."""
    temporary = link.with_name(f".tmp-{link.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)

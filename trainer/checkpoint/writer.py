"""Asynchronous checkpointing: copy to host memory, then write, hash and publish in a thread."""

from __future__ import annotations

import concurrent.futures
import errno
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from plainloop.trainer.checkpoint import folder as checkpoints
from plainloop.trainer.checkpoint.host_copy import HostCopy, Tensors
from plainloop.trainer.checkpoint.retention import retain
from plainloop.trainer.config.options import CheckpointConfig
from plainloop.trainer.distributed.parallel import local
from plainloop.trainer.distributed.world import broadcast_json, sum_over_ranks
from plainloop.trainer.errors import IO, RunError
from plainloop.trainer.run_folder.status import RunFolder
from plainloop.trainer.state import Progress, TrainState, best_step

FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class Save:
    """A save in progress."""

    step: int
    stalled_s: float
    result: Future[Any]  # path of the checkpoint, seconds


class SaveCheckpoint:
    """Rank 0 saves when due, on a new best, and at the end or a stop. Others wait only for the last save.

    Saves don't overlap: the next one waits. A failed save is reported at the next step boundary and does not
    end the run, but a run never exits successfully with its final state unsaved.
    """

    def __init__(
        self,
        progress: Progress,
        folder: RunFolder,
        save_model: Callable[..., None],
        config: CheckpointConfig,
        *,
        metric: str,
        metadata: dict[str, Any],
    ) -> None:
        """save_model(folder, weights=...). metric selects the best checkpoint. metadata: of the run."""
        self.progress, self.folder, self.save_model, self.config = progress, folder, save_model, config
        self.metric, self.metadata, self.world = metric, metadata, progress.world
        self._warned = False  # about a stop that takes too long
        self.saved_step = progress.state.step  # the newest on disk or being written
        self.failure: str | None = None  # why the last save failed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._copies = HostCopy(), HostCopy()
        self.in_progress: Save | None = None

    def __call__(self, progress: Progress) -> None:
        state = progress.state
        self._collect(wait=False)
        ending = state.step == progress.total_steps or state.stop is not None
        best = best_step(state.evaluations, self.metric)
        wanted = ending or progress.due(self.config.every_steps)
        if state.step == self.saved_step and not self.in_progress and self.world.is_main:
            self._retain_and_point(state.evaluations)  # an evaluation repeated on resume may be the best
        if (wanted or best == state.step) and state.step not in (0, self.saved_step):
            self._save(state)
        if ending:
            self._collect(wait=True)
            if failure := broadcast_json(self.failure):
                raise RunError(
                    f"the last checkpoint could not be written: {failure}; free up space and rerun.", IO
                )

    def reserve(self, state: TrainState) -> None:
        """Allocate the host memory for saves now, so that a shortage shows before training starts."""
        if self.config.async_ and self.world.is_main:
            self._copies[0](state.weights())
            self._copies[1](state.optimizer_tensors())

    def close(self) -> None:
        """Finish any save in progress (after an error there may be one) and join the thread."""
        if self.in_progress:
            self._wait_for(self.in_progress)
        self._thread.shutdown(wait=True)
        for copy in self._copies:
            copy.close()

    def _save(self, state: TrainState) -> None:
        """All ranks sum the loss since the last log line; rank 0 saves."""
        self._require_finite(state)
        record = self._record(state)
        if self.world.is_main:
            self.progress.stopwatch.time("save", partial(self._start, state, record))
        self.saved_step = state.step

    def _record(self, state: TrainState) -> dict[str, Any]:
        """All ranks. The content of state.json."""
        window = sum_over_ranks(state.loss_sum.clone()).item()
        return {**checkpoints.counters(state), **self.metadata, "loss_sum": window}

    def _require_finite(self, state: TrainState) -> None:
        """All ranks; one host sync. Raise RunError for NaN or Inf weights, so that they are never saved."""
        norms = torch._foreach_norm([local(p.detach()) for p in state.model.parameters()])
        bad = (~torch.stack(list(norms)).isfinite()).sum()
        if sum_over_ranks(bad).item():
            raise RunError(
                f"the weights contain NaN or Inf after step {state.step}, so it was not saved;"
                f" resume from the last checkpoint (step {self.saved_step})."
            )

    def _start(self, state: TrainState, record: dict[str, Any]) -> None:
        """Rank 0 only. Start a save in the thread, from a host copy; without `async`, no copy, and wait."""
        started = time.perf_counter()
        self._collect(wait=True)
        weights, optimizer = state.weights(), state.optimizer_tensors()
        if self.config.async_:
            weights, optimizer = self._copies[0](weights), self._copies[1](optimizer)
        stored = {(t.data_ptr(), t.nbytes) for t in (*weights.values(), *optimizer.values())}  # tied: once
        size = sum(nbytes for _, nbytes in stored) + (4 << 20)
        result = self._thread.submit(self._write, weights, optimizer, record, size)
        self.in_progress = Save(state.step, time.perf_counter() - started, result)
        if not self.config.async_:
            self._collect(wait=True)

    def _write(
        self, weights: Tensors, optimizer: Tensors, record: dict[str, Any], size: int
    ) -> tuple[Path, float]:
        """Runs in the thread."""
        started, stop_time = time.perf_counter(), self.progress.stop_time
        write = partial(
            checkpoints.save_checkpoint,
            self.folder.path / "checkpoints",
            partial(self.save_model, weights=weights),
            optimizer,
            record,
            size=size,
            require_ownership=self.folder.require_ownership,
        )
        path = self._twice(write, record)
        self._retain_and_point(record["evaluations"])
        seconds = time.perf_counter() - started
        stop_time.save_s = round(seconds, 3)
        self.folder.progress(step=record["step"], stop_time=asdict(stop_time))
        return path, seconds

    def _twice(self, write: Callable[[], Any], record: dict[str, Any]) -> Any:
        """Runs in the thread. On a full disk, delete the checkpoints this one replaces and write again."""
        try:
            return write()
        except OSError as error:
            if error.errno not in FULL:
                raise
        self._make_room(record)
        return write()

    def _make_room(self, record: dict[str, Any]) -> None:
        """Rank 0 only. Delete the checkpoints that this one replaces."""
        self.folder.require_ownership()
        self._retain_and_point(record["evaluations"], make_room=True)

    def _collect(self, *, wait: bool) -> None:
        """Report the result of a finished save (wait=True: wait for it). Only rank 0 has one in progress."""
        save, log = self.in_progress, self.progress.log
        if save is None or not (wait or save.result.done()):
            return
        self._wait_for(save)
        self.in_progress = None
        try:
            path, seconds = save.result.result()
        except OSError as error:
            self.failure = f"{error.filename or self.folder.path}: {error.strerror or error}"
            self.saved_step = 0  # so that the next save that is due is not skipped
            log.say(f"WARNING: step {save.step}: checkpoint NOT saved: {self.failure}")
            return
        self.failure = None
        log.say(f"step {save.step}: saved {path}")
        log.record("save", save.step, {"seconds": save.stalled_s, "write_s": seconds})
        if not self._warned and (warning := self.progress.stop_time.too_long(self.config.grace_s)):
            self._warned = True
            log.say(warning)

    def _wait_for(self, save: Save) -> None:
        while not save.result.done():  # a long write is not a hang
            self.progress.state.heartbeat.tick()
            concurrent.futures.wait([save.result], timeout=1)

    def _retain_and_point(self, evaluations: list[dict[str, Any]], make_room: bool = False) -> None:
        """Rank 0 only. Apply retention and point RUN/best at the best checkpoint on disk."""
        folder = self.folder.path / "checkpoints"
        saved = [r for r in evaluations if (folder / f"{checkpoints.PREFIX}{r['step']:08d}").exists()]
        best = best_step(saved, self.metric)
        if best is not None:  # link first, so that it never dangles
            _point(self.folder.path / "best", Path("checkpoints") / f"{checkpoints.PREFIX}{best:08d}")
        keep = max(1, self.config.keep_last - make_room)
        keep_optimizer = self.config.keep_optimizer == "all"
        retain(folder, keep_last=keep, best_step=best, keep_optimizer=keep_optimizer)


def _point(link: Path, target: Path) -> None:
    """Atomically replace a symbolic link."""
    temporary = link.with_name(f".tmp-{link.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)

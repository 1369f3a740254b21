"""Checkpoints of a sharded model: each rank writes its shard, rank 0 publishes the folder when all have.

RUN/checkpoints/step-00000500/
    shard-00000-of-00004.safetensors ...   'weights/<parameter>', 'optimizer/<parameter>/<key>', some rows
    config.json, tokenizer ...             what from_pretrained reads besides the weights
    model.safetensors ...                  in the best and the last: the weights, for other tools
    state.json, manifest.json              as in a checkpoint that is not sharded
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plainloop.trainer.checkpoint import folder as checkpoints
from plainloop.trainer.checkpoint.host_copy import Tensors
from plainloop.trainer.checkpoint.writer import FULL, Save, SaveCheckpoint
from plainloop.trainer.distributed.parallel import Sharded, local
from plainloop.trainer.distributed.world import all_ranks, broadcast_json
from plainloop.trainer.run_folder.files import describe_file, rust_errors, sync
from plainloop.trainer.run_folder.plain_weights import save_tensors, write_plain
from plainloop.trainer.run_folder.tensors import open_shards, shard_name
from plainloop.trainer.state import TrainState, best_step

RUNNING, DONE, FAILED = range(3)


def shard_tensors(state: TrainState, *, first: bool) -> Tensors:
    """What this rank holds of weights and optimizer state. Only the first shard has what is not split."""
    kept = state.weights().keys()
    parameters = [(n, p) for n, p in state.model.named_parameters() if n in kept]
    held: Tensors = {f"weights/{name}": local(p.detach()) for name, p in parameters}
    whole = {f"weights/{name}": buffer for name, buffer in state.model.named_buffers() if name in kept}
    split = state.split_optimizer_tensors()
    for name, tensor in state.optimizer_tensors().items():
        (held if name in split else whole)[f"optimizer/{name}"] = tensor
    return held | whole if first else held


@dataclass
class Part(Save):
    """This rank's part of a save in progress. publishing: rank 0's next phase, after all shards."""

    record: dict[str, Any] = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)  # that this rank writes
    size: int = 0  # estimated bytes of the checkpoint
    plain: bool = False  # whether it gets weights for other tools
    began: float = 0.0
    temporary: Path = Path()
    again: bool = False  # the second try, after a full disk
    publishing: bool = False


class SaveShards(SaveCheckpoint):
    """All ranks save when due. At each step boundary they compare notes: if all shards are written, rank 0
    publishes the checkpoint in its thread. If one failed on a full disk, all write again; if it failed for
    another reason or twice, the save failed for all.
    """

    def reserve(self, state: TrainState) -> None:
        if self.config.async_ and self._writes():
            self._copies[0](shard_tensors(state, first=self.world.rank == 0))

    def _writes(self) -> bool:
        """Whether this rank writes a shard: of several copies of the model, the first."""
        return self.world.rank < self._shards()

    def _shards(self) -> int:
        parallel = self.progress.state.parallel
        assert isinstance(parallel, Sharded)
        return parallel.shards

    def _save(self, state: TrainState) -> None:
        """All ranks."""
        self._require_finite(state)
        record = self._record(state)
        self.progress.stopwatch.time("save", partial(self._start, state, record))
        self.saved_step = state.step if self.failure is None else 0

    def _start(self, state: TrainState, record: dict[str, Any]) -> None:
        started = time.perf_counter()
        self._collect(wait=True)
        tensors: Tensors = {}
        if self._writes():
            tensors = shard_tensors(state, first=self.world.rank == 0)
            tensors = self._copies[0](tensors) if self.config.async_ else tensors
        sizes = all_ranks(torch.tensor([sum(t.nbytes for t in tensors.values())]))
        best = best_step(record["evaluations"], self.metric) == state.step
        plain = best or state.step == self.progress.total_steps or state.stop is not None
        kept = state.weights().keys()
        weights = sum(4 * p.numel() for name, p in state.model.named_parameters() if name in kept)
        size = int(sizes.sum()) + plain * weights + (4 << 20)
        part = Part(state.step, 0.0, Future(), record, tensors, size, plain, began=started)
        self._write_part(part)
        part.stalled_s = time.perf_counter() - started
        if not self.config.async_:
            self._collect(wait=True)

    def _write_part(self, part: Part) -> None:
        """All ranks. Start writing this rank's shard."""
        temporary = self._prepare(part)
        if temporary is not None:
            part.temporary = temporary
            part.result = self._thread.submit(
                write_shard, temporary, part.tensors, self.world.rank, self._shards()
            )
            self.in_progress = part

    def _prepare(self, part: Part) -> Path | None:
        """All ranks. Rank 0 makes the folder that all write to, and room for the second try. None: the save
        has failed.
        """
        record, size = part.record, part.size
        answer: dict[str, str] = {}
        if self.world.is_main:
            folder = self.folder.path / "checkpoints"
            temporary = folder / f".tmp-{checkpoints.PREFIX}{record['step']:08d}-{os.getpid()}"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    if part.again:
                        self._make_room(record)
                    checkpoints.require_space(folder, size)
                except OSError:
                    self._make_room(record)
                    checkpoints.require_space(folder, size)
                shutil.rmtree(temporary, ignore_errors=True)  # of a failed save of the same step
                temporary.mkdir()
                answer = {"folder": str(temporary)}
            except OSError as error:
                answer = {"error": f"{error.filename or folder}: {error.strerror or error}"}
        answer = broadcast_json(answer)
        if "error" in answer:
            self._failed(record["step"], answer["error"])
            return None
        self.failure = None
        return Path(answer["folder"])

    def _collect(self, *, wait: bool) -> None:
        """All ranks, at every step boundary at which a save is in progress."""
        while isinstance(part := self.in_progress, Part) and not part.publishing:
            if wait:
                self._wait_for(part)
            notes = all_ranks(_note(part.result))
            if (notes[:, 0] == RUNNING).any():
                return
            self._all_wrote(part, notes)
        if part is not None and self.world.is_main:
            super()._collect(wait=wait)

    def _all_wrote(self, part: Part, notes: torch.Tensor) -> None:
        """All ranks have written their shards, or failed to."""
        self.in_progress = None
        errors = {rank: int(note[1]) for rank, note in enumerate(notes) if note[0] == FAILED}
        if self.world.is_main and errors:
            shutil.rmtree(part.temporary, ignore_errors=True)
        if not part.again and any(number in FULL for number in errors.values()):
            part.again = True
            self._write_part(part)
        elif errors:
            reasons = ", ".join(f"rank {rank} ({os.strerror(number)})" for rank, number in errors.items())
            self._failed(part.step, f"{part.temporary.parent}: shard not written by {reasons}")
        elif self.world.is_main:
            part.result = self._thread.submit(self._publish, part, notes[: self._shards(), 2:].tolist())
            part.publishing = True
            self.in_progress = part

    def _failed(self, step: int, reason: str) -> None:
        self.failure, self.saved_step = reason, 0
        self.progress.log.say(f"WARNING: step {step}: checkpoint NOT saved: {reason}")

    def _publish(self, part: Part, notes: list[list[int]]) -> tuple[Path, float]:
        """Runs in rank 0's thread."""
        record = part.record
        count = self._shards()
        known = {shard_name(i, count): _described(note) for i, note in enumerate(notes)}
        path = checkpoints.publish(
            part.temporary,
            record,
            lambda folder: self._twice(partial(self._complete, folder, weights=part.plain), record),
            known=known,
            require_ownership=self.folder.require_ownership,
        )
        self._retain_and_point(record["evaluations"])
        seconds = time.perf_counter() - part.began
        self.progress.stop_time.save_s = round(seconds, 3)
        self.folder.progress(step=record["step"], stop_time=asdict(self.progress.stop_time))
        return path, seconds

    def _complete(self, folder: Path, *, weights: bool) -> None:
        """Write what is not in the shards. An error leaves none of it, so that there is room to go on."""
        before = set(folder.iterdir())
        try:
            with rust_errors(folder):
                self._write_rest(folder, weights=weights)
        except OSError:
            for path in set(folder.iterdir()) - before:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise

    def _write_rest(self, folder: Path, *, weights: bool) -> None:
        if weights and self.progress.state.adapted:  # which are small
            held = open_shards(folder)
            assert held is not None
            held = held.below("weights/")
            self.save_model(folder, weights={name: held.whole(name) for name in held.places})
            return
        self.save_model(folder, weights=None)
        if weights:
            write_plain(folder, folder)


def _note(result: Future[tuple[int, bytes]]) -> torch.Tensor:
    """What a rank tells the others of its shard: (7,) int64: status, errno, size, SHA-256."""
    if not result.done():
        return torch.tensor([RUNNING] + [0] * 6)
    try:
        size, digest = result.result()
    except OSError as error:
        return torch.tensor([FAILED, error.errno or errno.EIO] + [0] * 5)
    words = np.frombuffer(digest or bytes(32), dtype=np.int64)
    return torch.tensor([DONE, 0, size, *words.tolist()])


def _described(note: list[int]) -> dict[str, Any]:
    """The manifest entry of a file, of the size and digest in a note."""
    return {"size": note[0], "sha256": np.array(note[1:], dtype=np.int64).tobytes().hex()}


def write_shard(folder: Path, tensors: Tensors, index: int, count: int) -> tuple[int, bytes]:
    """Runs in the thread of each rank. Return size and SHA-256 of the file; (0, b"") if this rank has none.
    Raises OSError.
    """
    if not tensors:
        return 0, b""
    path = folder / shard_name(index, count)
    save_tensors(tensors, path)
    sync(path)
    description = describe_file(path)
    return description["size"], bytes.fromhex(description["sha256"])

"""Collate rows into padded tensors; iterate over the steps of a run, starting at any step in O(1)."""

from __future__ import annotations

import functools
import itertools
import os
import signal
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from plainloop.data.processes import end_with_parent
from plainloop.data.samplers import (
    MULTIPLES,
    Sampler,
    Widths,
    padded_tokens,
    shard_step,
    to_micro_batches,
    total_lengths,
)
from plainloop.data.store import Store
from plainloop.data.types import IGNORE_INDEX, MicroBatch, StepBatch


class Collate(Protocol):
    """Rows -> MicroBatch, padded to `widths` but to no more than `max_length`. A frozen dataclass."""

    @property
    def max_length(self) -> int: ...

    @property
    def widths(self) -> Widths: ...

    def __call__(self, rows: np.ndarray) -> MicroBatch: ...


@dataclass(frozen=True)
class EncoderCollate:
    """Rows for an encoder -> MicroBatch: input_ids, attention_mask[, token_type_ids] (B, L); labels (B,).

    Padding to a multiple of 8 is capped at max_length. segments: the model takes token_type_ids, which are 1
    from arrays["segment"] on. labels: names of the columns of arrays["label"].
    """

    store: Store
    pad_token_id: int
    max_length: int
    segments: bool
    labels: tuple[str, ...] = ("start", "end")
    widths: Widths = MULTIPLES

    def __call__(self, rows: np.ndarray) -> MicroBatch:
        lengths = self.store.lengths[rows]
        inputs = _padded_inputs(self.store, rows, self.pad_token_id, self.max_length, self.widths)
        position = np.arange(inputs["input_ids"].shape[1])
        if self.segments:
            second = position >= self.store.arrays["segment"][rows][:, None]
            inputs["token_type_ids"] = (second & (position < lengths[:, None])).astype(np.int64)
        label = self.store.arrays["label"][rows].astype(np.int64)
        return MicroBatch(
            {name: torch.from_numpy(array) for name, array in inputs.items()},
            {name: torch.from_numpy(label[:, i].copy()) for i, name in enumerate(self.labels)},
        )


@dataclass(frozen=True)
class TextCollate:
    """Text-to-text rows -> MicroBatch: input_ids, attention_mask (B, S); decoder_input_ids (B, T); scored
    (K,): non-padding positions in B * T; labels target (K,). Padding is never projected to the vocabulary.

    The decoder input is the start token, then the target without its last token.
    """

    store: Store
    pad_token_id: int
    start_token_id: int
    max_length: int
    widths: Widths = MULTIPLES

    def __call__(self, rows: np.ndarray) -> MicroBatch:
        inputs = _padded_inputs(self.store, rows, self.pad_token_id, self.max_length, self.widths)
        targets = [self.store.target(row) for row in rows]
        lengths = np.array([len(ids) for ids in targets])
        width = self.widths.pad(int(lengths.max()), 1, self.max_length)
        decoder = np.full((len(rows), width), self.pad_token_id, dtype=np.int64)
        decoder[:, 0] = self.start_token_id
        for i, ids in enumerate(targets):
            decoder[i, 1 : lengths[i]] = ids[:-1]
        inputs["decoder_input_ids"] = decoder
        inputs["scored"] = np.flatnonzero(np.arange(decoder.shape[1]) < lengths[:, None])
        labels = torch.from_numpy(np.concatenate(targets).astype(np.int64))
        return MicroBatch(
            {name: torch.from_numpy(array) for name, array in inputs.items()}, {"target": labels}
        )


def _padded_inputs(
    store: Store, rows: np.ndarray, pad: int, max_length: int, widths: Widths
) -> dict[str, np.ndarray]:
    """input_ids and attention_mask, (B, L) int64."""
    lengths = store.lengths[rows]
    width = widths.pad(int(lengths.max()), 0, max_length)
    input_ids = np.full((len(rows), width), pad, dtype=np.int64)
    for i, row in enumerate(rows):
        input_ids[i, : lengths[i]] = store.row("input_ids", row)
    return {"input_ids": input_ids, "attention_mask": (np.arange(width) < lengths[:, None]).astype(np.int64)}


class Steps(Dataset[StepBatch]):
    """Item `step` is this rank's StepBatch for that optimizer step: a pure function of the step."""

    def __init__(
        self,
        sampler: Sampler,
        collate: Collate,
        num_targets: np.ndarray,
        *,
        world_size: int,
        rank: int,
        max_tokens: int,
        lockstep: bool = False,
    ) -> None:
        """num_targets: (N,) what each row adds to the divisor of the summed loss. lockstep: every rank gets
        equally many micro-batches, since each pass is a collective operation; empty ones have no weight.
        """
        self.sampler = sampler
        self.collate = collate
        self.num_targets = num_targets
        self.world_size = world_size
        self.rank = rank
        self.max_tokens = max_tokens
        self.lockstep = lockstep
        self.widths = collate.widths

    def __getitem__(self, step: int) -> StepBatch:
        rows, lengths = self.sampler.batch(step), self.sampler.lengths
        shares = self.split(rows)
        micro_batches = [self.collate(share) for share in shares[self.rank]]
        wanted = max(map(len, shares)) if self.lockstep else 1
        while len(micro_batches) < wanted:
            micro_batches.append(self._empty(rows))
        return StepBatch(
            micro_batches,
            num_targets=int(self.num_targets[rows].sum()),
            examples=len(rows),
            tokens=int(lengths[rows].sum()),
            padded_tokens=padded_tokens(itertools.chain(*shares), lengths, self.widths),
            rows=rows,
        )

    def largest(self) -> list[MicroBatch]:
        """The micro-batches that need the most memory: those with the longest rows, the most padded tokens,
        and the most target tokens (each of which has logits), without duplicates.
        """
        lengths, size = self.sampler.lengths, self.sampler.batch_size
        order = np.argsort(-total_lengths(lengths), kind="stable")
        starts = np.flatnonzero(np.diff(total_lengths(lengths)[order], prepend=-1))
        found = [self._cut(order[i : i + size])[0] for i in starts]
        chosen = [found[0], max(found, key=lambda rows: padded_tokens([rows], lengths, self.widths))]
        if lengths.ndim == 2:
            rows = order[np.argsort(-lengths[order, 1], kind="stable")[:size]]
            rows = rows[np.argsort(-total_lengths(lengths[rows]), kind="stable")]
            chosen.append(max(self._cut(rows), key=lambda part: int(lengths[part, 1].sum())))
        distinct = {rows.tobytes(): rows for rows in chosen}
        return [self.collate(rows) for rows in distinct.values()]

    def _cut(self, rows: np.ndarray) -> list[np.ndarray]:
        return to_micro_batches(rows, self.sampler.lengths, max_tokens=self.max_tokens, widths=self.widths)

    def split(self, rows: np.ndarray) -> list[list[np.ndarray]]:
        """The micro-batches of each rank for a global batch."""
        return shard_step(
            rows,
            self.sampler.lengths,
            world_size=self.world_size,
            max_tokens=self.max_tokens,
            widths=self.widths,
        )

    def describe(self) -> str:
        """Steps per epoch, the share of padding in the first epoch, and the widths if there are few."""
        padding = 1 - int(self.sampler.lengths.sum()) / self._padded_tokens_of_epoch
        text = f"{self.sampler.steps_per_epoch} steps per epoch, {padding:.1%} padding"
        if not self.widths.of_part:
            return text
        sets = " x ".join(", ".join(map(str, widths)) for widths in self.widths.of_part)
        return f"{text}; padded to {self.widths.num_shapes} widths: {sets}"

    def passes(self, micro_batch: MicroBatch) -> float:
        """Average number of passes of this size that a rank runs per step."""
        tokens = sum(ids.numel() for name, ids in micro_batch.inputs.items() if name.endswith("input_ids"))
        return self._padded_tokens_of_epoch / self.sampler.steps_per_epoch / self.world_size / tokens

    @functools.cached_property
    def _padded_tokens_of_epoch(self) -> int:
        shares = itertools.chain.from_iterable(map(self.split, self.sampler.epoch_batches(0)))
        return padded_tokens(itertools.chain.from_iterable(shares), self.sampler.lengths, self.widths)

    def _empty(self, rows: np.ndarray) -> MicroBatch:
        """A micro-batch for a rank without rows: the shortest row, with all labels ignored."""
        shortest = rows[[np.argmin(total_lengths(self.sampler.lengths[rows]))]]
        inputs, labels = self.collate(shortest)
        return MicroBatch(
            inputs, {name: torch.full_like(label, IGNORE_INDEX) for name, label in labels.items()}
        )


def step_batches(
    steps: Steps, *, start: int, total: int, workers: int, pin: bool
) -> Generator[StepBatch, None, None]:
    """Yield this rank's batches for steps start ... total - 1. Workers only prefetch; they decide nothing.

    Close the generator: workers ignore the interpreter's termination signal, and it would wait for them.
    """
    loader = DataLoader(
        steps,
        sampler=range(start, total),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        worker_init_fn=functools.partial(_serve_parent, os.getpid()) if workers else None,
    )
    iterator = iter(loader)
    try:
        yield from iterator
    except (EOFError, ConnectionError, FileNotFoundError) as error:
        if not workers or "Caught" in str(error):  # raised by the dataset in a worker
            raise
        # A worker passes its tensors through a connection, which breaks when the worker dies.
        raise RuntimeError(f"DataLoader worker (pid unknown) is gone: {error!r}") from error
    finally:
        if workers:
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def _as_it_is(batch: Any) -> Any:
    """Return the batch unchanged; the DataLoader default converts arrays to tensors."""
    return batch


def _serve_parent(parent: int, _: int) -> None:
    """Ignore signals in a worker; it ends with its rank, however the rank ends.

    torchrun signals the whole process group, and a worker that died from it would end the run too soon.
    """
    end_with_parent(parent=parent)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

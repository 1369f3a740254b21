"""Rows -> padded tensors, and a DataLoader over the steps of a run that starts at any step in O(1)."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from plainloop.data.samplers import Sampler, padded, padded_tokens, split
from plainloop.data.store import Store
from plainloop.data.types import IGNORE_INDEX, MicroBatch, StepBatch

Collate = Callable[[np.ndarray], MicroBatch]


@dataclass(frozen=True)
class SpanCollate:
    """Windows -> MicroBatch: input_ids, attention_mask[, token_type_ids] (B, L); labels start, end (B,).

    max_length bounds the padding to a multiple of 8. segments: the model takes token_type_ids.
    """

    store: Store
    pad_token_id: int
    max_length: int
    segments: bool

    def __call__(self, rows: np.ndarray) -> MicroBatch:
        lengths = self.store.lengths[rows]
        width = padded(int(lengths.max()), self.max_length)
        input_ids = np.full((len(rows), width), self.pad_token_id, dtype=np.int64)
        for i, row in enumerate(rows):
            input_ids[i, : lengths[i]] = self.store.row("input_ids", row)
        position = np.arange(width)
        inputs = {"input_ids": input_ids, "attention_mask": (position < lengths[:, None]).astype(np.int64)}
        if self.segments:
            second = position >= self.store.arrays["segment"][rows][:, None]
            inputs["token_type_ids"] = (second & (position < lengths[:, None])).astype(np.int64)
        label = self.store.arrays["label"][rows].astype(np.int64)
        return MicroBatch(
            {name: torch.from_numpy(array) for name, array in inputs.items()},
            {"start": torch.from_numpy(label[:, 0].copy()), "end": torch.from_numpy(label[:, 1].copy())},
        )


class Steps(Dataset[StepBatch]):
    """Item `step` is this rank's StepBatch of that optimizer step: a pure function, whoever asks."""

    def __init__(
        self,
        sampler: Sampler,
        collate: Collate,
        row_count: np.ndarray,
        *,
        world_size: int,
        rank: int,
        tokens: int,
    ) -> None:
        """row_count: (N,) what each row adds to the count that the loss is divided by."""
        self.sampler = sampler
        self.collate = collate
        self.row_count = row_count
        self.world_size = world_size
        self.rank = rank
        self.tokens = tokens

    def __getitem__(self, step: int) -> StepBatch:
        rows, lengths = self.sampler.batch(step), self.sampler.lengths
        shares = self._split(rows)
        micro_batches = [self.collate(share) for share in shares[self.rank]] or [self._empty(rows)]
        return StepBatch(
            micro_batches,
            divisor=int(self.row_count[rows].sum()),
            examples=len(rows),
            tokens=int(lengths[rows].sum()),
            padded_tokens=padded_tokens(itertools.chain(*shares), lengths),
        )

    def _split(self, rows: np.ndarray) -> list[list[np.ndarray]]:
        return split(rows, self.sampler.lengths, world_size=self.world_size, tokens=self.tokens)

    def padding_share(self) -> float:
        """Share of padding in what the first epoch computes."""
        lengths = self.sampler.lengths
        shares = itertools.chain.from_iterable(map(self._split, self.sampler.epoch_batches(0)))
        return 1 - int(lengths.sum()) / padded_tokens(itertools.chain.from_iterable(shares), lengths)

    def _empty(self, rows: np.ndarray) -> MicroBatch:
        """For a rank without a share: the shortest row with labels that count for nothing."""
        shortest = rows[[np.argmin(self.sampler.lengths[rows])]]
        inputs, labels = self.collate(shortest)
        return MicroBatch(
            inputs, {name: torch.full_like(label, IGNORE_INDEX) for name, label in labels.items()}
        )


def step_batches(steps: Steps, *, start: int, total: int, workers: int, pin: bool) -> Iterator[StepBatch]:
    """This rank's batches of steps start ... total - 1. Workers only fetch ahead; they decide nothing."""
    loader = DataLoader(
        steps,
        sampler=range(start, total),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_signals_to_parent if workers else None,
    )
    return iter(loader)


def _leave_signals_to_parent(_: int) -> None:
    """torchrun signals the whole process group: a worker that died of it would end the run too soon."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

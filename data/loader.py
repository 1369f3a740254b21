"""Rows -> padded tensors, and a DataLoader over the steps of a run that starts at any step in O(1)."""

from __future__ import annotations

import functools
import itertools
import signal
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from plainloop.data.processes import end_with_parent
from plainloop.data.samplers import MULTIPLES, Sampler, Widths, cut, padded_tokens, split, total
from plainloop.data.store import Store
from plainloop.data.types import IGNORE_INDEX, MicroBatch, StepBatch


class Collate(Protocol):
    """Rows -> MicroBatch, padded to `widths`."""

    @property
    def widths(self) -> Widths: ...

    def __call__(self, rows: np.ndarray) -> MicroBatch: ...


@dataclass(frozen=True)
class SpanCollate:
    """Windows -> MicroBatch: input_ids, attention_mask[, token_type_ids] (B, L); labels start, end (B,).

    max_length bounds the padding to a multiple of 8. segments: the model takes token_type_ids.
    """

    store: Store
    pad_token_id: int
    max_length: int
    segments: bool
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
            {"start": torch.from_numpy(label[:, 0].copy()), "end": torch.from_numpy(label[:, 1].copy())},
        )


@dataclass(frozen=True)
class TextCollate:
    """Text-to-text rows -> MicroBatch: input_ids, attention_mask (B, S), decoder_input_ids (B, T); the scored
    positions (K,) in B * T, and their labels, target (K,): what is padding is not even projected.

    The decoder sees the target shifted right behind the start token.
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
        self.widths = collate.widths

    def __getitem__(self, step: int) -> StepBatch:
        rows, lengths = self.sampler.batch(step), self.sampler.lengths
        shares = self._split(rows)
        micro_batches = [self.collate(share) for share in shares[self.rank]] or [self._empty(rows)]
        return StepBatch(
            micro_batches,
            divisor=int(self.row_count[rows].sum()),
            examples=len(rows),
            tokens=int(lengths[rows].sum()),
            padded_tokens=padded_tokens(itertools.chain(*shares), lengths, self.widths),
            rows=rows,
        )

    def largest(self) -> list[MicroBatch]:
        """The micro-batches that need the most memory: of the longest rows; of the most padded tokens; and of
        the most target tokens, each of which has logits. Each only if it is another one.
        """
        lengths, size = self.sampler.lengths, self.sampler.batch_size
        order = np.argsort(-total(lengths), kind="stable")
        starts = np.flatnonzero(np.diff(total(lengths)[order], prepend=-1))
        found = [self._cut(order[i : i + size])[0] for i in starts]
        chosen = [found[0], max(found, key=lambda rows: padded_tokens([rows], lengths, self.widths))]
        if lengths.ndim == 2:
            rows = order[np.argsort(-lengths[order, 1], kind="stable")[:size]]
            rows = rows[np.argsort(-total(lengths[rows]), kind="stable")]
            chosen.append(max(self._cut(rows), key=lambda part: int(lengths[part, 1].sum())))
        distinct = {rows.tobytes(): rows for rows in chosen}
        return [self.collate(rows) for rows in distinct.values()]

    def _cut(self, rows: np.ndarray) -> list[np.ndarray]:
        return cut(rows, self.sampler.lengths, tokens=self.tokens, widths=self.widths)

    def _split(self, rows: np.ndarray) -> list[list[np.ndarray]]:
        return split(
            rows, self.sampler.lengths, world_size=self.world_size, tokens=self.tokens, widths=self.widths
        )

    def describe(self) -> str:
        """Steps of an epoch, the share of padding in what the first one computes, and the widths if few."""
        padding = 1 - int(self.sampler.lengths.sum()) / self._padded_tokens_of_epoch
        text = f"{self.sampler.steps_per_epoch} steps an epoch, {padding:.1%} padding"
        if not self.widths.of_part:
            return text
        sets = " x ".join(", ".join(map(str, widths)) for widths in self.widths.of_part)
        return f"{text}; padded to {self.widths.num_shapes} widths: {sets}"

    def passes(self, micro_batch: MicroBatch) -> float:
        """How many passes of the size of this one a rank makes in a step, on average."""
        tokens = sum(ids.numel() for name, ids in micro_batch.inputs.items() if name.endswith("input_ids"))
        return self._padded_tokens_of_epoch / self.sampler.steps_per_epoch / self.world_size / tokens

    @functools.cached_property
    def _padded_tokens_of_epoch(self) -> int:
        shares = itertools.chain.from_iterable(map(self._split, self.sampler.epoch_batches(0)))
        return padded_tokens(itertools.chain.from_iterable(shares), self.sampler.lengths, self.widths)

    def _empty(self, rows: np.ndarray) -> MicroBatch:
        """For a rank without a share: the shortest row with labels that count for nothing."""
        shortest = rows[[np.argmin(total(self.sampler.lengths[rows]))]]
        inputs, labels = self.collate(shortest)
        return MicroBatch(
            inputs, {name: torch.full_like(label, IGNORE_INDEX) for name, label in labels.items()}
        )


def step_batches(
    steps: Steps, *, start: int, total: int, workers: int, pin: bool
) -> Generator[StepBatch, None, None]:
    """This rank's batches of steps start ... total - 1. Workers only fetch ahead; they decide nothing.

    Close it: they ignore the signal by which the interpreter would end them, and it would wait for them.
    """
    loader = DataLoader(
        steps,
        sampler=range(start, total),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_serve_parent if workers else None,
    )
    iterator = iter(loader)
    try:
        yield from iterator
    except (EOFError, ConnectionError, FileNotFoundError) as error:
        if not workers or "Caught" in str(error):  # the reader's own, in a worker
            raise
        # A worker hands its tensors over through a connection, which ends with it.
        raise RuntimeError(f"DataLoader worker (pid unknown) is gone: {error!r}") from error
    finally:
        if workers:
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def _as_it_is(batch: Any) -> Any:
    """DataLoader would make tensors of arrays."""
    return batch


def _serve_parent(_: int) -> None:
    """torchrun signals the whole process group: a worker that died of it would end the run too soon. It
    ends with its rank, however that ends.
    """
    end_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

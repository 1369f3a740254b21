"""Which rows a step sees, as pure functions: (seed, step) -> global batch -> a rank's micro-batches.

The global batch knows nothing of ranks and workers; only `split` does. So a run on one GPU, on four, or
resumed on two follows the same batches.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

T = TypeVar("T")

PAD_MULTIPLE = 8  # lengths are padded to a multiple of this: what tensor cores want


def padded(length: int, limit: int | None = None) -> int:
    """Length after padding to the multiple, but not beyond `limit` (the model may have no more positions)."""
    rounded = -(-length // PAD_MULTIPLE) * PAD_MULTIPLE
    return rounded if limit is None else max(length, min(rounded, limit))


@dataclass(frozen=True)
class Sampler:
    """Global batches of exactly `batch_size` rows of similar length; the last of an epoch may be short.

    lengths: (N,) tokens of each row, or (N, 2) of source and target. bucket: rows are sorted by length
    inside windows of bucket * batch_size shuffled rows; 0 leaves the shuffled order.
    """

    lengths: np.ndarray
    batch_size: int
    seed: int
    bucket: int = 50
    _epoch: dict[int, list[np.ndarray]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def batch(self, step: int) -> np.ndarray:
        """Rows of the global batch of `step` (counted from 0 over all epochs). Keeps one epoch at hand."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch not in self._epoch:
            self._epoch.clear()
            self._epoch[epoch] = self.epoch_batches(epoch)
        return self._epoch[epoch][index]

    def epoch_batches(self, epoch: int) -> list[np.ndarray]:
        """All global batches of an epoch, in order. O(N log N), 0.1 s for 130,000 rows."""
        random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        order = random.permutation(len(self.lengths))
        if self.bucket:
            size = self.bucket * self.batch_size
            windows = [order[i : i + size] for i in range(0, len(order), size)]
            order = np.concatenate([w[np.argsort(total(self.lengths[w]), kind="stable")] for w in windows])
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        return [batches[i] for i in random.permutation(len(batches))]


def order_digest(before: str, rows: np.ndarray) -> str:
    """A running digest of what was trained on: that of the steps before, and one more global batch."""
    return hashlib.sha256(before.encode() + rows.astype("<i8").tobytes()).hexdigest()


def split(rows: np.ndarray, lengths: np.ndarray, *, world_size: int, tokens: int) -> list[list[np.ndarray]]:
    """Micro-batches of a global batch for each rank.

    Rows go longest first to the rank with the least padded tokens, then each share is cut into micro-batches
    of at most `tokens` padded tokens. An empty share is []: its rank runs a micro-batch without weight.
    """
    order = _longest_first(rows, lengths)
    weights = [sum(map(padded, parts)) for parts in _parts(lengths[order]).tolist()]
    shares = _least_loaded(order, weights, world_size)
    return [cut(np.array(share, dtype=np.int64), lengths, tokens=tokens) for share in shares]


def deal(rows: np.ndarray, lengths: np.ndarray, *, world_size: int, tokens: int) -> list[list[np.ndarray]]:
    """For evaluation: the same micro-batches whatever the number of ranks, dealt out whole by padded tokens.

    So every row is computed in the same company on one rank or on eight, and gives the same bits.
    """
    micro_batches = cut(_longest_first(rows, lengths), lengths, tokens=tokens)
    return _least_loaded(micro_batches, [padded_tokens([m], lengths) for m in micro_batches], world_size)


def cut(rows: np.ndarray, lengths: np.ndarray, *, tokens: int) -> list[np.ndarray]:
    """Rows, longest first -> micro-batches of at most `tokens` padded tokens (one alone may be longer)."""
    micro_batches: list[np.ndarray] = []
    start, widest = 0, [0]
    for i, parts in enumerate(_parts(lengths[rows]).tolist()):
        wider = parts if i == start else [max(pair) for pair in zip(parts, widest, strict=True)]
        if i > start and sum(map(padded, wider)) * (i + 1 - start) > tokens:
            micro_batches.append(rows[start:i])
            start, wider = i, parts
        widest = wider
    return [*micro_batches, rows[start:]] if len(rows) else []


def padded_tokens(micro_batches: Iterable[np.ndarray], lengths: np.ndarray) -> int:
    """Tokens that go through the model, padding included."""
    widest = [(len(rows), _parts(lengths[rows]).max(axis=0).tolist()) for rows in micro_batches]
    return sum(sum(map(padded, parts)) * count for count, parts in widest)


def total(lengths: np.ndarray) -> np.ndarray:
    """(N,) or (N, 2) -> (N,): tokens of a row, source and target together."""
    return _parts(lengths).sum(axis=1)


def subset(count: int, limit: int | None) -> np.ndarray:
    """At most `limit` of `count` indices, in order: drawn once, the same for every seed of training."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.Generator(np.random.Philox(key=0)).permutation(count)[:limit])


def _parts(lengths: np.ndarray) -> np.ndarray:
    """(N,) or (N, P) -> (N, P)."""
    return lengths if lengths.ndim == 2 else lengths[:, None]


def _longest_first(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return rows[np.argsort(-total(lengths[rows]), kind="stable")]


def _least_loaded(items: Iterable[T], weights: Sequence[int], num_bins: int) -> list[list[T]]:
    """Each item in turn to the bin with the least weight so far (the first of equals)."""
    load = [0] * num_bins
    bins: list[list[T]] = [[] for _ in range(num_bins)]
    for item, weight in zip(items, weights, strict=True):
        least = load.index(min(load))
        load[least] += weight
        bins[least].append(item)
    return bins

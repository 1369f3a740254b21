"""Which rows a step sees, as pure functions: (seed, step) -> global batch -> a rank's micro-batches.

The global batch knows nothing of ranks and workers; only `split` does. So a run on one GPU, on four, or
resumed on two follows the same batches.
"""

from __future__ import annotations

import bisect
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
class Widths:
    """What lengths are padded to: to a multiple of 8, or up to one of a few widths.

    of_part: for each part of a row (source, target) its widths, ascending, the largest length among them.
    """

    of_part: tuple[tuple[int, ...], ...] = ()

    def pad(self, length: int, part: int, limit: int | None = None) -> int:
        if not self.of_part:
            return padded(length, limit)
        widths = self.of_part[part]
        return widths[bisect.bisect_left(widths, length)]

    @property
    def num_shapes(self) -> int:
        """Combinations of widths; 0: any."""
        return math.prod(map(len, self.of_part)) if self.of_part else 0

    def total(self, lengths: Sequence[int]) -> int:
        """Padded tokens of a row as long as this in each part."""
        return sum(self.pad(length, part) for part, length in enumerate(lengths))


MULTIPLES = Widths()


def few_widths(lengths: np.ndarray, counts: Sequence[int], limit: int) -> Widths:
    """The widths, at most counts[i] of them for part i, that pad these rows least. lengths: (N,) or (N, P).

    Candidates are the multiples of 8, or `limit` where that is less. Dynamic programming, O(U^2 K) for U
    candidates.
    """
    chosen = []
    for part, count in zip(_parts(lengths).T, counts, strict=True):
        rows = np.array([padded(int(length), limit) for length in part])
        widths, numbers = np.unique(rows, return_counts=True)
        rows_up_to = np.cumsum(numbers)
        tokens = rows_up_to * widths  # of all rows up to a candidate, with that one width
        before: list[np.ndarray] = []  # for each further width: which candidate is the next smaller width
        for _ in range(min(count, len(widths)) - 1):
            choices = tokens[None, :] + (rows_up_to[:, None] - rows_up_to[None, :]) * widths[:, None]
            choices = np.where(np.tri(len(widths), k=-1, dtype=bool), choices, 2**62)
            choices[:, 0] = np.where(np.arange(len(widths)) == 0, tokens[0], choices[:, 0])
            before.append(choices.argmin(axis=1))
            tokens = choices.min(axis=1)
        found = [len(widths) - 1]
        for smaller in reversed(before):
            found.append(int(smaller[found[-1]]))
        chosen.append(tuple(sorted({int(widths[i]) for i in found})))
    return Widths(tuple(chosen))


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


def split(
    rows: np.ndarray, lengths: np.ndarray, *, world_size: int, tokens: int, widths: Widths = MULTIPLES
) -> list[list[np.ndarray]]:
    """Micro-batches of a global batch for each rank.

    Rows go longest first to the rank with the least padded tokens, then each share is cut into micro-batches
    of at most `tokens` padded tokens. An empty share is []: its rank runs a micro-batch without weight.
    """
    order = _longest_first(rows, lengths)
    weights = [widths.total(parts) for parts in _parts(lengths[order]).tolist()]
    shares = _least_loaded(order, weights, world_size)
    return [cut(np.array(share, dtype=np.int64), lengths, tokens=tokens, widths=widths) for share in shares]


def deal(rows: np.ndarray, lengths: np.ndarray, *, world_size: int, tokens: int) -> list[list[np.ndarray]]:
    """For evaluation: the same micro-batches whatever the number of ranks, dealt out whole by padded tokens.

    So every row is computed in the same company on one rank or on eight, and gives the same bits.
    """
    micro_batches = cut(_longest_first(rows, lengths), lengths, tokens=tokens)
    return _least_loaded(micro_batches, [padded_tokens([m], lengths) for m in micro_batches], world_size)


def cut(
    rows: np.ndarray, lengths: np.ndarray, *, tokens: int, widths: Widths = MULTIPLES
) -> list[np.ndarray]:
    """Rows, longest first -> micro-batches of at most `tokens` padded tokens (one alone may be longer)."""
    micro_batches: list[np.ndarray] = []
    start, widest = 0, [0]
    for i, parts in enumerate(_parts(lengths[rows]).tolist()):
        wider = parts if i == start else [max(pair) for pair in zip(parts, widest, strict=True)]
        if i > start and widths.total(wider) * (i + 1 - start) > tokens:
            micro_batches.append(rows[start:i])
            start, wider = i, parts
        widest = wider
    return [*micro_batches, rows[start:]] if len(rows) else []


def padded_tokens(
    micro_batches: Iterable[np.ndarray], lengths: np.ndarray, widths: Widths = MULTIPLES
) -> int:
    """Tokens that go through the model, padding included."""
    longest = [(len(rows), _parts(lengths[rows]).max(axis=0).tolist()) for rows in micro_batches]
    return sum(widths.total(parts) * count for count, parts in longest)


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

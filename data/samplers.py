"""Select the rows of a step, as pure functions: (seed, step) -> global batch -> a rank's micro-batches.

The global batch does not depend on ranks or workers; only `shard_step` does. So a run on one GPU, on four, or
resumed on two sees the same batches.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")

PAD_MULTIPLE = 8  # lengths are padded to a multiple of this, for tensor cores


def padded(length: int, limit: int | None = None) -> int:
    """Round a length up to the multiple, capped at `limit` (the model may have no more positions)."""
    rounded = -(-length // PAD_MULTIPLE) * PAD_MULTIPLE
    return rounded if limit is None else max(length, min(rounded, limit))


@dataclass(frozen=True)
class Widths:
    """Padded lengths: multiples of 8, or a few fixed widths.

    of_part: the widths of each part of a row (source, target), ascending; the last fits the longest row.
    """

    of_part: tuple[tuple[int, ...], ...] = ()

    def pad(self, length: int, part: int, limit: int | None = None) -> int:
        if not self.of_part:
            return padded(length, limit)
        widths = self.of_part[part]
        return widths[bisect.bisect_left(widths, length)]

    @property
    def num_shapes(self) -> int:
        """Number of combinations of widths; 0: unlimited."""
        return math.prod(map(len, self.of_part)) if self.of_part else 0

    def total(self, lengths: Sequence[int]) -> int:
        """Padded tokens of a row with these lengths of its parts."""
        return sum(self.pad(length, part) for part, length in enumerate(lengths))


MULTIPLES = Widths()


def few_widths(lengths: np.ndarray, counts: Sequence[int], limit: int) -> Widths:
    """Choose at most counts[i] widths for part i that minimise padding. lengths: (N,) or (N, P).

    Candidates are multiples of 8, capped at `limit`. Dynamic programming, O(U^2 K) for U candidates and K
    widths.
    """
    chosen = []
    for part, count in zip(_parts(lengths).T, counts, strict=True):
        rows = np.array([padded(int(length), limit) for length in part])
        widths, numbers = np.unique(rows, return_counts=True)
        rows_up_to = np.cumsum(numbers)
        tokens = rows_up_to * widths  # of all rows up to a candidate, all padded to that width
        before: list[np.ndarray] = []  # per added width: index of the next smaller width
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


class Sampler:
    """Global batches of exactly `batch_size` rows of similar length; one batch per epoch may be smaller.

    lengths: (N,) tokens of each row, or (N, 2) of source and target. bucket: rows are sorted by length
    within windows of bucket * batch_size shuffled rows; 0 keeps the shuffled order.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, bucket: int = 50) -> None:
        self.lengths, self.batch_size, self.seed, self.bucket = lengths, batch_size, seed, bucket
        self.steps_per_epoch = math.ceil(len(lengths) / batch_size)
        self._cached: tuple[int, list[np.ndarray]] = (-1, [])  # the last epoch asked for, and its batches

    def batch(self, step: int) -> np.ndarray:
        """Rows of the global batch of `step` (counted from 0 over all epochs)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._cached[0] != epoch:
            self._cached = (epoch, self.epoch_batches(epoch))
        return self._cached[1][index]

    def epoch_batches(self, epoch: int) -> list[np.ndarray]:
        """All global batches of an epoch, in order. O(N log N), 0.1 s for 130,000 rows."""
        random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        order = random.permutation(len(self.lengths))
        if self.bucket:
            sort_window = self.bucket * self.batch_size
            windows = [order[i : i + sort_window] for i in range(0, len(order), sort_window)]
            order = np.concatenate(
                [w[np.argsort(total_lengths(self.lengths[w]), kind="stable")] for w in windows]
            )
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        return [batches[i] for i in random.permutation(len(batches))]


def order_digest(before: str, rows: np.ndarray) -> str:
    """Add a global batch to the running digest of the rows trained on. before: digest of the steps so far."""
    return hashlib.sha256(before.encode() + rows.astype("<i8").tobytes()).hexdigest()


def shard_step(
    rows: np.ndarray, lengths: np.ndarray, *, world_size: int, max_tokens: int, widths: Widths = MULTIPLES
) -> list[list[np.ndarray]]:
    """Split a global batch into micro-batches for each rank.

    Rows go longest first to the rank with the fewest padded tokens; then each share is cut into micro-batches
    of at most `max_tokens` padded tokens. An empty share is []: its rank runs a micro-batch of zero weight.
    """
    order = _longest_first(rows, lengths)
    weights = [widths.total(parts) for parts in _parts(lengths[order]).tolist()]
    shares = _least_loaded(order, weights, world_size)
    return [
        to_micro_batches(np.array(share, dtype=np.int64), lengths, max_tokens=max_tokens, widths=widths)
        for share in shares
    ]


def shard_evaluation(
    rows: np.ndarray, lengths: np.ndarray, *, world_size: int, max_tokens: int
) -> list[list[np.ndarray]]:
    """For evaluation: distribute whole micro-batches over the ranks, balanced by padded tokens.

    The micro-batches are the same for any world size, so each row gives bitwise identical results on one rank
    or on eight.
    """
    micro_batches = to_micro_batches(_longest_first(rows, lengths), lengths, max_tokens=max_tokens)
    return _least_loaded(micro_batches, [padded_tokens([m], lengths) for m in micro_batches], world_size)


def to_micro_batches(
    rows: np.ndarray, lengths: np.ndarray, *, max_tokens: int, widths: Widths = MULTIPLES
) -> list[np.ndarray]:
    """Cut rows, longest first, into micro-batches of at most max_tokens padded tokens (or one long row)."""
    micro_batches: list[np.ndarray] = []
    start, widest = 0, [0]
    for i, parts in enumerate(_parts(lengths[rows]).tolist()):
        wider = parts if i == start else [max(pair) for pair in zip(parts, widest, strict=True)]
        if i > start and widths.total(wider) * (i + 1 - start) > max_tokens:
            micro_batches.append(rows[start:i])
            start, wider = i, parts
        widest = wider
    return [*micro_batches, rows[start:]] if len(rows) else []


def padded_tokens(
    micro_batches: Iterable[np.ndarray], lengths: np.ndarray, widths: Widths = MULTIPLES
) -> int:
    """Tokens processed by the model, including padding."""
    longest = [(len(rows), _parts(lengths[rows]).max(axis=0).tolist()) for rows in micro_batches]
    return sum(widths.total(parts) * count for count, parts in longest)


def total_lengths(lengths: np.ndarray) -> np.ndarray:
    """(N,) or (N, 2) -> (N,): tokens of a row, source and target together."""
    return _parts(lengths).sum(axis=1)


def subset(count: int, limit: int | None) -> np.ndarray:
    """Sample at most `limit` of `count` indices, in order; the sample is the same for every training seed."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.Generator(np.random.Philox(key=0)).permutation(count)[:limit])


def _parts(lengths: np.ndarray) -> np.ndarray:
    """(N,) or (N, P) -> (N, P)."""
    return lengths if lengths.ndim == 2 else lengths[:, None]


def _longest_first(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return rows[np.argsort(-total_lengths(lengths[rows]), kind="stable")]


def _least_loaded(items: Iterable[T], weights: Sequence[int], num_bins: int) -> list[list[T]]:
    """Assign each item in turn to the bin with the least weight so far (ties: the first)."""
    load = [0] * num_bins
    bins: list[list[T]] = [[] for _ in range(num_bins)]
    for item, weight in zip(items, weights, strict=True):
        least = load.index(min(load))
        load[least] += weight
        bins[least].append(item)
    return bins

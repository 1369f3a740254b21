"""Paired statistics for two systems on the same questions.

A score is averaged over questions, but questions about one paragraph are not independent. The bootstrap
resamples whole paragraphs (a cluster bootstrap: Field and Welsh 2007), and, if there are several training
runs of a system, its runs too. Both systems see the same paragraphs in each resample, so the difference is
paired.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CHUNK = 4_000_000  # numbers in one array of weights: 32 MB


class Interval(NamedTuple):
    """difference: the mean of B minus that of A. low, high: the 95 % interval, by percentiles. p: two-sided,
    from the share of resamples on the other side of 0.
    """

    difference: float
    low: float
    high: float
    p: float


def bootstrap(
    a: np.ndarray, b: np.ndarray, unit: np.ndarray, masks: np.ndarray, *, resamples: int, seed: int
) -> list[Interval]:
    """One interval for each of S slices.

    a (RA, N), b (RB, N): the score of each of N questions in each run of A and of B. unit (N,): integers, the
    same for questions that are resampled together. masks (S, N) bool: the questions of each slice, none
    empty. A resample without a question of the slice is left out of its interval.
    """
    runs = np.concatenate([a, b]).astype(float)  # (R, N)
    _, unit = np.unique(unit, return_inverse=True)
    count = int(unit.max()) + 1
    # Sums over the questions of each unit, (U, S * R) and (U, S): all that a resample needs.
    per_slice = [_sums(runs * mask, unit, count) for mask in masks]
    sums = np.concatenate(per_slice, axis=1)
    sizes = _sums(masks.astype(float), unit, count)
    random = np.random.Generator(np.random.Philox(key=seed))
    drawn = []
    for start in range(0, resamples, rows := max(1, CHUNK // count)):
        size = min(rows, resamples - start)
        weights = _weights(random, size, count)
        share = np.concatenate(
            [sign * _shares(random, size, len(side)) for side, sign in ((a, -1), (b, 1))], axis=1
        )  # (size, R): the weight of each run
        with np.errstate(invalid="ignore"):
            means = (weights @ sums).reshape(size, len(masks), len(runs)) / (weights @ sizes)[:, :, None]
        drawn.append((means * share[:, None, :]).sum(axis=2))
    differences = np.concatenate(drawn)  # (resamples, S)
    observed = [float(b[:, mask].mean() - a[:, mask].mean()) for mask in masks]
    return [_interval(seen, column) for seen, column in zip(observed, differences.T, strict=True)]


def _sums(values: np.ndarray, unit: np.ndarray, count: int) -> np.ndarray:
    """(K, N) -> (count, K): sums over the questions of each unit."""
    return np.stack([np.bincount(unit, weights=row, minlength=count) for row in values], axis=1)


def _weights(random: np.random.Generator, size: int, count: int) -> np.ndarray:
    """(size, count): how often each of `count` things is drawn when `count` are drawn with replacement."""
    drawn = random.integers(0, count, size=(size, count))
    drawn += np.arange(size)[:, None] * count
    return np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count).astype(float)


def _shares(random: np.random.Generator, size: int, count: int) -> np.ndarray:
    """(size, count): weights of runs, whose sum is 1, when `count` are drawn with replacement. The variance
    of a mean of so few is too small by (count - 1) / count; the weights are stretched to mend that.
    """
    drawn = _weights(random, size, count) / count
    return 1 / count + (drawn - 1 / count) * math.sqrt(count / (count - 1)) if count > 1 else drawn


def _interval(difference: float, drawn: np.ndarray) -> Interval:
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Interval(difference, difference, difference, 1.0)
    low, high = np.quantile(drawn, [0.025, 0.975])
    # Rounding in sums of F1 must not make a difference of 0 into one of 1e-17.
    tails = [(int((side <= 1e-12).sum()) + 1) / (len(drawn) + 1) for side in (drawn, -drawn)]
    return Interval(difference, float(low), float(high), min(1.0, 2 * min(tails)))


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value of McNemar's test: a binomial test of only_a among both, at 0.5."""
    n, k = only_a + only_b, min(only_a, only_b)
    tail = term = 1  # sum and last term of the binomial coefficients of n over 0 ... k
    for i in range(k):
        term = term * (n - i) // (i + 1)
        tail += term
    # The integers have up to n bits: their logarithms are divided.
    return min(1.0, math.exp(math.log(2 * tail) - n * math.log(2)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values that keep the chance of any false finding below the level (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted

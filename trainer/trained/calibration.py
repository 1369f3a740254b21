"""A calibrated "no answer": the null threshold, and the temperature of the probabilities.

The answer to a question is "" if its score_diff (null score - best score) exceeds the threshold t. Its
candidates have the probabilities softmax([scores, null score - t] / T): at the threshold, the best answer and
"no answer" are equally likely. T, the temperature, is that of Guo et al. 2017 (On Calibration of Modern
Neural Networks).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from plainloop.data.errors import InputError

BINS = 15  # of the expected calibration error, as in Guo et al. 2017
COVERAGE_AT = (80, 90, 95)  # percent


class Judged(NamedTuple):
    """N questions with the scores of their answers.

    scores (N, K): of the candidates with text, best first, -inf where there is none; null (N,): of "no
    answer"; exact, f1 (N,): of the best candidate with text, 0 to 1; answerable (N,) bool.
    """

    scores: np.ndarray
    null: np.ndarray
    exact: np.ndarray
    f1: np.ndarray
    answerable: np.ndarray

    def take(self, chosen: np.ndarray) -> Judged:
        return Judged(*(array[chosen] for array in self))

    @property
    def score_diff(self) -> np.ndarray:
        """(N,): null score - best score; +inf without a candidate with text."""
        return self.null - self.scores[:, 0]


def judged(
    found: Sequence[Mapping[str, Any]],
    exact: Sequence[float],
    f1: Sequence[float],
    answerable: Sequence[bool],
) -> Judged:
    """From the answers of a Predictor, and the scores of each one's best candidate with text."""
    with_text = [[e["score"] for e in one["nbest"] if e["text"]] for one in found]
    scores = np.full((len(found), max(1, *map(len, with_text))), -np.inf)
    for i, row in enumerate(with_text):
        scores[i, : len(row)] = row
    null = np.array([next(e["score"] for e in one["nbest"] if not e["text"]) for one in found])
    return Judged(scores, null, np.array(exact, float), np.array(f1, float), np.array(answerable, bool))


def fit_threshold(questions: Judged, precision: float | None = None) -> float:
    """The threshold with the highest F1, or else the highest with this share of exact ones among the answers
    given. It lies halfway between two score_diffs. Raises InputError if no threshold reaches the precision.
    """
    order = np.argsort(questions.score_diff, kind="stable")
    diff = questions.score_diff[order]
    diff = diff[np.isfinite(diff)]
    n, given = len(diff), np.arange(1, len(diff) + 1)
    kept = order[:n]
    cuts = np.flatnonzero(np.diff(diff, append=np.inf) > 0)  # answer questions 0 ... cut
    if precision is not None:
        reached = np.cumsum(questions.exact[kept]) / given
        if not n or reached[cuts].max() < precision:
            best = f"{reached[cuts].max():.3f}" if n else "none, since there are no answers"
            raise InputError(f"--answer_precision {precision}: no threshold reaches it; highest: {best}.")
        cut = int(cuts[reached[cuts] >= precision][-1])
    else:
        gain = np.cumsum(questions.f1[kept] - ~questions.answerable[kept])
        if not n or gain[cuts].max() <= 0:  # best to answer nothing
            return float(diff[0]) - 1 if n else 0.0
        cut = int(cuts[np.argmax(gain[cuts])])
    return float(diff[cut] + diff[cut + 1]) / 2 if cut + 1 < n else float(diff[-1]) + 1


def fit_temperature(questions: Judged, threshold: float) -> float:
    """The temperature with the lowest mean log loss of "the given answer is exactly right"."""
    right = is_right(questions, threshold)

    def loss(temperature: float) -> float:
        p = np.clip(confidence(questions, threshold, temperature), 1e-6, 1 - 1e-6)
        return float(-np.mean(np.where(right, np.log(p), np.log(1 - p))))

    low, high = 0.05, 50.0
    for _ in range(5):  # each grid is finer by a factor of 12; the last steps are of 0.01 %
        grid = np.geomspace(low, high, 25)
        best = int(np.argmin([loss(temperature) for temperature in grid]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 24)]
    return float(grid[best])


def is_null(questions: Judged, threshold: float) -> np.ndarray:
    """(N,) bool: whether the given answer is "no answer"."""
    return questions.score_diff > threshold


def is_right(questions: Judged, threshold: float) -> np.ndarray:
    """(N,) bool: whether the given answer is exactly right."""
    return np.where(is_null(questions, threshold), ~questions.answerable, questions.exact == 1)


def confidence(questions: Judged, threshold: float, temperature: float) -> np.ndarray:
    """(N,): the probability of the given answer."""
    logits = np.column_stack([questions.null - threshold, questions.scores]) / temperature
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    given = np.where(is_null(questions, threshold), weights[:, 0], weights[:, 1])
    return given / weights.sum(axis=1)


def figures(questions: Judged, threshold: float, temperature: float) -> dict[str, float]:
    """exact and f1 in percent; answered: share of questions with an answer; answer_precision: share of those
    answers that is exactly right; null_auroc: of score_diff, for telling unanswerable questions; ece: the
    expected calibration error, 0 to 1; coverage_at_N: the share of all questions, the most probable answers
    first, that can be answered with N percent of them exactly right.
    """
    nothing, right = is_null(questions, threshold), is_right(questions, threshold)
    p = confidence(questions, threshold, temperature)
    f1 = np.where(nothing, ~questions.answerable, questions.f1)
    scores = {"exact": 100.0 * float(right.mean()), "f1": 100.0 * float(f1.mean())}
    scores["answered"] = float(1 - nothing.mean())
    if not nothing.all():
        scores["answer_precision"] = float(right[~nothing].mean())
    if 0 < questions.answerable.sum() < len(right):
        scores["null_auroc"] = auroc(questions.score_diff, ~questions.answerable)
    scores["ece"] = expected_calibration_error(p, right)
    return scores | {f"coverage_at_{n}": coverage(p, right, n / 100) for n in COVERAGE_AT}


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive scores higher than a negative; ties count half (Mann and Whitney)."""
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[place]
    n = int(positive.sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))


def expected_calibration_error(p: np.ndarray, right: np.ndarray) -> float:
    """Mean distance between probability and share of right answers, over 15 bins of equal width."""
    bins = np.clip(np.ceil(p * BINS).astype(int) - 1, 0, BINS - 1)
    distance = np.bincount(bins, weights=p - right, minlength=BINS)
    return float(np.abs(distance).sum() / len(p))


def coverage(p: np.ndarray, right: np.ndarray, precision: float) -> float:
    """Largest share of questions, by falling probability, of which so many are right. Ties go together."""
    order = np.argsort(-p, kind="stable")
    share = np.cumsum(right[order]) / np.arange(1, len(p) + 1)
    cuts = np.flatnonzero(np.diff(p[order], append=-1) < 0)
    good = cuts[share[cuts] >= precision]
    return float(good[-1] + 1) / len(p) if len(good) else 0.0

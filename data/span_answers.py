"""Decode span logits into answers: the inverse of features. Vectorised numpy, exhaustive over spans.

Two stages: `best_spans` runs on any rank and reduces a batch of logits to a few numbers per window; `answers`
runs once, over all windows of a dataset, and turns those numbers into texts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from plainloop.data.store import Store
from plainloop.data.types import Example


class Spans(NamedTuple):
    """The K best spans of each of B windows, best first; score -inf where a window has fewer.

    row (B,), null (B,) = start[cls] + end[cls], score (B, K), char_start and char_end (B, K) in the context.
    """

    row: np.ndarray
    null: np.ndarray
    score: np.ndarray
    char_start: np.ndarray
    char_end: np.ndarray


class Prediction(NamedTuple):
    """text: "" if the null score beats the best span by more than the threshold. best: best non-null text,
    context[start:end]. score: of the best span, -inf if there is none. score_diff: null score - score.
    """

    text: str
    best: str
    start: int
    end: int
    score: float
    score_diff: float
    nbest: list[dict[str, Any]]


def best_spans(
    logits: np.ndarray, rows: np.ndarray, store: Store, *, max_answer_length: int = 30, num_best: int = 1
) -> Spans:
    """Find the best spans, start <= end < start + max_answer_length, among the context tokens of each window.

    logits: (B, L, 2) float32. Ties: the earlier start, then the shorter span. A span whose tokens cover no
    characters is none: sentencepiece has tokens for a blank that is not there.

    Each of the K best spans starts at one of the K best starts, where a start is ranked by its best end. So
    K * M sums give the exact result (M = max_answer_length). Best ends are a sliding maximum.
    """
    logits = np.nan_to_num(logits, nan=-np.inf, posinf=np.inf, neginf=-np.inf)  # NaN is never best
    context = np.asarray(store.arrays["context"][rows])
    position = np.arange(logits.shape[1])
    outside = (position < context[:, :1]) | (position >= context[:, 1:])
    start = np.where(outside, -np.inf, logits[:, :, 0])
    end = np.where(outside, -np.inf, logits[:, :, 1])
    index = np.arange(len(rows))

    best_end, skip = _sliding_max(end, max_answer_length), _tokens_without_text(store, rows, ~outside)
    for row, token in zip(*np.nonzero(skip), strict=True):  # few, in few vocabularies
        ends = end[row, token + skip[row, token] : token + max_answer_length]
        best_end[row, token] = ends.max(initial=-np.inf)
    best_of_start = start + best_end
    starts = _top(best_of_start, min(num_best, logits.shape[1]))
    starts = np.sort(starts, axis=1)  # the sums below, flattened, are then in tie-break order
    ends = starts[:, :, None] + np.arange(max_answer_length)
    in_range = (ends < logits.shape[1]) & (ends >= (starts + skip[index[:, None], starts])[:, :, None])
    ends = np.minimum(ends, logits.shape[1] - 1)
    sums = np.where(
        in_range, start[index[:, None], starts][:, :, None] + end[index[:, None, None], ends], -np.inf
    )

    sums = sums.reshape(len(rows), sums.shape[1] * sums.shape[2])
    chosen = _top(sums, min(num_best, sums.shape[1]))
    score = np.take_along_axis(sums, chosen, axis=1)
    first = np.take_along_axis(starts, chosen // max_answer_length, axis=1)
    last = first + chosen % max_answer_length
    missing = num_best - score.shape[1]  # a short window has fewer spans than asked for
    score = np.pad(score, ((0, 0), (0, missing)), constant_values=-np.inf)
    first, last = (np.pad(array, ((0, 0), (0, missing))) for array in (first, last))
    valid = np.isfinite(score)
    token = store.starts[rows][:, None]
    offsets = store.arrays["offsets"]
    char_start = np.where(valid, offsets[np.where(valid, token + first, 0), 0], 0)
    char_end = np.where(valid, offsets[np.where(valid, token + last, 0), 1], 0)
    cls = store.arrays["cls"][rows]
    null = logits[index, cls, 0] + logits[index, cls, 1]
    return Spans(rows, null.astype(np.float32), score.astype(np.float32), char_start, char_end)


def _tokens_without_text(store: Store, rows: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(B, L): how many tokens from this one on, itself included, cover no characters. inside: the context."""
    width = inside.shape[1]
    position = np.arange(width)
    last = store.starts[rows] + store.lengths[rows] - 1
    tokens = np.minimum(store.starts[rows][:, None] + position, last[:, None])
    offsets = store.arrays["offsets"][tokens]
    with_text = (offsets[:, :, 1] > offsets[:, :, 0]) & inside
    following = np.where(with_text, position, width)
    following = np.minimum.accumulate(following[:, ::-1], axis=1)[:, ::-1]
    return np.where(inside, following - position, 0)


def _sliding_max(values: np.ndarray, width: int) -> np.ndarray:
    """out[:, i] = max(values[:, i : i + width]), by doubling: log2(width) passes."""
    out, reach = values, 1
    while reach < width:
        shift = min(reach, width - reach)
        shifted = np.full_like(out, -np.inf)
        shifted[:, :-shift] = out[:, shift:]
        out = np.maximum(out, shifted)
        reach += shift
    return out


def _top(values: np.ndarray, k: int) -> np.ndarray:
    """Indices (B, k) of the k largest values in each row, largest first; ties by index."""
    if k == 1:
        return np.argmax(values, axis=1)[:, None]
    if values.shape[1] > 4 * k:  # drop values below the k-th largest; ties keep the lower index
        kth = -np.partition(-values, k - 1, axis=1)[:, k - 1 : k]
        values = np.where(values >= kth, values, -np.inf)
    return np.argsort(-values, axis=1, kind="stable")[:, :k]


def answers(
    spans: Spans,
    examples: Sequence[Example],
    store: Store,
    *,
    threshold: float = 0.0,
    num_best: int = 0,
    temperature: float | None = None,
) -> list[Prediction]:
    """Return one Prediction per example, given the spans of all windows (any order, each exactly once).

    Predicts "" iff score_diff = null - best > threshold. null is the minimum null score over a question's
    windows; best is the maximum span score (ties: the earlier window). Without a valid span, the text is "".
    temperature: of calibrated probabilities, for which the threshold is taken off the null score.
    """
    order = np.argsort(spans.row, kind="stable")
    if not np.array_equal(spans.row[order], np.arange(len(store))):
        raise AssertionError(f"decoded {len(spans.row)} windows, expected each of {len(store)} once")
    spans = Spans(*(array[order] for array in spans))
    first = np.searchsorted(np.asarray(store.arrays["example"]), np.arange(len(examples)))  # window of each
    owner = np.repeat(np.arange(len(examples)), np.diff(first, append=len(store)))
    null = np.minimum.reduceat(spans.null, first).astype(np.float64)
    window_best = spans.score[:, 0]
    best_score = np.maximum.reduceat(window_best, first)
    winners = np.flatnonzero(window_best == best_score[owner])
    window = winners[np.unique(owner[winners], return_index=True)[1]]  # ties: the first
    score_diff = np.subtract(
        null, best_score, where=np.isfinite(best_score), out=np.zeros_like(null)
    ).tolist()
    start, end = spans.char_start[window, 0].tolist(), spans.char_end[window, 0].tolist()
    nbest: Iterable[list[dict[str, Any]]] = itertools.repeat([], len(examples))
    if num_best:
        shift = 0.0 if temperature is None else threshold
        nbest = _nbest(spans, examples, owner, null, num_best, shift, temperature or 1.0)
    predictions = []
    for i, (example, entries) in enumerate(zip(examples, nbest, strict=True)):
        best = example.context[start[i] : end[i]]
        text, score = "" if score_diff[i] > threshold else best, float(best_score[i])
        predictions.append(Prediction(text, best, start[i], end[i], score, score_diff[i], entries))
    return predictions


def _nbest(
    spans: Spans,
    examples: Sequence[Example],
    owner: np.ndarray,
    null: np.ndarray,
    num_best: int,
    shift: float,
    temperature: float,
) -> Iterator[list[dict[str, Any]]]:
    """Yield each example's best spans with distinct texts and its null answer, with softmax probabilities of
    (score / temperature); those of the null answer are lower by `shift`.

    owner (N,): the example of each window; null: one score per example. All spans are sorted at once; the
    texts are extracted one by one.
    """
    flat = np.flatnonzero(np.isfinite(spans.score))
    example_of = owner[flat // spans.score.shape[1]]
    order = np.lexsort((-spans.score.ravel()[flat], example_of))  # stable: ties keep the earlier window
    flat, bounds = flat[order], np.searchsorted(example_of[order], np.arange(len(examples) + 1)).tolist()
    score, start, end = (a.ravel()[flat].tolist() for a in (spans.score, spans.char_start, spans.char_end))
    for i, example in enumerate(examples):
        entries: dict[str, dict[str, Any]] = {}
        for j in range(bounds[i], bounds[i + 1]):
            text = example.context[start[j] : end[j]]
            entries.setdefault(text, {"text": text, "score": score[j], "start": start[j], "end": end[j]})
            if len(entries) == num_best:
                break
        entries[""] = {"text": "", "score": float(null[i])}
        logits = {text: entry["score"] - (0 if text else shift) for text, entry in entries.items()}
        ranked = sorted(entries.values(), key=lambda entry: -logits[entry["text"]])
        top = max(logits.values())
        weights = [math.exp((logits[entry["text"]] - top) / temperature) for entry in ranked]
        total = sum(weights)
        yield [entry | {"probability": w / total} for entry, w in zip(ranked, weights, strict=True)]

"""Decoding compared with a simple exhaustive search; ties by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plainloop.data.span_answers import Spans, answers, best_spans
from plainloop.data.store import Store, build
from plainloop.data.types import Answer, Example


def make_store(
    path: Path, contexts: list[tuple[int, int]], length: int, owners: list[int], empty: Sequence[int] = ()
) -> Store:
    """Windows of equal length; token t covers characters [2t, 2t + 1), or none if it is one of `empty`."""
    n = len(contexts)
    offsets = np.stack([np.arange(length) * 2, np.arange(length) * 2 + 1], axis=1)
    offsets[list(empty), 1] = offsets[list(empty), 0]
    arrays = {
        "input_ids": np.zeros(n * length, dtype=np.int32),
        "offsets": np.tile(offsets, (n, 1)).astype(np.int32),
        "length": np.full(n, length, dtype=np.int32),
        "cls": np.zeros(n, dtype=np.int32),
        "context": np.array(contexts, dtype=np.int32),
        "example": np.array(owners, dtype=np.int32),
    }
    return build(path, lambda writer: writer.append(arrays) or {})


def exhaustive(logits: np.ndarray, low: int, high: int, longest: int) -> list[tuple[float, int, int]]:
    """All spans, best first; ties by start, then by length."""
    spans = [
        (float(logits[i, 0] + logits[j, 1]), i, j)
        for i in range(low, high)
        for j in range(i, min(i + longest, high))
    ]
    return sorted(spans, key=lambda s: (-s[0], s[1], s[2]))


@pytest.mark.parametrize("num_best", [1, 5, 20])
@pytest.mark.parametrize("longest", [1, 4, 30])
@pytest.mark.parametrize("ties", [False, True])
def test_best_spans_match_an_exhaustive_search(
    tmp_path: Path, num_best: int, longest: int, ties: bool
) -> None:
    random = np.random.default_rng(num_best + longest)
    contexts = [(3, 40), (5, 6), (10, 38), (3, 3), (20, 40)]
    store = make_store(tmp_path / "store", contexts, 40, [0, 1, 2, 3, 4])
    logits = random.normal(size=(5, 40, 2)).astype(np.float32)
    if ties:
        logits = logits.round()  # sums of small integers: many exact ties, no rounding
    spans = best_spans(logits, np.arange(5), store, max_answer_length=longest, num_best=num_best)
    for b, (low, high) in enumerate(contexts):
        expected = exhaustive(logits[b], low, high, longest)[:num_best]
        got = [
            (float(s), int(a) // 2, int(e) // 2)
            for s, a, e in zip(spans.score[b], spans.char_start[b], spans.char_end[b], strict=True)
            if np.isfinite(s)
        ]
        assert [g[0] for g in got] == [e[0] for e in expected]
        if not ties or num_best == 1:
            assert got == expected
        assert spans.null[b] == logits[b, 0, 0] + logits[b, 0, 1]


@pytest.mark.parametrize("num_best", [1, 20])
@pytest.mark.parametrize("longest", [1, 2, 7])
def test_a_span_whose_tokens_cover_no_characters_is_no_answer(
    tmp_path: Path, num_best: int, longest: int
) -> None:
    empty = (4, 5, 6, 11, 19)
    store = make_store(tmp_path / "store", [(3, 20), (4, 7), (2, 12)], 20, [0, 1, 2], empty)
    logits = np.random.default_rng(longest).normal(size=(3, 20, 2)).astype(np.float32)
    logits[:, empty] += 3  # what a wrong decoder would choose
    spans = best_spans(logits, np.arange(3), store, max_answer_length=longest, num_best=num_best)
    for b, (low, high) in enumerate([(3, 20), (4, 7), (2, 12)]):
        expected = [
            s
            for s in exhaustive(logits[b], low, high, longest)
            if not set(range(s[1], s[2] + 1)) <= set(empty)
        ]
        found = spans.score[b][np.isfinite(spans.score[b])]
        assert list(found) == [s[0] for s in expected[:num_best]]


def predict(
    tmp_path: Path, spans: Spans, owners: list[int], examples: list[Example], **options: Any
) -> list[Any]:
    store = make_store(tmp_path / "store", [(1, 20)] * len(owners), 20, owners)
    return answers(spans, examples, store, **options)


def spans_of(rows: list[tuple[int, float, float, int, int]]) -> Spans:
    row, null, score, start, end = map(np.array, zip(*rows, strict=True))
    return Spans(row, null, score[:, None], start[:, None], end[:, None])


CASES = [Example("a", "q", "one two three"), Example("b", "q", "four five")]


def test_windows_of_a_question_are_merged_in_any_order(tmp_path: Path) -> None:
    spans = spans_of([(2, 0.0, 3.0, 0, 4), (0, 4.0, 1.0, 0, 3), (1, 2.5, 2.0, 4, 7)])
    first, second = predict(tmp_path, spans, [0, 0, 1], CASES)
    assert (first.text, first.best, first.score_diff) == ("", "two", 0.5)  # lowest null score, best span
    assert (second.text, second.score_diff) == ("four", -3.0)


def test_the_threshold_is_strict(tmp_path: Path) -> None:
    spans = spans_of([(0, 2.0, 2.0, 0, 3), (1, 2.5, 2.0, 0, 4)])
    assert [p.text for p in predict(tmp_path, spans, [0, 1], CASES)] == ["one", ""]
    again = predict(tmp_path, spans, [0, 1], CASES, threshold=0.5)
    assert [p.text for p in again] == ["one", "four"]


def test_earlier_window_wins_a_tie_and_no_span_gives_an_empty_answer(tmp_path: Path) -> None:
    spans = spans_of([(1, 0.0, 2.0, 4, 7), (0, 0.0, 2.0, 0, 3), (2, 1.0, -np.inf, 0, 0)])
    first, second = predict(tmp_path, spans, [0, 0, 1], CASES, num_best=5)
    assert first.text == "one"
    assert (second.text, second.best, second.score_diff) == ("", "", 0.0)
    assert [entry["text"] for entry in first.nbest] == ["one", "two", ""]
    assert sum(float(entry["probability"]) for entry in first.nbest) == pytest.approx(1)
    ratio = float(first.nbest[0]["probability"]) / float(first.nbest[2]["probability"])
    assert ratio == pytest.approx(np.exp(2.0))


def test_missing_or_duplicate_window_is_detected(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="each of 2 once"):
        predict(tmp_path, spans_of([(0, 0.0, 0.0, 0, 3), (0, 0.0, 0.0, 0, 3)]), [0, 1], CASES)


def test_one_token_answer(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", [(1, 20)], 20, [0])
    logits = np.zeros((1, 20, 2), dtype=np.float32)
    logits[0, 7] = 5
    spans = best_spans(logits, np.array([0]), store)
    example = Example("a", "q", "x" * 40, (Answer("x", 14),))
    assert (spans.char_start[0, 0], spans.char_end[0, 0]) == (14, 15)
    assert answers(spans, [example], store)[0].text == "x"


def test_nan_is_never_an_answer_and_does_not_affect_other_rows(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", [(1, 20)] * 2, 20, [0, 1])
    logits = np.zeros((2, 20, 2), dtype=np.float32)
    logits[0] = np.nan
    logits[1, 3] = 5
    broken, fine = answers(best_spans(logits, np.arange(2), store), CASES, store)
    assert (broken.text, fine.best) == ("", CASES[1].context[6:7])

"""The official metrics: published scores of known predictions, and small cases by hand."""

import json
from pathlib import Path

import pytest

from plainloop.data.readers.examples import read_examples
from plainloop.data.types import Answer, Example
from plainloop.trainer.tasks.metrics import squad_scores, token_f1
from plainloop.trainer.tasks.normalize import normalize_answer


def test_published_scores_are_reproduced_to_the_last_digit(real_data: Path) -> None:
    examples = read_examples(real_data / "squad2/dev-v2.0.full-rebuilt.json")
    predictions = json.loads((real_data / "known/bert_dev_predictions.json").read_text())
    scores = squad_scores(examples, predictions)
    assert scores["exact"] == 78.74168280973637
    assert scores["f1"] == 81.77528052374723
    assert list(scores) == [
        "exact", "f1", "total", "HasAns_exact", "HasAns_f1", "HasAns_total",
        "NoAns_exact", "NoAns_f1", "NoAns_total",
    ]  # fmt: skip
    assert (scores["total"], scores["HasAns_total"], scores["NoAns_total"]) == (11873, 5928, 5945)


def test_normalize_answer() -> None:
    assert normalize_answer("The  Cat, a DOG's") == "cat dogs"
    assert (
        normalize_answer("«An» apple—the") == "« » apple—"
    )  # only ASCII punctuation; articles at word boundaries
    assert normalize_answer("A.") == ""


def test_f1_by_hand() -> None:
    assert token_f1("red car", "red car wheel") == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert (token_f1("", ""), token_f1("", "x"), token_f1("x", "")) == (1, 0, 0)


def case(name: str, *texts: str) -> Example:
    return Example(name, "q", "c", tuple(Answer(text, 0) for text in texts))


def test_groups_missing_predictions_and_answers_that_normalize_to_nothing() -> None:
    scores = squad_scores([case("1", "x"), case("2", "the"), case("3")], {"1": "x"})
    assert (scores["exact"], scores["HasAns_exact"], scores["HasAns_total"], scores["NoAns_f1"]) == (
        100,
        100,
        2,
        100,
    )
    assert "NoAns_exact" not in squad_scores([case("1", "x")], {})


def test_best_threshold_by_hand() -> None:
    """Questions sorted by score_diff: right +1, wrong 0, and -1 for answering an unanswerable one."""
    examples = [case("a", "x"), case("b"), case("c", "y"), case("d", "z")]
    odds = {"a": -3.0, "b": -1.0, "c": 2.0, "d": 5.0}
    texts = {"a": "x", "b": "spoken", "c": "y", "d": "wrong"}
    # start 1 (b, correctly unanswered); a: 2; b: 1; c: 2; d: 2 -> the first maximum is 2 of 4, at a
    scores = squad_scores(examples, dict.fromkeys("abcd", ""), score_diff=odds, best_texts=texts)
    assert (scores["best_exact"], scores["best_exact_thresh"]) == (50.0, -3.0)
    assert scores["exact"] == 25.0
    assert list(scores)[-7:] == [
        "best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh",
        "pr_exact_ap", "pr_f1_ap", "pr_oracle_ap",
    ]  # fmt: skip
    silent = squad_scores([case("a", "x"), case("b")], {}, score_diff={"a": 1.0, "b": 0.0}, best_texts={})
    assert (silent["best_exact"], silent["best_exact_thresh"]) == (50.0, 0.0)

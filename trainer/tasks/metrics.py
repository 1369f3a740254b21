"""Metrics, as pure functions. SQuAD 2.0: equal to the official evaluate-v2.0 script to the last digit.

SQuAD formulas: Rajpurkar et al. 2018 and the published script. Percent, 0-100. CausalQA: fractions, 0-1, as
in the published evaluation of Webis-CausalQA-22 (Bondarenko et al. 2022); ROUGE-L from the rouge_score
package.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from plainloop.data.types import Example
from plainloop.trainer.tasks.normalize import SQUAD, Rules, normalize_answer

ROUGE_FIELDS = {"precision": "precision", "recall": "recall", "f1": "fmeasure"}  # ours -> rouge_score's
SQUAD_METRICS = ("exact", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1")
CAUSALQA_METRICS = ("f1", "em", *(f"rougeL_{name}" for name in ROUGE_FIELDS))
# Of the curves of precision and recall over all thresholds: the official script's average precision.
PRECISION_RECALL_METRICS = ("pr_exact_ap", "pr_f1_ap", "pr_oracle_ap")
THRESHOLD_METRICS = ("best_exact", "best_f1", *PRECISION_RECALL_METRICS)


def token_f1(gold: str, predicted: str) -> float:
    """F1 over bags of the tokens of two normalised texts. If either side is empty: 1 if both are, else 0."""
    gold_tokens, predicted_tokens = gold.split(), predicted.split()
    if not gold_tokens or not predicted_tokens:
        return int(gold_tokens == predicted_tokens)
    if set(gold_tokens).isdisjoint(predicted_tokens):
        return 0
    common = sum((Counter(gold_tokens) & Counter(predicted_tokens)).values())
    precision, recall = common / len(predicted_tokens), common / len(gold_tokens)
    return 2 * precision * recall / (precision + recall)


def question_counts(examples: Sequence[Example]) -> dict[str, int]:
    """How many questions are answerable, and how many are not."""
    answerable = sum(bool(example.answers) for example in examples)
    return {"HasAns": answerable, "NoAns": len(examples) - answerable}


def squad_metrics(counts: Mapping[str, int]) -> list[str]:
    """Those of SQUAD_METRICS that `squad_scores` computes for so many questions of each kind."""
    return [name for name in SQUAD_METRICS if counts.get(name.partition("_")[0], 1)]


def threshold_metrics(counts: Mapping[str, int]) -> list[str]:
    """Those of THRESHOLD_METRICS that `squad_scores` computes, given score_diff."""
    return [name for name in THRESHOLD_METRICS if counts["HasAns"] or name not in PRECISION_RECALL_METRICS]


def squad_scores(
    examples: Sequence[Example],
    predictions: Mapping[str, str],
    *,
    score_diff: Mapping[str, float] | None = None,
    best_texts: Mapping[str, str] | None = None,
    threshold: float | None = None,
    rules: Rules = SQUAD,
) -> dict[str, float]:
    """Compute the official metrics, in the official order.

    predictions: id -> text ("" means unanswerable; a missing id counts as ""). score_diff: id -> null score -
    best score, of every example; its order decides between equal ones. It adds best_exact, best_f1 and the
    average precisions, over all thresholds, judged on best_texts (default: predictions). threshold: a
    question whose score_diff exceeds it counts as predicted unanswerable, but not in what score_diff adds.
    """
    exact, f1 = per_question(examples, predictions, rules)
    answerable = {e.id: bool(e.answers) for e in examples}
    kept_exact, kept_f1 = (_below(values, answerable, score_diff, threshold) for values in (exact, f1))
    scores = _averages("", kept_exact, kept_f1, list(answerable))
    for prefix, kind in (("HasAns_", True), ("NoAns_", False)):
        if ids := [i for i, has_answer in answerable.items() if has_answer == kind]:
            scores |= _averages(prefix, kept_exact, kept_f1, ids)
    if score_diff is not None:
        if best_texts is not None:
            exact, f1 = per_question(examples, best_texts, rules)
        odds = {i: value for i, value in score_diff.items() if i in answerable}
        scores |= _over_thresholds(answerable, exact, f1, best_texts or predictions, odds)
    return scores


def per_question(
    examples: Sequence[Example], predictions: Mapping[str, str], rules: Rules
) -> tuple[dict[str, float], dict[str, float]]:
    """Exact match (0 or 1) and F1 (0 to 1) of each question, by id. A missing prediction counts as ""."""
    exact: dict[str, float] = {}
    f1: dict[str, float] = {}
    for example in examples:
        golds = rules.golds(example)
        predicted = rules.normalize(predictions.get(example.id, ""))
        exact[example.id] = int(predicted in golds)
        if not predicted and example.answers and not rules.empty_f1:
            f1[example.id] = 0
        else:  # an exact match has an F1 of exactly 1
            f1[example.id] = exact[example.id] or max(token_f1(gold, predicted) for gold in golds)
    return exact, f1


def _below(
    values: dict[str, float],
    answerable: Mapping[str, bool],
    score_diff: Mapping[str, float] | None,
    threshold: float | None,
) -> dict[str, float]:
    """The scores, but of questions whose score_diff exceeds the threshold: that of the answer ""."""
    if score_diff is None or threshold is None:
        return values
    return {i: float(not answerable[i]) if score_diff[i] > threshold else v for i, v in values.items()}


def _averages(
    prefix: str, exact: dict[str, float], f1: dict[str, float], ids: Sequence[str]
) -> dict[str, float]:
    return {
        f"{prefix}exact": 100.0 * sum(exact[i] for i in ids) / len(ids),
        f"{prefix}f1": 100.0 * sum(f1[i] for i in ids) / len(ids),
        f"{prefix}total": len(ids),
    }


def _over_thresholds(
    answerable: Mapping[str, bool],
    exact: dict[str, float],
    f1: dict[str, float],
    texts: Mapping[str, str],
    score_diff: Mapping[str, float],
) -> dict[str, float]:
    """What the official script computes from all thresholds on score_diff. Ties are in its order."""
    scores: dict[str, float] = {}
    ids = sorted(score_diff, key=lambda i: score_diff[i])
    for name, values in (("exact", exact), ("f1", f1)):
        best = _best(ids, answerable, values, texts, score_diff)
        scores[f"best_{name}"], scores[f"best_{name}_thresh"] = best
    if any(answerable.values()):
        oracle = {i: float(has_answer) for i, has_answer in answerable.items()}
        for name, values in (("exact", exact), ("f1", f1), ("oracle", oracle)):
            scores[f"pr_{name}_ap"] = average_precision(precision_recall(ids, answerable, values, score_diff))
    return scores


def _best(
    ids: Sequence[str],
    answerable: Mapping[str, bool],
    raw: dict[str, float],
    texts: Mapping[str, str],
    score_diff: Mapping[str, float],
) -> tuple[float, float]:
    """Best mean score over all thresholds on score_diff, and the first threshold that reaches it.

    Start with "" for every question, then switch questions to their predicted text in order of score_diff.
    """
    current: float = sum(not value for value in answerable.values())
    best, threshold = current, 0.0
    for i in ids:
        current += raw[i] if answerable[i] else (-1 if texts.get(i) else 0)
        if current > best:
            best, threshold = current, score_diff[i]
    return 100.0 * best / len(answerable), threshold


def average_precision(points: Sequence[tuple[float, float]]) -> float:
    """Area under the points of `precision_recall`, as a sum of steps; percent."""
    recall, area = 0.0, 0.0
    for next_recall, precision in points:
        area += precision * (next_recall - recall)
        recall = next_recall
    return 100.0 * area


def precision_recall(
    ids: Sequence[str],
    answerable: Mapping[str, bool],
    raw: Mapping[str, float],
    score_diff: Mapping[str, float],
) -> list[tuple[float, float]]:
    """(recall, precision), each 0 to 1, at every threshold on score_diff; ids: sorted by it. Questions with
    equal score_diff are answered together. A partly right answer counts as its score in both.
    """
    total, correct = sum(answerable.values()), 0.0
    points = []
    for count, i in enumerate(ids, start=1):
        correct += raw[i] if answerable[i] else 0
        if count == len(ids) or score_diff[i] != score_diff[ids[count]]:
            points.append((correct / total, correct / count))
    return points


def causalqa_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, bootstrap: bool = False
) -> dict[str, float]:
    """Mean f1, em and ROUGE-L over the examples, each against the example's best reference.

    Texts are normalised as for SQuAD. f1 is 0 if either side is empty. The reference with the highest ROUGE-L
    f-measure (the first on ties) gives precision, recall and f-measure. bootstrap: ROUGE-L as the median of
    1,000 bootstrap resamples with numpy seed 42, as the published code prints it.
    """
    exact, f1, rouge = per_text(predictions, references)
    scores = {"f1": sum(f1) / len(f1), "em": sum(exact) / len(exact)}
    return scores | (_rouge_medians(rouge) if bootstrap else _rouge_means(rouge))


def per_text(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[int], list[float], list[Any]]:
    """Exact match, F1 and ROUGE-L (rouge_score's Score) of each CausalQA example."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    exact, f1, rouge = [], [], []
    for prediction, golds in zip(predictions, references, strict=True):
        predicted = normalize_answer(prediction)
        normal = list(dict.fromkeys(normalize_answer(gold) for gold in golds))
        if predicted in normal:
            normal = [predicted]  # nothing can be better, and ROUGE-L on long texts takes milliseconds
        exact.append(int(predicted in normal))
        f1.append(max(token_f1(gold, predicted) if gold and predicted else 0 for gold in normal))
        rouge.append(
            max((scorer.score(gold, predicted)["rougeL"] for gold in normal), key=lambda s: s.fmeasure)
        )
    return exact, f1, rouge


def _rouge_means(scores: Sequence[Any]) -> dict[str, float]:
    return {
        f"rougeL_{name}": sum(getattr(s, of) for s in scores) / len(scores)
        for name, of in ROUGE_FIELDS.items()
    }


def _rouge_medians(scores: Sequence[Any]) -> dict[str, float]:
    import numpy as np
    from rouge_score import scoring

    aggregator = scoring.BootstrapAggregator(n_samples=1000)
    for score in scores:
        aggregator.add_scores({"rougeL": score})
    before = np.random.get_state()
    np.random.seed(42)  # the aggregator uses numpy's global generator
    try:
        middle = aggregator.aggregate()["rougeL"].mid
    finally:
        np.random.set_state(before)
    return {f"rougeL_{name}": float(getattr(middle, of)) for name, of in ROUGE_FIELDS.items()}

"""Metrics, as pure functions. SQuAD 2.0: equal to the official evaluate-v2.0 script to the last digit.

SQuAD formulas: Rajpurkar et al. 2018 and the published script. Percent, 0-100. CausalQA: fractions, 0-1, as
in the published evaluation of Webis-CausalQA-22 (Bondarenko et al. 2022); ROUGE-L from the rouge_score
package.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from plainloop.data.types import Example

_ARTICLES = re.compile(r"\b(a|an|the)\b")
ROUGE_FIELDS = {"precision": "precision", "recall": "recall", "f1": "fmeasure"}  # ours -> rouge_score's
SQUAD_METRICS = ("exact", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1")
CAUSALQA_METRICS = ("f1", "em", *(f"rougeL_{name}" for name in ROUGE_FIELDS))
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@lru_cache(maxsize=1 << 16)
def normalize_answer(text: str) -> str:
    """Lower-case, remove ASCII punctuation, remove articles, collapse whitespace, in this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(gold: str, predicted: str) -> int:
    return int(normalize_answer(gold) == normalize_answer(predicted))


def token_f1(gold: str, predicted: str) -> float:
    """F1 over bags of normalised tokens. If either side is empty: 1 if both are, else 0."""
    gold_tokens, predicted_tokens = normalize_answer(gold).split(), normalize_answer(predicted).split()
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


def squad_scores(
    examples: Sequence[Example],
    predictions: Mapping[str, str],
    *,
    score_diff: Mapping[str, float] | None = None,
    best_texts: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Compute the official metrics, in the official order.

    predictions: id -> text ("" means unanswerable; a missing id counts as ""). score_diff (id -> null score -
    best score) adds best_exact and best_f1 over all thresholds, judged on best_texts (default: predictions).
    """
    exact, f1 = _per_question(examples, predictions)
    scores = _averages("", exact, f1, [e.id for e in examples])
    for prefix, answerable in (("HasAns_", True), ("NoAns_", False)):
        ids = [e.id for e in examples if bool(e.answers) == answerable]
        if ids:
            scores |= _averages(prefix, exact, f1, ids)
    if score_diff is not None:
        texts = predictions if best_texts is None else best_texts
        raw = dict(
            zip(("exact", "f1"), _per_question(examples, texts) if best_texts else (exact, f1), strict=True)
        )
        for name, values in raw.items():
            scores[f"best_{name}"], scores[f"best_{name}_thresh"] = _best(examples, values, texts, score_diff)
    return scores


def _per_question(
    examples: Sequence[Example], predictions: Mapping[str, str]
) -> tuple[dict[str, float], dict[str, float]]:
    exact: dict[str, float] = {}
    f1: dict[str, float] = {}
    for example in examples:
        golds = {normalize_answer(a.text) for a in example.answers} - {""} or {""}
        predicted = predictions.get(example.id, "")
        exact[example.id] = int(normalize_answer(predicted) in golds)
        # An exact match has an F1 of exactly 1. Normalising the golds again changes nothing.
        f1[example.id] = exact[example.id] or max(token_f1(gold, predicted) for gold in golds)
    return exact, f1


def _averages(
    prefix: str, exact: dict[str, float], f1: dict[str, float], ids: Sequence[str]
) -> dict[str, float]:
    return {
        f"{prefix}exact": 100.0 * sum(exact[i] for i in ids) / len(ids),
        f"{prefix}f1": 100.0 * sum(f1[i] for i in ids) / len(ids),
        f"{prefix}total": len(ids),
    }


def _best(
    examples: Sequence[Example],
    raw: dict[str, float],
    texts: Mapping[str, str],
    score_diff: Mapping[str, float],
) -> tuple[float, float]:
    """Best mean score over all thresholds on score_diff, and the first threshold that reaches it.

    Start with "" for every question, then switch questions to their predicted text in order of score_diff.
    """
    answerable = {e.id: bool(e.answers) for e in examples}
    current: float = sum(not value for value in answerable.values())
    best, threshold = current, 0.0
    for i in sorted(answerable, key=lambda i: score_diff.get(i, 0.0)):
        current += raw[i] if answerable[i] else (-1 if texts.get(i) else 0)
        if current > best:
            best, threshold = current, score_diff.get(i, 0.0)
    return 100.0 * best / len(answerable), threshold


def causalqa_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, bootstrap: bool = False
) -> dict[str, float]:
    """Mean f1, em and ROUGE-L over the examples, each against the example's best reference.

    Texts are normalised as for SQuAD. f1 is 0 if either side is empty. The reference with the highest ROUGE-L
    f-measure (the first on ties) gives precision, recall and f-measure. bootstrap: ROUGE-L as the median of
    1,000 bootstrap resamples with numpy seed 42, as the published code prints it.
    """
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
    scores = {"f1": sum(f1) / len(f1), "em": sum(exact) / len(exact)}
    return scores | (_rouge_medians(rouge) if bootstrap else _rouge_means(rouge))


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

"""Figures of one evaluation or of several: thresholds, probabilities, and scores by kind of question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plainloop.trainer.report.results import Questions, Results
from plainloop.trainer.report.slices import KINDS, labels
from plainloop.trainer.report.svg import PALETTE, pyplot, style_of
from plainloop.trainer.tasks.metrics import average_precision, per_question, precision_recall
from plainloop.trainer.tasks.normalize import Rules
from plainloop.trainer.trained.calibration import expected_calibration_error

RELIABILITY_BINS = 10


@dataclass(frozen=True)
class Thresholds:
    """What depends on the threshold on the null odds: (N,) arrays, by rising odds.

    curves: points of precision over recall, by figure. mean: the figure in percent when so many of the first
    questions are answered. chosen: the threshold of the predictions, if known. complete: whether the best
    answer with text is known of all questions; else curves has the oracle's alone, and mean ends at `chosen`.
    """

    name: str
    odds: np.ndarray
    answerable: np.ndarray
    curves: dict[str, list[tuple[float, float]]]
    mean: dict[str, np.ndarray]
    chosen: float | None
    complete: bool


def thresholds(one: Results, questions: Questions, rules: Rules, chosen: float | None) -> Thresholds:
    """Computed as the official script does, so that areas and maxima are its own. The results need odds."""
    assert one.odds is not None
    examples, texts = questions.examples, best_texts(one)
    complete = one.nbest is not None or all(texts)
    by_id = {e.id: text for e, text in zip(examples, texts, strict=True)}
    scores = dict(zip(("exact", "f1"), per_question(examples, by_id, rules), strict=True))
    answerable = {e.id: bool(e.answers) for e in examples}
    odds = {e.id: float(value) for e, value in zip(examples, one.odds, strict=True)}
    ids = sorted(odds, key=lambda i: odds[i])
    raw = {**(scores if complete else {}), "oracle": {i: float(has) for i, has in answerable.items()}}
    curves = {}
    if any(answerable.values()):
        curves = {name: precision_recall(ids, answerable, values, odds) for name, values in raw.items()}
    nothing = sum(not has for has in answerable.values())
    known = [i for i in ids if complete or (chosen is not None and odds[i] <= chosen)]
    mean = {}
    for name, values in scores.items():
        gain = [values[i] if answerable[i] else (-1 if by_id[i] else 0) for i in known]
        mean[name] = 100.0 * (nothing + np.cumsum(gain)) / len(ids)
    sorted_odds, sorted_answerable = (np.array([of[i] for i in ids]) for of in (odds, answerable))
    return Thresholds(one.name, sorted_odds, sorted_answerable, curves, mean, chosen, complete)


def best_texts(one: Results) -> list[str]:
    """The best answer with text of each question; that of the predictions where no others are known."""
    if one.nbest is None:
        return [text or "" for text in one.texts]
    return [
        next((entry["text"] for entry in of if entry["text"]), text or "")
        for of, text in zip(one.nbest, one.texts, strict=True)
    ]


def threshold_figure(found: Sequence[Thresholds]) -> Any:
    """Precision over recall; the null odds of both kinds of question; exact and F1 over the threshold."""
    plt = pyplot()
    count = len(found)
    figure, axes = plt.subplots(count, 3, figsize=(10, 3.2 * count), layout="constrained", squeeze=False)
    for (curve, histogram, over), one in zip(axes, found, strict=True):
        for number, (name, points) in enumerate(one.curves.items()):
            x, y = np.array([(0.0, 1.0), *points]).T
            title = f"{name} (average precision {average_precision(points):.2f})"
            curve.step(100 * x, 100 * y, where="pre", color=PALETTE[number], label=title)
        curve.set(xlabel="recall, %", ylabel="precision, %", xlim=(0, 100), ylim=(0, 103))
        curve.set_title("precision over recall" + f", {one.name}" * (count > 1))
        finite = one.odds[np.isfinite(one.odds)]
        low, high = np.quantile(finite, [0.005, 0.995]) if len(finite) else (-1, 1)
        for has, name, colour in ((True, "answerable", PALETTE[0]), (False, "no answer", PALETTE[1])):
            of = np.clip(finite[one.answerable[np.isfinite(one.odds)] == has], low, high)
            if len(of):
                weights = np.full(len(of), 100 / len(of))
                histogram.hist(
                    of, 40, range=(low, high), weights=weights, color=colour, alpha=0.5, label=name
                )
        histogram.set(xlabel="null odds: score of no answer - best", ylabel="% of the questions of a kind")
        histogram.set_title("how sure that there is no answer")
        for number, (name, values) in enumerate(one.mean.items()):
            odds = one.odds[: len(values)]
            shown = (odds >= low) & (odds <= high)
            over.plot(odds[shown], values[shown], color=PALETTE[number], label=name)
            if one.complete:
                best = int(np.argmax(values))
                over.plot(odds[best], values[best], "o", color=PALETTE[number], label=f"best {name}")
        over.set(xlabel="threshold on the null odds", ylabel="%", title="scores over the threshold")
        for axis in (histogram, over):
            if one.chosen is not None:
                label = f"chosen: {one.chosen:.3g}"
                axis.axvline(one.chosen, color=PALETTE[2], linestyle="--", label=label)
        for axis in (curve, histogram, over):
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8)
    return figure


def probabilities(one: Results, questions: Questions) -> tuple[np.ndarray, np.ndarray] | None:
    """Of the questions whose n-best list has the given answer: its probability, and whether it is exactly
    right. None if there are none.
    """
    if one.nbest is None:
        return None
    p, right = answer_probabilities(one), one.scores[questions.figures[0]] == questions.scale
    known = np.isfinite(p)
    return (p[known], right[known]) if known.any() else None


def answer_probabilities(one: Results) -> np.ndarray:
    """(N,) the probability of the given answer; NaN where the n-best list lacks it."""
    found = []
    for of, text in zip(one.nbest or (), one.texts, strict=True):
        values = [entry.get("probability") for entry in of if entry["text"] == text]
        found.append(values[0] if values and isinstance(values[0], (int, float)) else np.nan)
    return np.array(found, float)


def probability_figure(found: dict[str, tuple[np.ndarray, np.ndarray]]) -> Any:
    """Reliability, and the risk at each coverage. found: name -> probability (N,), right (N,) bool."""
    plt = pyplot()
    figure, (reliability, risk) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    reliability.plot([0, 1], [0, 1], color=PALETTE[2], linestyle="--", label="calibrated")
    for number, (name, (p, right)) in enumerate(found.items()):
        colour, line = style_of(number)
        place = np.clip((p * RELIABILITY_BINS).astype(int), 0, RELIABILITY_BINS - 1)
        held = np.unique(place)
        means = [(p[place == b].mean(), right[place == b].mean()) for b in held]
        error = expected_calibration_error(p, right)
        title = (
            f"{name}: calibration error {error:.3f}" if len(found) > 1 else f"calibration error {error:.3f}"
        )
        reliability.plot(*np.array(means).T, "o", color=colour, linestyle=line, label=title)
        order = np.argsort(-p, kind="stable")
        count = np.arange(1, len(p) + 1)
        risk.plot(
            count / len(p), 1 - np.cumsum(right[order]) / count, color=colour, linestyle=line, label=name
        )
    reliability.set(
        xlabel="probability of the answer", ylabel="share that is exactly right", title="reliability"
    )
    risk.set(xlabel="coverage: share of questions, most probable first", ylabel="share that is wrong",
             title="risk over coverage", ylim=(0, None))  # fmt: skip
    reliability.legend(fontsize=8)
    if len(found) > 1:
        risk.legend(fontsize=8)
    return figure


def slice_figure(all_of: Sequence[Results], questions: Questions) -> Any:
    """Each figure by answer length, question word and context length, with the number of questions."""
    plt = pyplot()
    names, kinds = questions.figures, ("answer length", "question word", "context length")
    figure, axes = plt.subplots(
        len(names), 3, figsize=(10, 2.7 * len(names)), layout="constrained", squeeze=False, sharey="row",
        width_ratios=(5, 10, 4),
    )  # fmt: skip
    of_each = {kind: np.array(found) for kind, found in labels(questions.examples).items()}
    for row, name in zip(axes, names, strict=True):
        for axis, kind in zip(row, kinds, strict=True):
            present = [s for s in KINDS[kind] if (of_each[kind] == s).any()]
            width = 0.8 / len(all_of)
            for number, one in enumerate(all_of):
                means = [float(one.scores[name][of_each[kind] == s].mean()) for s in present]
                at = np.arange(len(present)) + (number - (len(all_of) - 1) / 2) * width
                axis.bar(at, means, width * 0.92, color=PALETTE[number % len(PALETTE)],
                         label=one.name if len(all_of) > 1 else None)  # fmt: skip
            counts = [int((of_each[kind] == s).sum()) for s in present]
            titles = [f"{s} ({n:,})" for s, n in zip(present, counts, strict=True)]
            axis.set_xticks(range(len(present)), titles, rotation=40, ha="right", fontsize=7)
            axis.set_title(f"{name} by {kind}")
            axis.grid(axis="x", visible=False)
    if len(all_of) > 1:
        handles, found = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, found, loc="outside lower center", ncols=3)
    return figure


def length_figure(sizes: dict[str, Any]) -> Any:
    """A bar chart for each distribution of `plainloop data`."""
    plt = pyplot()
    count = len(sizes)
    figure, axes = plt.subplots(1, count, figsize=(10, 3), layout="constrained", squeeze=False)
    for axis, (name, of) in zip(axes[0], sizes.items(), strict=True):
        bars = of["histogram"]
        axis.bar(range(len(bars)), [n for _, _, n in bars], color=PALETTE[0])
        titles = [f"{low} to {high}" if high > low else str(low) for low, high, _ in bars]
        axis.set_xticks(range(len(bars)), titles, rotation=60, ha="right", fontsize=7)
        axis.set_title(name)
        axis.set_xlabel(of["unit"])
        axis.set_ylabel("number")
        axis.grid(axis="x", visible=False)
    return figure

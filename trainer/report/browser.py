"""The data of the error browser: every question with its answers, as compact as JSON can be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from plainloop.data.types import Example
from plainloop.trainer.report.figures import answer_probabilities
from plainloop.trainer.report.results import Questions, Results
from plainloop.trainer.report.slices import KINDS, labels

# How an answer can fail. The first that fits.
OUTCOMES = ("right", "boundary off", "wrong span", "should be empty", "should not be empty")
MAX_CANDIDATES = 5  # of the n-best list, in the page
FILTERS = ("question word", "answer length", "context length")
ASTRAL = re.compile("[\U00010000-\U0010ffff]")


def outcome(text: str, answerable: bool, exact: float, near: bool) -> int:
    """An index of OUTCOMES. exact: of this answer. near: whether it shares text with a gold one."""
    if exact > 0:
        return 0
    if not answerable:
        return 3
    if not text:
        return 4
    return 1 if near else 2


def is_near(start: int, text: str, golds: Sequence[list[Any]], f1: float) -> bool:
    """Whether an answer overlaps a gold one in the context; by shared words where a place is not known."""
    if start < 0 or any(place < 0 for _, place in golds):
        return f1 > 0
    return any(start < place + len(gold) and place < start + len(text) for gold, place in golds)


def browser_data(all_of: Sequence[Results], questions: Questions) -> dict[str, Any]:
    """JSON-serialisable. Offsets count UTF-16 units, as JavaScript does."""
    examples = questions.examples
    contexts: dict[str, int] = {}
    place = [contexts.setdefault(example.context, len(contexts)) for example in examples]
    slices = labels(examples)
    return {
        "figures": list(questions.figures),
        "outcomes": list(OUTCOMES),
        "contexts": list(contexts),
        "id": [example.id for example in examples],
        "question": [example.question for example in examples],
        "context": place,
        "gold": [_golds(example) for example in examples],
        "filters": {
            kind: {"names": list(KINDS[kind]), "of": [KINDS[kind].index(name) for name in slices[kind]]}
            for kind in FILTERS
        },
        "runs": [_run(one, questions) for one in all_of],
    }


def _golds(example: Example) -> list[list[Any]]:
    """[text, start] of each distinct gold answer; start -1: not known."""
    return [
        [text, _units(example.context, start)]
        for text, start in dict.fromkeys((a.text, a.start) for a in example.answers)
    ]


def _units(context: str, start: int) -> int:
    return start + len(ASTRAL.findall(context[:start])) if start > 0 else start


def _run(one: Results, questions: Questions) -> dict[str, Any]:
    examples, exact, f1 = questions.examples, one.scores[questions.figures[0]], one.scores["f1"]
    texts = [text or "" for text in one.texts]
    p = None if one.nbest is None else answer_probabilities(one)
    starts = [-1] * len(texts)
    if one.nbest is not None:
        starts = [
            next((_units(e.context, _place(c)) for c in of if c["text"] == text), -1)
            for of, text, e in zip(one.nbest, texts, examples, strict=True)
        ]
    answers = zip(texts, examples, starts, exact, f1, strict=True)
    found: dict[str, Any] = {
        "name": one.name,
        "text": texts,
        "start": starts,
        "outcome": [
            outcome(text, bool(e.answers), float(em), is_near(start, text, _golds(e), float(f)))
            for text, e, start, em, f in answers
        ],
        "scores": [
            _rounded(one.scores[name], 2 if questions.scale == 100 else 4) for name in questions.figures
        ],
        "odds": None if one.odds is None else _rounded(one.odds, 3),
        "p": None if p is None else _rounded(p, 4),
        "nbest": None,
    }
    if one.nbest is not None:
        found["nbest"] = [
            [[c["text"], _number(c.get("probability")), _number(c.get("score"))] for c in of[:MAX_CANDIDATES]]
            for of in one.nbest
        ]
    return found


def _place(candidate: dict[str, Any]) -> int:
    start = candidate.get("start")
    return start if isinstance(start, int) else -1


def _rounded(values: np.ndarray, digits: int) -> list[float | None]:
    return [round(float(value), digits) if np.isfinite(value) else None for value in values]


def _number(value: Any) -> float | None:
    return round(float(value), 4) if isinstance(value, (int, float)) and np.isfinite(value) else None

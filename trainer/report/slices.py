"""Divide questions into slices: by whether and how long the answer is, the question word, the context."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from plainloop.data.types import Example

QUESTION_WORDS = ("how many", "how much", "how", "what", "when", "where", "which", "who", "why")
_QUESTION_WORD = re.compile(rf"\b({'|'.join(QUESTION_WORDS)}|whose|whom)\b")
ANSWER_WORDS = ((1, "1 word"), (3, "2 to 3 words"), (6, "4 to 6 words"))  # up to; the rest has more
CONTEXT_CHARACTERS = ((499, "under 500"), (999, "500 to 999"), (1999, "1,000 to 1,999"))

# Kind of slice -> its slices, in order.
KINDS = {
    "answerable": ("answerable", "no answer"),
    "question word": (*QUESTION_WORDS, "other"),
    "answer length": (*(name for _, name in ANSWER_WORDS), "7 words or more", "no answer"),
    "context length": (*(name for _, name in CONTEXT_CHARACTERS), "2,000 or more"),
}


def question_word(question: str) -> str:
    """The first English question word, or "other"."""
    found = _QUESTION_WORD.search(question.lower())
    word = found.group(1) if found else "other"
    return "who" if word in ("whose", "whom") else word


def labels(examples: Sequence[Example]) -> dict[str, list[str]]:
    """Kind of slice -> (N,) the slice of each question. The answer length is that of the first gold answer,
    in words; the context length is in characters.
    """
    return {
        "answerable": ["answerable" if e.answers else "no answer" for e in examples],
        "question word": [question_word(e.question) for e in examples],
        "answer length": [
            _up_to(len(e.answers[0].text.split()), ANSWER_WORDS, "7 words or more")
            if e.answers
            else "no answer"
            for e in examples
        ],
        "context length": [_up_to(len(e.context), CONTEXT_CHARACTERS, "2,000 or more") for e in examples],
    }


def masks(examples: Sequence[Example]) -> dict[tuple[str, str], np.ndarray]:
    """(kind, slice) -> (N,) bool. Kinds with a single slice and empty slices are left out; so is the slice
    "no answer" of the answer length, which is one of "answerable" already.
    """
    found: dict[tuple[str, str], np.ndarray] = {}
    for kind, of_each in labels(examples).items():
        array = np.array(of_each)
        present = [name for name in KINDS[kind] if (array == name).any()]
        if kind == "answer length":
            present = [name for name in present if name != "no answer"]
        if len(present) > 1:
            found |= {(kind, name): array == name for name in present}
    return found


def _up_to(size: int, limits: Sequence[tuple[int, str]], more: str) -> str:
    return next((name for limit, name in limits if size <= limit), more)

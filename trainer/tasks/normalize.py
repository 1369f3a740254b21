"""Normalise answers before they are compared, as the published scripts of SQuAD and MLQA do.

MLQA: Lewis et al. 2020 and the script mlqa_evaluation_v1. Its rules know the articles of seven languages, the
punctuation of Unicode, and Chinese, which has no blanks between words.
"""

from __future__ import annotations

import re
import string
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from plainloop.data.types import Example

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Language -> what MLQA's script replaces by a blank. In Arabic, the article is removed inside words too.
MLQA_ARTICLES = {
    "ar": "ال",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "hi": None,
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "zh": None,
}
_CHINESE = re.compile("([\u4e00-\u9fa5])")


@lru_cache(maxsize=1 << 16)
def normalize_answer(text: str) -> str:
    """SQuAD: lower-case, remove ASCII punctuation, remove articles, collapse whitespace, in this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


@dataclass(frozen=True)
class Rules:
    """How a metric compares texts.

    empty_golds: a gold text that normalises to nothing can be matched; SQuAD ignores it if there are others.
    empty_f1: the F1 of two texts that normalise to nothing is 1, as their exact match is.
    """

    normalize: Callable[[str], str]
    empty_golds: bool
    empty_f1: bool

    def golds(self, example: Example) -> set[str]:
        """The normalised gold texts; {""} for an unanswerable question."""
        texts = {self.normalize(answer.text) for answer in example.answers}
        return (texts if self.empty_golds else texts - {""}) or {""}


SQUAD = Rules(normalize_answer, empty_golds=False, empty_f1=True)


def metric_rules(metric: str, language: str) -> Rules:
    """The rules of evaluation.metric: "squad", or "mlqa" for answers in this language."""
    return SQUAD if metric == "squad" else Rules(_mlqa(language), empty_golds=True, empty_f1=False)


@lru_cache
def _mlqa(language: str) -> Callable[[str], str]:
    articles = re.compile(MLQA_ARTICLES[language] or "(?!)")

    @lru_cache(maxsize=1 << 16)
    def normalize(text: str) -> str:
        """Lower-case, remove punctuation, remove articles, collapse whitespace; split Chinese characters."""
        text = articles.sub(" ", text.lower().translate(_unicode_punctuation()))
        return " ".join((_CHINESE.sub(r" \1 ", text) if language == "zh" else text).split())

    return normalize


@lru_cache
def _unicode_punctuation() -> dict[int, None]:
    """A table for str.translate that removes ASCII punctuation and Unicode's categories P*."""
    wide = (i for i in range(sys.maxunicode) if unicodedata.category(chr(i)).startswith("P"))
    return dict.fromkeys([*wide, *map(ord, string.punctuation)])

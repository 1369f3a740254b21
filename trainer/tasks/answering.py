"""Answer questions with a trained model: the windows and the search of `evaluate`, more about each answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from plainloop.data.span_answers import answers
from plainloop.data.store import Store
from plainloop.data.types import Example, TextExample
from plainloop.trainer.tasks.base import Encoded
from plainloop.trainer.tasks.evaluation import EvaluationSettings
from plainloop.trainer.tasks.span import SpanTask
from plainloop.trainer.tasks.text import TextTask


def answer_spans(
    task: SpanTask, model: Any, encoded: Encoded, examples: Sequence[Example], settings: EvaluationSettings
) -> list[dict[str, Any]] | None:
    """All ranks. On rank 0, per example: answer ("" if there is none), start and end in the context, score,
    null_score, probability among the n best and no answer, answerable, nbest.
    """
    store, options = Store(encoded.arrays), settings.options
    _, spans = task.spans(model, store, settings)
    if spans is None:
        return None
    found = []
    predictions = answers(
        spans,
        examples,
        store,
        threshold=options.null_threshold,
        num_best=options.num_best,
        temperature=settings.temperature,
    )
    for p in predictions:
        answered, known = bool(p.text), math.isfinite(p.score)
        found.append(
            {
                "answer": p.text,
                "start": p.start if answered else None,
                "end": p.end if answered else None,
                "answerable": answered,
                "score": p.score if known else None,
                "null_score": p.score + p.score_diff if known else None,
                "probability": next(e["probability"] for e in p.nbest if e["text"] == p.text),
                "nbest": p.nbest,
            }
        )
    return found


def answer_texts(
    task: TextTask,
    model: Any,
    encoded: Encoded,
    examples: Sequence[TextExample],
    settings: EvaluationSettings,
) -> list[dict[str, Any]] | None:
    """All ranks. On rank 0, per example: answer ("" if there is none), its log_probability, answerable."""
    store = Store(encoded.arrays, {"counts": encoded.counts})
    found = task.generate(model, store, np.arange(len(store)), settings, scored=True)
    if found is None:
        return None
    texts = [found[i] for i in range(len(examples))]
    return [{"answer": text, "answerable": bool(text), "log_probability": score} for text, score in texts]

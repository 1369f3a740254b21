"""Tokenise questions and contexts into sliding windows with label positions, as flat arrays.

A window is `[CLS] question [SEP] context part [SEP]`. Windows of one question overlap by `stride` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from plainloop.data.errors import InputError
from plainloop.data.tokenise import Arrays
from plainloop.data.types import Example


def question_limit(tokenizer: Any, *, max_length: int, stride: int) -> int:
    """Maximum question length in tokens: half of what stride and special tokens leave, so windows advance.

    Raises InputError if there is too little room.
    """
    model_limit = tokenizer.model_max_length
    if max_length > model_limit:
        raise InputError(f"data.max_length {max_length} exceeds the model's limit of {model_limit} tokens.")
    limit = (max_length - tokenizer.num_special_tokens_to_add(pair=True) - stride) // 2
    if stride < 0 or limit < 8:
        raise InputError(
            f"data.stride {stride} with data.max_length {max_length} leaves no room for question and context;"
            f" lower data.stride to at most {max(max_length // 2, 0)} or raise data.max_length."
        )
    return limit


def span_windows(examples: Sequence[Example], tokenizer: Any, *, max_length: int, stride: int) -> Arrays:
    """Cut examples into windows, in order. See `_window_arrays` for the arrays.

    A window's label is the span of the first answer, or CLS if there is none or it is not fully inside.
    """
    limit = question_limit(tokenizer, max_length=max_length, stride=stride)
    arrays = _Job(tokenizer, max_length, stride, limit)(examples)
    arrays["example"] = np.repeat(np.arange(len(examples), dtype=np.int32), arrays.pop("num_windows"))
    return arrays


class _Job:
    """A tokenizer and its options."""

    def __init__(self, tokenizer: Any, max_length: int, stride: int, question_limit: int) -> None:
        self.tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_padding()
        self.max_length = max_length
        self.stride = stride
        self.question_limit = question_limit

    def __call__(self, examples: Sequence[Example]) -> Arrays:
        questions = [e.question.strip() for e in examples]
        self.backend.no_truncation()
        alone = self.backend.encode_batch(questions, add_special_tokens=False)
        capped = np.array([len(encoding) > self.question_limit for encoding in alone])
        for i in np.flatnonzero(capped):
            questions[i] = self._cap(questions[i])
        rows: list[dict[str, Any]] = []
        counts = []
        for example, windows in zip(examples, self._encode(questions, examples), strict=True):
            rows += [_window(window, example, self.tokenizer.cls_token_id) for window in windows]
            counts.append(len(windows))
        return _window_arrays(rows, np.array(counts), capped)

    def _encode(self, questions: list[str], examples: Sequence[Example]) -> Iterator[list[Any]]:
        """The windows of each example, as tokenizers' encodings. transformers would copy them to lists."""
        self.backend.enable_truncation(self.max_length, stride=self.stride, strategy="only_second")
        for first in self.backend.encode_batch(
            [(q, e.context) for q, e in zip(questions, examples, strict=True)]
        ):
            yield [first, *first.overflowing]

    def _cap(self, question: str) -> str:
        """Truncate a question to the limit at a token boundary. Only absurdly long ones are affected."""
        limit = self.question_limit
        while True:
            encoding = self.tokenizer(
                question, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            if len(encoding["input_ids"]) <= self.question_limit:
                return question
            question = question[: encoding["offset_mapping"][limit - 1][1]]
            limit -= 1  # the truncated text may tokenise into more pieces than before


def _window(encoding: Any, example: Example, cls_token_id: int) -> dict[str, Any]:
    """Extract ids, offsets and positions from one tokenizer encoding."""
    ids = np.array(encoding.ids, dtype=np.int32)
    offsets = np.array(encoding.offsets, dtype=np.int32)
    in_context = np.array([s == 1 for s in encoding.sequence_ids])
    second = np.flatnonzero(np.array(encoding.type_ids) == 1)
    start = int(np.argmax(in_context)) if in_context.any() else len(ids)
    end = start + int(in_context.sum())
    cls = int(np.argmax(ids == cls_token_id))
    label = _label(example, offsets[start:end])
    return {
        "input_ids": ids,
        "offsets": offsets,
        "cls": cls,
        "segment": int(second[0]) if len(second) else len(ids),
        "context": (start, end),
        "label": (cls, cls) if label is None else (start + label[0], start + label[1]),
    }


def _label(example: Example, offsets: np.ndarray) -> tuple[int, int] | None:
    """First and last context token (inclusive) of the first answer, or None if it is not fully inside.

    Both ends depend only on overlap, so characters that are split over several tokens are handled.
    """
    if not example.answers or not len(offsets):
        return None
    text, start = example.answers[0]
    end = start + len(text.rstrip())
    start += len(text) - len(text.lstrip())
    if start >= end or start < offsets[0, 0] or end > offsets[-1, 1]:
        return None
    first = int(np.argmax(offsets[:, 1] > start))
    last = len(offsets) - 1 - int(np.argmax(offsets[::-1, 0] < end))
    return (first, last) if first <= last else None


def _window_arrays(rows: list[dict[str, Any]], num_windows: np.ndarray, capped: np.ndarray) -> Arrays:
    """Flat arrays of N windows with T tokens in total.

    input_ids (T,), offsets (T, 2): tokens and the characters they cover; length (N,): tokens of a window;
    cls (N,), segment (N,): positions of CLS and of the first token of type 1; context (N, 2): context tokens
    [start, end); label (N, 2): first and last answer token, inclusive; num_windows, capped: per example.
    """
    return {
        "input_ids": np.concatenate([row["input_ids"] for row in rows]),
        "offsets": np.concatenate([row["offsets"] for row in rows]),
        "length": np.array([len(row["input_ids"]) for row in rows], dtype=np.int32),
        "cls": np.array([row["cls"] for row in rows], dtype=np.int32),
        "segment": np.array([row["segment"] for row in rows], dtype=np.int32),
        "context": np.array([row["context"] for row in rows], dtype=np.int32),
        "label": np.array([row["label"] for row in rows], dtype=np.int32),
        "num_windows": num_windows.astype(np.int32),
        "capped": capped,
    }

"""Tokenise text-to-text rows into flat arrays of source and target ids. In a source, only the context is cut.

A context that does not fit is truncated at its end (training), or split into overlapping windows, each with
the whole question (SQuAD evaluation); the best answer over the windows is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plainloop.data.errors import InputError
from plainloop.data.tokenise import Arrays
from plainloop.data.types import TextExample

MIN_CONTEXT = 16  # context tokens that a question must leave room for


def pair_rows(
    examples: Sequence[TextExample],
    tokenizer: Any,
    *,
    max_source_length: int,
    max_target_length: int,
    stride: int | None = None,
) -> Arrays:
    """Rows in order: input_ids (S,) with length (N,); target_ids (T,) with target_length (N,); example (N,).

    stride None: one row per example; `cut` marks the truncated contexts. Otherwise: windows that overlap by
    `stride` context tokens. Raises InputError if a question leaves no room: questions are never truncated.
    """
    arrays = _Job(tokenizer, max_source_length, max_target_length, stride)(examples)
    room = arrays.pop("room")
    without = np.flatnonzero(room < 0)
    if len(without):
        first, length = examples[without[0]], max_source_length - int(room[without[0]])
        raise InputError(
            f"id {first.id!r}: the question leaves no room for a context in text.max_source_length"
            f" {max_source_length}; it needs {length} tokens. Questions are never truncated: raise"
            " text.max_source_length or remove such questions."
        )
    arrays["example"] = np.repeat(np.arange(len(examples), dtype=np.int32), arrays.pop("num_rows"))
    return arrays


class _Job:
    """A tokenizer and its options."""

    def __init__(
        self, tokenizer: Any, max_source_length: int, max_target_length: int, stride: int | None
    ) -> None:
        self.tokenizer = tokenizer
        self.max_source_length = max_source_length
        self.max_target_length = max_target_length
        self.stride = stride

    def __call__(self, examples: Sequence[TextExample]) -> Arrays:
        sources = self.tokenizer([e.question + e.context for e in examples], verbose=False)["input_ids"]
        targets = self.tokenizer(text_target=[e.target for e in examples], verbose=False)["input_ids"]
        parts, room = [], []
        for example, ids in zip(examples, sources, strict=True):
            rows, left = self._rows(example, ids)
            parts.append(rows)
            room.append(left)
        long = [len(ids) > self.max_target_length for ids in targets]
        targets = [
            [*ids[: self.max_target_length - 1], ids[-1]] if cut else ids
            for ids, cut in zip(targets, long, strict=True)
        ]
        counts = np.array([len(rows) for rows in parts], dtype=np.int32)
        target_of_row = [ids for ids, count in zip(targets, counts, strict=True) for _ in range(count)]
        source_of_row = [ids for rows in parts for ids in rows]
        return {
            "input_ids": _flat(source_of_row),
            "length": _lengths(source_of_row),
            "target_ids": _flat(target_of_row),
            "target_length": _lengths(target_of_row),
            "num_rows": counts,
            "cut": np.array([len(ids) > self.max_source_length for ids in sources]),
            "target_cut": np.array(long),
            "room": np.array(room, dtype=np.int32),
        }

    def _rows(self, example: TextExample, ids: list[int]) -> tuple[list[list[int]], int]:
        """The row(s) of a source, and 0; if negative, how many tokens of room for a context are missing."""
        if len(ids) <= self.max_source_length:
            return [ids], 0
        special = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        before = next(i for i, token in enumerate(ids) if token not in special)
        after = next(i for i, token in enumerate(reversed(ids)) if token not in special)
        # Without its trailing space: a byte-level vocabulary merges it with the first word of the context.
        question = self.tokenizer([example.question.rstrip()], add_special_tokens=False, verbose=False)
        head = before + len(question["input_ids"][0])
        room = self.max_source_length - head - after
        if room < MIN_CONTEXT:
            return [ids], room - MIN_CONTEXT
        context = ids[head : len(ids) - after]
        if self.stride is None:
            return [[*ids[:head], *context[:room], *ids[len(ids) - after :]]], 0
        step = max(1, room - min(self.stride, room // 2))
        starts = range(0, max(1, len(context) - room + step), step)
        return [[*ids[:head], *context[i : i + room], *ids[len(ids) - after :]] for i in starts], 0


def _flat(rows: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array([token for row in rows for token in row], dtype=np.int32)


def _lengths(rows: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array([len(row) for row in rows], dtype=np.int32)

"""Shared types: what readers yield, and what batches contain."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # an error message should not require importing torch
    import numpy as np
    import torch

IGNORE_INDEX = -100  # labels with this value are ignored, as in torch.nn.functional.cross_entropy


class Answer(NamedTuple):
    """A gold answer: `context[start:start + len(text)] == text`, start in characters."""

    text: str
    start: int


@dataclass(frozen=True)
class Example:
    """One question. No answers means that the context does not answer it. title: of the context's article."""

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...] = ()
    title: str = field(default="", compare=False)  # not every format has it


@dataclass(frozen=True)
class TextExample:
    """One row of a text-to-text task. The source is question + context; only the context may be truncated.

    references: what a prediction is scored against (none: unanswerable). targets: what to train on.
    """

    id: str
    question: str
    context: str
    references: tuple[str, ...]
    targets: tuple[str, ...]
    is_squad: bool = False

    @property
    def target(self) -> str:
        """The first target: the only one that evaluation uses."""
        return self.targets[0]


class MicroBatch(NamedTuple):
    """The input of one forward pass: B rows, L tokens (padded). A DataLoader can pin it directly.

    inputs: keyword arguments of the model, int64, most of them (B, L).
    labels: what the loss needs besides the logits, int64, IGNORE_INDEX where a label is ignored.
    """

    inputs: dict[str, torch.Tensor]
    labels: dict[str, torch.Tensor]


class StepBatch(NamedTuple):
    """This rank's share of one optimizer step, and the size of the whole step over all ranks.

    num_targets: divides the loss summed over all ranks (number of windows, or of target tokens).
    examples, tokens, padded_tokens: totals over all ranks, for the log. rows: those of all ranks, in order.
    """

    micro_batches: list[MicroBatch]
    num_targets: int
    examples: int
    tokens: int
    padded_tokens: int
    rows: np.ndarray

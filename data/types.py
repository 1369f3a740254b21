"""The vocabulary of the package: what a reader yields, what a batch holds, what a user's error is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # an error message should not cost the import of torch
    import numpy as np
    import torch

IGNORE_INDEX = -100  # a label with this value counts for nothing, as in torch.nn.functional.cross_entropy


class InputError(ValueError):
    """A mistake of the user's: names the file, record or option and the remedy; ends with exit code 2."""


class Answer(NamedTuple):
    """A gold answer: `context[start:start + len(text)] == text`, start in characters."""

    text: str
    start: int


@dataclass(frozen=True)
class Example:
    """One question. No answers means that the context does not answer it."""

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...] = ()


@dataclass(frozen=True)
class TextExample:
    """One row of a text-to-text task. The source is question + context; only the context may be cut.

    references: what a prediction is scored against (none: unanswerable). targets: what is learned.
    """

    id: str
    question: str
    context: str
    references: tuple[str, ...]
    targets: tuple[str, ...]

    @property
    def target(self) -> str:
        """The first of the targets: the only one in an evaluation."""
        return self.targets[0]


class MicroBatch(NamedTuple):
    """What one forward pass takes. B rows, L tokens (padded); a DataLoader can pin it as it is.

    inputs: keyword arguments of the model, int64, most of them (B, L).
    labels: what the loss needs beside the logits, int64, IGNORE_INDEX where a label counts for nothing.
    """

    inputs: dict[str, torch.Tensor]
    labels: dict[str, torch.Tensor]


class StepBatch(NamedTuple):
    """This rank's share of one optimizer step, and the size of the whole step over all ranks.

    divisor: what the summed loss of all ranks is divided by (windows, or target tokens).
    examples, tokens, padded_tokens: totals over all ranks, for the log. rows: of all ranks, in order.
    """

    micro_batches: list[MicroBatch]
    divisor: int
    examples: int
    tokens: int
    padded_tokens: int
    rows: np.ndarray

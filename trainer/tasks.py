"""Tasks: where data meets models. The loop knows none of them; a new one is a class and an entry here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from plainloop.data.loader import Steps
from plainloop.data.store import Store
from plainloop.trainer.config import DataConfig, EvaluationConfig, ModelConfig, TextConfig
from plainloop.trainer.distributed import World
from plainloop.trainer.span_task import SpanTask
from plainloop.trainer.text_task import TextTask


class Task(Protocol):
    """What run.py and score.py ask of a task."""

    def loss_sum(self, logits: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """Summed over the micro-batch, fp32 scalar."""

    def prepare(self, part: str, path: str | Sequence[str], *, limit: int | None = None) -> Store:
        """All ranks, outside any process group: rank 0 tokenises the "train" or "dev" part, others wait."""

    def load_model(self, path: str, *, new_head: bool) -> nn.Module:
        """From a folder or hub name. new_head: what the task adds to a pretrained model may be missing."""

    def save_model(self, model: nn.Module, folder: Path, weights: dict[str, Tensor]) -> None:
        """Rank 0 only, in a thread. What from_pretrained reads, with these weights of the model."""

    def steps(self, rows: Store, *, batch_size: int, seed: int, tokens: int) -> Steps:
        """This rank's share of every optimizer step."""

    def record_ids(self, rows: np.ndarray) -> list[str]:
        """Ids of the training records behind these rows; reads the training file again."""

    def metric_names(self) -> list[str]:
        """What an evaluation of the prepared dev data gives."""

    def report(self, part: str, rows: Store, precision: str) -> list[str]:
        """Lines about the data: what there is, and warnings of what was cut or is likely to go wrong."""

    def evaluate(
        self, model: nn.Module, rows: Store, *, name: str, precision: str, tokens: int,
        config: EvaluationConfig, folder: Path | None, should_stop: Callable[[], bool], training: bool,
        bootstrap: bool = False,
    ) -> dict[str, float] | None:  # fmt: skip
        """All ranks. Metrics on rank 0 ({} elsewhere), files in folder; None when stopped half-way.

        name: of what is evaluated. training: a subset may do. bootstrap: the published kind of ROUGE-L.
        """


TASKS: dict[str, Callable[[ModelConfig, DataConfig, TextConfig, World], Any]] = {
    "span": SpanTask,
    "text": TextTask,
}


def make_task(kind: str, model: ModelConfig, data: DataConfig, text: TextConfig, world: World) -> Task:
    """All ranks. Loads the tokenizer; raises InputError when it does not suit the task."""
    task: Task = TASKS[kind](model, data, text, world)
    return task

"""Evaluation on all ranks: every row exactly once, on some rank; scores and files on rank 0."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from plainloop.data.loader import Collate
from plainloop.data.samplers import shard_evaluation
from plainloop.data.store import Store
from plainloop.trainer.config.options import EvaluationConfig
from plainloop.trainer.distributed.world import World, gather_arrays, sum_over_ranks
from plainloop.trainer.errors import is_out_of_memory
from plainloop.trainer.precision import autocast
from plainloop.trainer.run_folder.files import write_atomically

LossSum = Callable[[Tensor, dict[str, Tensor]], Tensor]


class Interrupted(Exception):
    """All ranks agreed to stop in the middle of an evaluation."""


def never() -> bool:
    """The default of should_stop."""
    return False


@dataclass(frozen=True)
class EvaluationSettings:
    """How to evaluate.

    max_tokens: padded tokens per batch. options: `evaluation.*`. name: what is evaluated, for the files.
    folder: of the files; None: write none. should_stop: called by all ranks before each batch, with the same
    answer on all. training: the evaluation may take a subset. bootstrap: ROUGE-L as published for CausalQA.
    temperature: of calibrated probabilities. lockstep: every rank makes the same number of passes, since the
    model is sharded and each pass is a collective operation.
    """

    world: World
    precision: str
    max_tokens: int
    options: EvaluationConfig
    name: str = ""
    folder: Path | None = None
    should_stop: Callable[[], bool] = never
    training: bool = False
    bootstrap: bool = False
    temperature: float | None = None
    lockstep: bool = False


@dataclass(frozen=True)
class Scores:
    """Rank 0: metrics by name, and the files to write, name -> JSON content. Other ranks: empty."""

    metrics: dict[str, float] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the files, and metrics.json. An I/O error is only a warning, since the scores are known."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in {**self.files, "metrics.json": self.metrics}.items():
                write_atomically(folder / name, json.dumps(content, indent=1, ensure_ascii=False))
        except OSError as error:
            print(f"WARNING: {folder}: predictions not written: {error.strerror}", file=sys.stderr)


def forward_rows(
    model: nn.Module,
    store: Store,
    collate: Collate,
    loss_sum: LossSum,
    settings: EvaluationSettings,
    *,
    rows: np.ndarray | None = None,
    name: str = "evaluate",
    reduce: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]] | None = None,
) -> tuple[float, dict[str, np.ndarray] | None]:
    """All ranks. Run the model once on `rows` (ascending; default: all); return (loss, results or None).

    loss: sum of the losses divided by the number of targets. reduce(logits, rows): turns the fp32 logits of a
    batch into small arrays whose first axis is its rows; rank 0 gets those of all rows, in the order of
    `rows`, with the rows themselves as "row"; other ranks get None. Raises Interrupted.
    """
    world = settings.world
    rows = np.arange(len(store)) if rows is None else rows
    micro_batches = shard_evaluation(
        rows, store.row_lengths, world_size=world.size, max_tokens=settings.max_tokens
    )
    parts: list[dict[str, np.ndarray]] = []
    losses = [0.0]

    def run(part: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, labels = (to_device(tensors, world.device) for tensors in collate(part))
        with autocast(settings.precision, world.device):
            return model(**inputs), labels

    def forward(part: np.ndarray) -> None:
        logits, labels = run(part)
        loss = loss_sum(logits, labels).item()
        if reduce is not None:
            parts.append({"row": part, **reduce(logits.float().cpu().numpy(), part)})
        losses.append(loss)

    on_micro_batches(model, micro_batches, forward, settings, name=name, idle=run)
    loss = sum_over_ranks(torch.tensor(sum(losses), dtype=torch.float64)).item()
    results = gather_rows(parts, rows) if reduce is not None else None
    return loss / int(store.num_targets[rows].sum()), results


def gather_rows(parts: Sequence[dict[str, np.ndarray]], rows: np.ndarray) -> dict[str, np.ndarray] | None:
    """All ranks. Join the arrays of all ranks' batches on rank 0, in the order of `rows`; None elsewhere.

    Each part has an array "row". Fails unless these are exactly `rows`, which are ascending, each once.
    """
    mine = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    everyone = gather_arrays(mine)
    if everyone is None:
        return None
    filled = [arrays for arrays in everyone if arrays]  # a rank without micro-batches has none
    joined = filled[0]
    if len(filled) > 1:
        joined = {name: np.concatenate([arrays[name] for arrays in filled]) for name in joined}
    order = np.argsort(joined["row"], kind="stable")
    if not np.array_equal(joined["row"][order], rows):
        raise AssertionError(f"evaluated {len(joined['row'])} rows, expected each of {len(rows)} once")
    return {name: array[order] for name, array in joined.items()}


def on_micro_batches(
    model: nn.Module,
    micro_batches: Sequence[Sequence[np.ndarray]],
    action: Callable[[np.ndarray], None],
    settings: EvaluationSettings,
    *,
    name: str,
    idle: Callable[[np.ndarray], object],
) -> None:
    """All ranks. Call action(rows) for each micro-batch of this rank, in evaluation mode.

    micro_batches: of every rank. If memory runs out, the micro-batch is halved and retried, so `action` must
    not record anything before it has succeeded. In lockstep nothing is retried, and a rank that has no
    micro-batch left calls idle(rows), which runs the model and records nothing. Raises Interrupted if
    should_stop() says so: all ranks ask equally often, even a rank with fewer micro-batches.
    """
    mine, was_training = micro_batches[settings.world.rank], model.training
    model.eval()
    try:
        with torch.inference_mode(), _bar(name, sum(map(len, mine)), settings.world) as bar:
            for i in range(max(map(len, micro_batches))):
                if settings.should_stop():
                    raise Interrupted
                if i >= len(mine):
                    if settings.lockstep:
                        idle(next(part for part in micro_batches if len(part) > i)[i][:1])
                else:
                    (action if settings.lockstep else partial(halved, action))(mine[i])
                    bar.update(len(mine[i]))
    finally:
        model.train(was_training)
        if settings.lockstep:  # a pass without a backward pass leaves the embeddings gathered
            cast(Any, model).reshard()


def halved(action: Callable[[np.ndarray], None], rows: np.ndarray) -> None:
    """Call action(rows); if memory runs out, call it on each half of the rows instead, recursively.

    Re-raises the error if a single row does not fit.
    """
    try:
        action(rows)
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(rows) == 1:
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(rows) // 2
    print(
        f"WARNING: an evaluation batch of {len(rows)} rows does not fit into memory; retrying with {middle}"
        f" and {len(rows) - middle}. Lower tokens_per_device for evaluations to avoid this.",
        file=sys.stderr,
        flush=True,
    )
    for half in (rows[:middle], rows[middle:]):
        halved(action, half)


def to_device(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _bar(name: str, total: int, world: World) -> tqdm[Any]:
    disable = None if world.is_main else True
    return tqdm(total=total, desc=name, unit="rows", delay=2, mininterval=1, disable=disable, leave=False)

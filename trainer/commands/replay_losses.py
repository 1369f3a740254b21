"""The losses of a training step, recomputed: the last checkpoint before the step is loaded, and the steps up
to it are trained again, with the micro-batches and dropout masks of every rank of the run, in one process.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from plainloop.data.loader import Steps
from plainloop.data.types import IGNORE_INDEX, MicroBatch
from plainloop.trainer.checkpoint import folder as checkpoints
from plainloop.trainer.checkpoint.folder import Checkpoint
from plainloop.trainer.config.options import TrainConfig
from plainloop.trainer.distributed.device import set_up_device
from plainloop.trainer.distributed.world import World
from plainloop.trainer.loop import StepOptions, add_gradients, dropout_seed, train_step
from plainloop.trainer.optim import learning_rate
from plainloop.trainer.run import new_state
from plainloop.trainer.state import TrainState
from plainloop.trainer.tasks.base import Dataset, Task
from plainloop.trainer.tasks.model import load_model

# The largest relative difference of a loss that rounding explains, when other ranks or devices add it up.
ROUNDING = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}


@dataclass
class Losses:
    """A loss function for `train_step` that also keeps the loss of each row of one step."""

    task: Task
    rows: list[int] = field(default_factory=list)  # of the micro-batch at hand; [] while nothing is kept
    owner: Tensor = field(default_factory=lambda: torch.zeros(0))  # (K,) the row of each label
    of_row: dict[int, float] = field(default_factory=dict)

    def __call__(self, logits: Tensor, labels: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            for i, row in enumerate(self.rows):  # a label of -100 counts for nothing
                others = self.owner.to(logits.device) != i
                own = {
                    name: label.masked_fill(
                        others.view(-1, *[1] * (label.ndim - 1)).expand_as(label), IGNORE_INDEX
                    )
                    for name, label in labels.items()
                }
                self.of_row[row] = self.task.loss_sum(logits, own).item()
        return self.task.loss_sum(logits, labels)

    def expect(self, rows: np.ndarray, micro_batch: MicroBatch) -> None:
        """Keep the losses of the next micro-batch, which has these rows."""
        self.rows, inputs = rows.tolist(), micro_batch.inputs
        if "scored" in inputs:  # labels are those of the target tokens of all rows
            self.owner = inputs["scored"] // inputs["decoder_input_ids"].shape[1]
        else:
            self.owner = torch.arange(len(rows))


def losses(
    task: Task, run: TrainConfig, data: Dataset, of_rank: list[Steps], start: Checkpoint | None, wanted: int,
    log: list[dict[str, Any]], world: World,
) -> dict[str, Any]:  # fmt: skip
    """The loss of each row of step `wanted` (counted from 1). Training goes on to the next line of the log,
    whose loss must come out again: a check of all that was recomputed.
    """
    logged = next((line for line in log if line["step"] >= wanted), None)
    last = logged["step"] if logged else wanted
    set_up_device(world, tf32=run.tf32, deterministic=run.deterministic)
    if start is not None and (threads := start.state["environment"].get("threads")):
        torch.set_num_threads(threads)
    torch.manual_seed(run.seed)
    path = str(start.path) if start else run.model.path
    model = load_model(task, path, run, world, new_head=start is None).train()
    state = new_state(model, run, world)
    if start:
        checkpoints.restore(state, start, is_main=True)
    began = state.step
    print(
        f"training from {start.path if start else 'the start'}, step {began}, to step {last}"
        + ("" if start else "; there is no good checkpoint before the step"),
        file=sys.stderr,
    )
    losses, total = Losses(task), run.total_steps(of_rank[0].sampler.steps_per_epoch)
    options = StepOptions(
        losses, learning_rate(run.optim, total), world, run.seed, run.precision, run.optim.max_grad_norm
    )
    lines = {line["step"] for line in log}
    for step in tqdm(range(began, last), desc="replay", unit="step", delay=2, mininterval=1, leave=False):
        if step in lines:  # the loss of a line is the mean since the line before
            state.loss_sum.zero_()
            state.loss_count = 0
        summed = one_step(state, of_rank, step, options, losses if step == wanted - 1 else None)
        if step == wanted - 1:
            step_loss = summed
    weights = data.store.num_targets
    rows = of_rank[0].sampler.batch(wanted - 1)
    divisor = int(weights[rows].sum())
    step_loss /= divisor
    found: dict[str, Any] = {
        "row_losses": [
            {"loss": losses.of_row[row] / int(weights[row]), "weight": int(weights[row]) / divisor}
            for row in rows.tolist()
        ],
        "step_loss": step_loss,
        "weighted_sum": sum(losses.of_row[row] for row in rows.tolist()) / divisor,
        "trained_from_step": began,
    }
    first = max((step for step in lines if step < last), default=0)
    if logged:
        before, now = float(logged["loss"]), state.loss_sum.item() / state.loss_count
        found["logged"] = {
            "first_step": first + 1, "last_step": last, "loss": before, "recomputed": now,
            "verdict": verdict(before, now, run.precision),
        }  # fmt: skip
    return found


def verdict(logged: float, recomputed: float, precision: str) -> str:
    """Whether the recomputed loss is the logged one."""
    if logged == recomputed or (math.isnan(logged) and math.isnan(recomputed)):
        return "the same to the last digit"
    difference = abs(recomputed - logged) / abs(logged) if logged else math.inf
    if difference < ROUNDING[precision]:
        return f"equal but for rounding (relative difference {difference:.1g})"
    return f"WARNING: not the same (relative difference {difference:.1g}): the run had other losses"


def one_step(
    state: TrainState, of_rank: list[Steps], step: int, options: StepOptions, keep: Losses | None
) -> float:
    """The step of all ranks: their gradients are summed here, all else is done by the loop's own function.
    Return the summed loss of its rows.
    """
    summed = torch.zeros((), dtype=torch.float64, device=state.device)
    shares = of_rank[0].split(of_rank[0].sampler.batch(step))
    batches = [steps[step] for steps in of_rank]
    for rank, batch in enumerate(batches):
        for i, micro_batch in enumerate(batch.micro_batches):
            if keep and i < len(shares[rank]):  # else an empty pass of a sharded run
                keep.expect(shares[rank][i], micro_batch)
            torch.manual_seed(dropout_seed(options.seed, step, rank, i))
            loss = add_gradients(state, micro_batch, 1 / batch.num_targets, options)
            state.loss_sum += loss
            summed += loss
            if keep:
                keep.rows = []
    train_step(state, batches[0]._replace(micro_batches=[]), options)
    state.step_done(batches[0].rows)
    return float(summed)

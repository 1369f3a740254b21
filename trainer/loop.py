"""The loop, and one optimizer step on a page. The only backward() of the package is in this file."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from plainloop.data.types import MicroBatch, StepBatch
from plainloop.trainer.distributed.world import World
from plainloop.trainer.precision import autocast, step_if_finite
from plainloop.trainer.state import Progress, TrainState


class Verdict(enum.Enum):
    """How a run ended. The value is the exit code of the command line."""

    COMPLETED = 0
    STOPPED = 75  # with a checkpoint, to be resumed


@dataclass(frozen=True)
class StepOptions:
    """Constants of every step."""

    loss_sum: Callable[[Tensor, dict[str, Tensor]], Tensor]  # logits, labels -> fp32 scalar, a sum over rows
    lr: Callable[[int], float]
    world: World
    seed: int
    precision: str
    max_grad_norm: float


Hook = Callable[[Progress], None]


def fit(
    progress: Progress, batches: Iterator[StepBatch], hooks: Sequence[Hook], options: StepOptions
) -> Verdict:
    """All ranks. Run the hooks at every step boundary, in order, including the first and the last one.

    The last pass makes the final evaluation and checkpoint, and a resumed run begins with
    what was due when it was stopped.
    """
    state = progress.state
    while True:
        for i, hook in enumerate(hooks):
            state.heartbeat.at(getattr(hook, "__name__", type(hook).__name__), i / len(hooks))
            hook(progress)
        if state.stop:
            return Verdict.STOPPED
        if state.step == progress.total_steps:
            return Verdict.COMPLETED
        state.heartbeat.at("waiting for data", 1)
        batch = progress.traffic.receive(batches)
        train_step(state, batch, options)
        state.step_done(batch.rows)


def train_step(state: TrainState, batch: StepBatch, options: StepOptions) -> None:
    """All ranks. One optimizer step on a global batch; nothing in it waits for the device.

    Gradient = d/dw [sum of the losses of all rows of all ranks] / batch.num_targets. `parallel` averages over
    ranks, so each multiplies by world size; the division by the global count happens here and nowhere else.
    """
    world, last = options.world, len(batch.micro_batches) - 1
    for group in state.optimizer.param_groups:
        group["lr"] = options.lr(state.step)
    for i, micro_batch in enumerate(batch.micro_batches):
        state.heartbeat.at(f"micro-batch {i + 1} of {last + 1}", 1 + (i + 1) / (last + 1))
        torch.manual_seed(dropout_seed(options.seed, state.step, world.rank, i))
        with state.parallel.syncing(i == last):
            state.loss_sum += add_gradients(state, micro_batch, world.size / batch.num_targets, options)

    state.heartbeat.at("optimizer", 3)
    state.scaler.unscale_(state.optimizer)
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    state.grad_norm = state.parallel.total_norm(gradients)
    if options.max_grad_norm:
        clip_grads_with_norm_(state.model.parameters(), options.max_grad_norm, state.grad_norm)
    nonfinite = ~state.grad_norm.isfinite()
    step_if_finite(state.optimizer, state.scaler, nonfinite)
    state.parallel.clear_gradients(state.optimizer)
    state.nonfinite_streak = (state.nonfinite_streak + 1) * nonfinite
    state.nonfinite_worst = torch.maximum(state.nonfinite_worst, state.nonfinite_streak)
    state.nonfinite_total = state.nonfinite_total + nonfinite
    state.loss_count += batch.num_targets


def add_gradients(state: TrainState, micro_batch: MicroBatch, weight: float, options: StepOptions) -> Tensor:
    """One forward and backward pass, with the loss times `weight`; returns the summed loss, detached."""
    inputs, labels = (
        {name: tensor.to(state.device, non_blocking=True) for name, tensor in part.items()}
        for part in micro_batch
    )
    with autocast(options.precision, state.device):
        logits = state.parallel.module(**inputs)
    loss = options.loss_sum(logits, labels)
    # A NaN or Inf loss turns every gradient into NaN: all ranks see it after the all-reduce, and skip.
    poison = torch.where(loss.isfinite(), 1.0, torch.nan)
    state.scaler.scale(loss * poison * weight).backward()
    return loss.detach()


def allocate_optimizer_state(state: TrainState) -> None:
    """Make the optimizer allocate its state, in a step that changes no weight."""
    skip = torch.ones((), dtype=torch.bool, device=state.device)
    step_if_finite(state.optimizer, torch.amp.GradScaler(enabled=False), skip)


def dropout_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """A 64-bit seed that depends only on the arguments, so there is no generator state to save."""
    return int(np.random.SeedSequence([seed, step, rank, micro_batch]).generate_state(1, np.uint64)[0])

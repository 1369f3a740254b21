"""The loop. One optimizer step is one page: the only backward() and the only optimizer.step() there is."""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from plainloop.data.samplers import order_digest
from plainloop.data.types import MicroBatch, StepBatch
from plainloop.trainer.distributed import World
from plainloop.trainer.precision import autocast, step_if_finite
from plainloop.trainer.state import TrainState


class Verdict(enum.Enum):
    """How a run ended; the command line makes an exit code of it."""

    COMPLETED = 0
    STOPPED = 75  # with a checkpoint, to be continued


@dataclass
class Traffic:
    """What went through the loop since the start of this process, all ranks together."""

    examples: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    waiting_s: float = 0.0  # for data, on this rank


@dataclass(frozen=True)
class StepOptions:
    """What train_step is told once."""

    loss_sum: Callable[[Tensor, dict[str, Tensor]], Tensor]  # logits, labels -> fp32 scalar, a sum over rows
    lr: Callable[[int], float]
    world: World
    seed: int
    precision: str
    max_grad_norm: float


@dataclass
class Progress:
    """What hooks see at a step boundary: after `state.step` steps of `total_steps`."""

    state: TrainState
    total_steps: int
    steps_per_epoch: int
    traffic: Traffic = field(default_factory=Traffic)


Hook = Callable[[Progress], None]


def fit(
    progress: Progress, batches: Iterator[StepBatch], hooks: Sequence[Hook], options: StepOptions
) -> Verdict:
    """All ranks. Hooks run at every step boundary, the first and the last included, in order.

    So the evaluation and the checkpoint at the end are the last pass of the same loop, and a resumed run
    first does what was due when it was stopped.
    """
    state, traffic = progress.state, progress.traffic
    while True:
        for i, hook in enumerate(hooks):
            state.place.at(getattr(hook, "__name__", type(hook).__name__), i / len(hooks))
            hook(progress)
        if state.stop:
            return Verdict.STOPPED
        if state.step == progress.total_steps:
            return Verdict.COMPLETED
        state.place.at("waiting for data", 1)
        asked = time.perf_counter()
        batch = next(batches)
        traffic.waiting_s += time.perf_counter() - asked
        train_step(state, batch, options)
        traffic.examples += batch.examples
        traffic.tokens += batch.tokens
        traffic.padded_tokens += batch.padded_tokens
        state.step += 1
        state.place.step, state.place.trained = state.step, True
        state.rows, state.order = batch.rows, order_digest(state.order, batch.rows)


def train_step(state: TrainState, batch: StepBatch, options: StepOptions) -> None:
    """All ranks. One optimizer step on a global batch; nothing in it waits for the device.

    Gradient = d/dw [sum of losses over all rows of all ranks] / batch.divisor. DDP averages over ranks, so
    each rank multiplies by world size; the division by the global count happens here and nowhere else.
    """
    world, last = options.world, len(batch.micro_batches) - 1
    for group in state.optimizer.param_groups:
        group["lr"] = options.lr(state.step)
    for i, micro_batch in enumerate(batch.micro_batches):
        state.place.at(f"micro-batch {i + 1} of {last + 1}", 1 + (i + 1) / (last + 1))
        torch.manual_seed(dropout_seed(options.seed, state.step, world.rank, i))
        with _sync_only(state.wrapped, i == last):
            state.loss_sum += add_gradients(state, micro_batch, world.size / batch.divisor, options)

    state.place.at("optimizer", 3)
    state.scaler.unscale_(state.optimizer)
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    state.grad_norm = get_total_norm(gradients)
    if options.max_grad_norm:
        clip_grads_with_norm_(state.model.parameters(), options.max_grad_norm, state.grad_norm)
    nonfinite = ~state.grad_norm.isfinite()
    step_if_finite(state.optimizer, state.scaler, nonfinite)
    clear_gradients(state)
    state.nonfinite_run = (state.nonfinite_run + 1) * nonfinite
    state.nonfinite_worst = torch.maximum(state.nonfinite_worst, state.nonfinite_run)
    state.nonfinite_total = state.nonfinite_total + nonfinite
    state.loss_count += batch.divisor


def add_gradients(state: TrainState, micro_batch: MicroBatch, weight: float, options: StepOptions) -> Tensor:
    """One forward and backward pass, with the loss times `weight`; returns the summed loss, detached."""
    inputs, labels = (
        {name: tensor.to(state.device, non_blocking=True) for name, tensor in part.items()}
        for part in micro_batch
    )
    with autocast(options.precision, state.device):
        logits = state.wrapped(**inputs)
    loss = options.loss_sum(logits, labels)
    # A loss of NaN or Inf makes NaN of every gradient: all ranks see it in the sum, and skip.
    poison = torch.where(loss.isfinite(), 1.0, torch.nan)
    state.scaler.scale(loss * poison * weight).backward()
    return loss.detach()


def warm_up(state: TrainState, micro_batches: Sequence[MicroBatch], options: StepOptions) -> float:
    """All ranks. Passes that change nothing, before the first step of this process; seconds of the last one.

    DDP sorts its buckets anew after the first backward pass; a resumed run that began with its first step
    would add up the gradients of three or more ranks in another order than one that never stopped. And the
    memory peak of the run shows here, not after hours: the micro-batches are the largest, the optimizer makes
    its state in a step that it skips, and the passes after the first hold the gradients of those before.
    """
    again = micro_batches[-1:] if len(micro_batches) > 1 else []  # timed when what it needs is compiled
    for i, micro_batch in enumerate([micro_batches[0], *micro_batches, *again]):
        state.place.at("warm-up", 0)
        started = time.perf_counter()
        add_gradients(state, micro_batch, 1.0, options)
        if i == 0:
            skip = torch.ones((), dtype=torch.bool, device=state.device)
            step_if_finite(state.optimizer, torch.amp.GradScaler(enabled=False), skip)
            if isinstance(state.wrapped, DistributedDataParallel):  # let go of the buckets it now replaces
                state.optimizer.zero_grad(set_to_none=True)
    float(state.grad_norm)  # waits for the device
    clear_gradients(state)
    return time.perf_counter() - started


def clear_gradients(state: TrainState) -> None:
    """Free them; but DDP's stay where they are, in its buckets: one made anew under no_sync lies outside of
    the buckets, which costs 4 bytes a parameter and a copy.
    """
    state.optimizer.zero_grad(set_to_none=not isinstance(state.wrapped, DistributedDataParallel))


def dropout_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """A 64-bit seed that depends on nothing else, so there is no generator state to save or to lose."""
    return int(np.random.SeedSequence([seed, step, rank, micro_batch]).generate_state(1, np.uint64)[0])


def _sync_only(wrapped: torch.nn.Module, sync: bool) -> contextlib.AbstractContextManager[None]:
    """Gradients cross the network in the last micro-batch alone."""
    if sync or not isinstance(wrapped, DistributedDataParallel):
        return contextlib.nullcontext()
    return wrapped.no_sync()

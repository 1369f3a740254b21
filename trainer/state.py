"""Everything that changes during a run: the model and its counters, and what hooks see. All else is a
function of the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from plainloop.data.samplers import order_digest
from plainloop.data.types import StepBatch
from plainloop.trainer.distributed.deadline import StopTime
from plainloop.trainer.distributed.parallel import Parallel, first_row, like, local
from plainloop.trainer.distributed.watchdog import Heartbeat
from plainloop.trainer.distributed.world import World
from plainloop.trainer.run_folder.log import Log
from plainloop.trainer.run_folder.tensors import Tensors


@dataclass
class TrainState:
    """model is the bare module; parallel runs its forward passes and knows how it is spread over the ranks.

    The tensors below stay on the device and are read only when a line is logged: loss_sum (fp64, this rank's
    share since the last line), grad_norm (of the last step), and nonfinite_* (skipped steps: the current
    streak, the longest streak, the total). loss_count is what loss_sum, summed over all ranks, is divided by.
    order is the running digest of the rows of every global batch since step order_since; rows are those of
    the last batch.
    """

    model: nn.Module
    parallel: Parallel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    adapted: bool = False  # the model has adapters: of its weights, checkpoints hold only what is trained
    step: int = 0  # completed steps
    order: str = ""
    order_since: int = 0
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    loss_count: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    stop: str | None = None  # the reason to stop at this boundary
    loss_sum: torch.Tensor = field(init=False)
    grad_norm: torch.Tensor = field(init=False)
    nonfinite_streak: torch.Tensor = field(init=False)
    nonfinite_worst: torch.Tensor = field(init=False)
    nonfinite_total: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.grad_norm = torch.zeros((), device=self.device)
        self.nonfinite_streak = torch.zeros((), dtype=torch.int64, device=self.device)
        self.nonfinite_worst = torch.zeros((), dtype=torch.int64, device=self.device)
        self.nonfinite_total = torch.zeros((), dtype=torch.int64, device=self.device)

    def step_done(self, rows: np.ndarray) -> None:
        """Count a step that trained on these rows (of all ranks, in order)."""
        self.step += 1
        self.heartbeat.step, self.heartbeat.trained = self.step, True
        self.rows, self.order = rows, order_digest(self.order, rows)

    def weights(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of the model: its state_dict; with adapters, only what is trained."""
        weights = self.model.state_dict()
        if not self.adapted:
            return weights
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return {name: tensor for name, tensor in weights.items() if name in trained}

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """Optimizer state as '<parameter>/<key>' -> tensor: what this rank holds of it."""
        return {
            f"{name}/{key}": local(value)
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def split_optimizer_tensors(self) -> set[str]:
        """The names of those optimizer_tensors of which this rank holds some rows; the others are whole."""
        return {
            f"{name}/{key}"
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if hasattr(value, "device_mesh")
        }

    def load_optimizer_tensors(self, tensors: Tensors) -> None:
        """Inverse of optimizer_tensors, from files that have the whole state. Raises ValueError for a tensor
        that belongs to no parameter.
        """
        parameters = dict(self.model.named_parameters())
        states: dict[str, dict[str, torch.Tensor]] = {}
        for path in tensors.places:
            name, _, key = path.rpartition("/")
            if name not in parameters:
                raise ValueError(f"{path}: the model has no such parameter")
            parameter, shape = parameters[name], tensors.shape(path)
            # Moments are split as the parameter is, also those per row. Those per column of a matrix are not.
            whole = parameter.ndim == 2 if key == "col_var" else shape[:1] != parameter.shape[:1]
            if whole:
                states.setdefault(name, {})[key] = tensors.whole(path).to(parameter.device)
                continue
            if shape[0] != parameter.shape[0]:
                raise ValueError(f"{path}: of one rank only, written by an earlier version; start again")
            start = first_row(parameter)
            rows = tensors.rows(path, start, start + len(local(parameter)))
            states.setdefault(name, {})[key] = like(parameter, rows.to(parameter.device))
        for name, state in states.items():
            self.optimizer.state[parameters[name]] = state


@dataclass
class Traffic:
    """Counts since the start of this process, over all ranks."""

    examples: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    waiting_s: float = 0.0  # for data, on this rank

    def receive(self, batches: Iterator[StepBatch]) -> StepBatch:
        """Return the next batch; time the wait and count what is in it."""
        asked = time.perf_counter()
        batch = next(batches)
        self.waiting_s += time.perf_counter() - asked
        self.examples += batch.examples
        self.tokens += batch.tokens
        self.padded_tokens += batch.padded_tokens
        return batch


@dataclass
class Stopwatch:
    """Seconds per activity, so that evaluating and saving do not count as training."""

    seconds: dict[str, float] = field(default_factory=dict)

    def time(self, name: str, action: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        try:
            return action()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@dataclass
class Progress:
    """What hooks see at a step boundary, after `state.step` of `total_steps` steps.

    log: console, metrics.jsonl and TensorBoard; only rank 0 writes. stopwatch: time that hooks spend.
    stop_time: how long a stop takes, measured.
    """

    state: TrainState
    total_steps: int
    steps_per_epoch: int
    log: Log
    world: World
    stop_time: StopTime = field(default_factory=StopTime)
    traffic: Traffic = field(default_factory=Traffic)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def due(self, every_steps: int | None, *, first: bool = False, last: bool = True) -> bool:
        """Is an action due now that runs every `every_steps` (None: once per epoch)? See `due`."""
        every = self.steps_per_epoch if every_steps is None else every_steps
        return due(self.state.step, every, self.total_steps, first=first, last=last)


def due(step: int, every: int, total: int, *, first: bool = False, last: bool = True) -> bool:
    """Is a periodic action due after `step` steps? every 0: only at step 0 (first) and the end (last)."""
    if step in (0, total):
        return first if step == 0 else last
    return every > 0 and step % every == 0


def best_step(evaluations: list[dict[str, Any]], metric: str) -> int | None:
    """Return the step of the best evaluation (earliest on ties; NaN is never best), or None."""
    sign = -1 if metric.endswith("loss") else 1
    values = [(sign * record[metric], -record["step"]) for record in evaluations if metric in record]
    ranked = [pair for pair in values if math.isfinite(pair[0])]
    return -max(ranked)[1] if ranked else None

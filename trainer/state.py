"""TrainState: all that changes while a run goes on. Everything else is a function of the step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn


@dataclass
class Place:
    """Where a rank is, for the thread that watches it. order grows within a step: who is behind?"""

    step: int = 0
    doing: str = "starting"
    order: float = 0.0
    ticks: int = 0  # signs of life
    trained: bool = False  # a step, in this process

    def at(self, doing: str, order: float) -> None:
        self.doing, self.order, self.ticks = doing, order, self.ticks + 1

    def tick(self) -> None:
        """Still at it."""
        self.ticks += 1


@dataclass
class TrainState:
    """model is the bare module; wrapped is what forward passes go through (DDP, compiled, or the same).

    The tensors below live on the device and are read only when a line is logged: loss_sum (fp64, this rank's
    share since the last line), grad_norm (of the last step), and of skipped steps the current run, the
    longest run and the total. loss_count is what loss_sum, over all ranks, is to be divided by. order is the
    running digest of the rows of every global batch since step order_since; rows are those of the last one.
    """

    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    place: Place = field(default_factory=Place)
    step: int = 0  # steps that are done
    order: str = ""
    order_since: int = 0
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    loss_count: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    stop: str | None = None  # why to stop at this boundary
    loss_sum: torch.Tensor = field(init=False)
    grad_norm: torch.Tensor = field(init=False)
    nonfinite_run: torch.Tensor = field(init=False)
    nonfinite_worst: torch.Tensor = field(init=False)
    nonfinite_total: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.grad_norm = torch.zeros((), device=self.device)
        self.nonfinite_run = torch.zeros((), dtype=torch.int64, device=self.device)
        self.nonfinite_worst = torch.zeros((), dtype=torch.int64, device=self.device)
        self.nonfinite_total = torch.zeros((), dtype=torch.int64, device=self.device)

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """Optimizer state as '<parameter>/<key>' -> tensor."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def load_optimizer_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse. Raises ValueError for a tensor that belongs to no parameter."""
        parameters = dict(self.model.named_parameters())
        states: dict[str, dict[str, torch.Tensor]] = {}
        for path, tensor in tensors.items():
            name, _, key = path.rpartition("/")
            if name not in parameters:
                raise ValueError(f"{path}: the model has no such parameter")
            states.setdefault(name, {})[key] = tensor.to(parameters[name].device)
        for name, state in states.items():
            self.optimizer.state[parameters[name]] = state

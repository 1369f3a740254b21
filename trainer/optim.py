"""Parameter groups, the optimizers, and the learning rate as a pure function of the step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plainloop.trainer.config.options import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Return two groups: weights with decay, and vectors (biases and norm weights) without."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]


class Adafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer & Stern 2018), as torch.optim.Adafactor computes it, but without host syncs, and on
    the shards of FSDP too.

    torch's version reads the norm of every weight and of every update on the host (two host syncs per
    parameter). Here norms and step counts stay on the device, and `found_inf` = 1 skips a step there. State,
    with torch's names: step, and row_var and col_var for matrices or variance for vectors. Of a sharded
    parameter, they are sharded with it, except the step and the col_var of a matrix.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, object]], *, lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], group["weight_decay"])

    def _update(self, parameter: Tensor, lr: float, weight_decay: float) -> None:
        """beta2 = 1 - step ** -0.8; step size = max(1e-3, RMS(weight)) * min(lr, step ** -0.5), divided by
        max(1, RMS(update)).
        """
        if not self.state[parameter]:
            self.state[parameter] = _new_state(parameter)
        state = {name: _local(tensor) for name, tensor in self.state[parameter].items()}
        weight, gradient = _local(parameter), _local(cast(Tensor, parameter.grad))
        total, tiny = _sum_over_shards(parameter), torch.finfo(weight.dtype).eps ** 2

        def rms(tensor: Tensor) -> Tensor:
            return total(tensor.norm().square()).div(parameter.numel()).sqrt()

        active = torch.ones((), device=weight.device)
        if self.found_inf is not None:
            active = 1 - self.found_inf
            gradient = torch.where(self.found_inf > 0, 0.0, gradient)
        state["step"] += active
        step = state["step"].clamp(min=1.0)
        forget = active * step**-0.8
        size = active * rms(weight).clamp(min=1e-3) * (step**-0.5).clamp(max=lr)
        if weight_decay:
            weight.mul_(1 - active * (lr * weight_decay))
        if gradient.ndim > 1:
            # Rows are whole on each rank. Columns are whole only if there are more dimensions.
            across = total if gradient.ndim == 2 else lambda tensor: tensor
            height, width = parameter.shape[-2:]
            rows, columns = state["row_var"], state["col_var"]
            rows.lerp_(gradient.norm(dim=-1, keepdim=True).square_().div_(width), forget)
            columns.lerp_(across(gradient.norm(dim=-2, keepdim=True).square_()).div_(height), forget)
            mean = across(rows.sum(dim=-2, keepdim=True)).div_(height)
            variance = (rows * columns).div_(mean.clamp_(min=tiny**0.5))
        else:
            variance = state["variance"].lerp_(gradient.square(), forget).clone()
        update = variance.clamp_(min=tiny).rsqrt_().mul_(gradient)
        weight.sub_(update.mul_(size / rms(update).clamp(min=1.0)))


def _new_state(parameter: Tensor) -> dict[str, Tensor]:
    gradient = cast(Tensor, parameter.grad)
    state = {"step": torch.zeros((), device=parameter.device)}
    if parameter.ndim == 1:
        return state | {"variance": torch.zeros_like(gradient)}
    if parameter.ndim == 2:  # sums over all rows, also those of other ranks
        columns = _local(gradient).new_zeros((1, parameter.shape[1]))
    else:
        columns = torch.zeros_like(gradient[..., :1, :])
    return state | {"row_var": torch.zeros_like(gradient[..., :1]), "col_var": columns}


def _local(tensor: Tensor) -> Tensor:
    return cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor


def _sum_over_shards(parameter: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that sums a tensor, in place, over the ranks that share a parameter."""
    if not hasattr(parameter, "device_mesh"):
        return lambda tensor: tensor
    mesh = parameter.device_mesh
    group = mesh.get_group(mesh.ndim - 1)

    def total(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=group)
        return tensor

    return total


def adamw_8bit(groups: list[dict[str, object]], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW with both moments in 8 bits, in blocks of 256 with a scale each (Dettmers et al. 2022), by
    bitsandbytes. Tensors of fewer than 4,096 numbers keep fp32 moments.

    Unlike the others it waits for the device: once per step, to know whether to skip it, and bitsandbytes
    itself after each tensor.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # notes about kernels that are not used here
    from bitsandbytes.optim import AdamW8bit

    class Skipping(AdamW8bit):
        """Skips a step if `found_inf` is set. Between steps, the counts are tensors, as in torch."""

        _step_supports_amp_scaling = True
        found_inf: Tensor | None = None

        @torch.no_grad()
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            for i, group in enumerate(self.param_groups):
                for j, parameter in enumerate(group["params"]):
                    if parameter.grad is not None and not self.state[parameter]:
                        self.init_state(group, parameter, i, j)
                        maps = {k: v.clone() for k, v in self.state[parameter].items() if "qmap" in k}
                        self.state[parameter] |= maps  # shared by all parameters, which can't be saved
            skip = self.found_inf is not None and bool(self.found_inf)
            for state in self.state.values():
                state["step"] = int(state["step"])
            if not skip:
                super().step()
            for state in self.state.values():
                state["step"] = torch.tensor(float(state["step"]))

    optimizer: torch.optim.Optimizer = Skipping(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    return optimizer


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Fused AdamW (Loshchilov & Hutter 2019, decoupled weight decay; one kernel), the same with moments in 8
    bits, or Adafactor (no first moment, second moments per row and column, steps relative to the weights).
    All can skip a step.
    """
    groups = parameter_groups(model, config.weight_decay)
    if config.name == "adamw8bit":
        return adamw_8bit(groups, config)
    if config.name == "adafactor":
        return Adafactor(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """Return lr(step) for step 0 ... total_steps - 1: linear warmup to config.lr, then the schedule."""
    warmup = config.warmup if config.warmup >= 1 else config.warmup * total_steps
    warmup_steps = min(round(warmup), total_steps)
    decay_steps = max(1, total_steps - warmup_steps)

    def lr(step: int) -> float:
        if step < warmup_steps:
            return config.lr * (step + 1) / warmup_steps
        done = (step - warmup_steps) / decay_steps
        factor = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
        return config.lr * factor[config.schedule]

    return lr

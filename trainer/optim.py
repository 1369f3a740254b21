"""Parameter groups, the optimizers, and the learning rate as a pure function of the step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
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
    """Adafactor (Shazeer & Stern 2018), as torch.optim.Adafactor computes it, but without host syncs.

    torch's version reads the norm of every weight and of every update on the host (two host syncs per
    parameter). Here norms and step counts stay on the device, and `found_inf` = 1 skips a step there. State,
    with torch's names: step, and row_var and col_var for matrices or variance for vectors.
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
                    self._update(parameter, parameter.grad, group["lr"], group["weight_decay"])

    def _update(self, weight: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> None:
        """beta2 = 1 - step ** -0.8; step size = max(1e-3, RMS(weight)) * min(lr, step ** -0.5), divided by
        max(1, RMS(update)).
        """
        state, tiny = self.state[weight], torch.finfo(weight.dtype).eps ** 2
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            if gradient.ndim > 1:
                state["row_var"] = torch.zeros_like(gradient[..., :1])
                state["col_var"] = torch.zeros_like(gradient[..., :1, :])
            else:
                state["variance"] = torch.zeros_like(gradient)
        active = torch.ones((), device=weight.device)
        if self.found_inf is not None:
            active = 1 - self.found_inf
            gradient = torch.where(self.found_inf > 0, 0.0, gradient)
        state["step"] += active
        step = state["step"].clamp(min=1.0)
        forget = active * step**-0.8
        size = active * (weight.norm() / weight.numel() ** 0.5).clamp(min=1e-3) * (step**-0.5).clamp(max=lr)
        if weight_decay:
            weight.mul_(1 - active * (lr * weight_decay))
        if gradient.ndim > 1:
            for name, dim in (("row_var", -1), ("col_var", -2)):
                mean = gradient.norm(dim=dim, keepdim=True).square_().div_(gradient.shape[dim])
                state[name].lerp_(mean, forget)
            rows = state["row_var"]
            variance = (rows * state["col_var"]).div_(rows.mean(dim=-2, keepdim=True).clamp_(min=tiny**0.5))
        else:
            variance = state["variance"].lerp_(gradient.square(), forget).clone()
        update = variance.clamp_(min=tiny).rsqrt_().mul_(gradient)
        size = size / (update.norm() / update.numel() ** 0.5).clamp(min=1.0)
        weight.sub_(update.mul_(size))


def adamw_8bit(groups: list[dict[str, object]], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW with both moments in 8 bits, in blocks of 256 with a scale each (Dettmers et al. 2022), by
    bitsandbytes. Tensors of fewer than 4,096 numbers keep fp32 moments.

    Unlike the others it waits for the device once per step, to know whether to skip it.
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

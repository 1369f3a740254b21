"""Parameter groups, the optimizers, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from plainloop.trainer.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: decayed weights, and the rest, without (vectors: biases and norm weights)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Fused AdamW (Loshchilov & Hutter 2019, decoupled decay): one kernel, which can skip a step. Or
    Adafactor (Shazeer & Stern 2018): no first moment, second moments by row and column, steps relative to
    the weights.
    """
    groups = parameter_groups(model, config.weight_decay)
    if config.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """lr(step) for step 0 ... total_steps - 1: linear warm-up that ends at lr, then the schedule."""
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

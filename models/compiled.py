"""torch.compile for batches of varying size."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn


def compile_training(module: nn.Module, num_shapes: int = 0) -> None:
    """Compile a module's forward pass in training, in place; in evaluation it stays as it is.

    num_shapes 0: one graph with symbolic sizes. Otherwise: one graph for each of the `num_shapes` padded
    shapes, with kernels for fixed lengths; only the first dimension of each input stays symbolic.
    """
    # `forward` alone, so that FSDP's hooks stay outside: Module.compile includes them, and torch 2.13 aborts.
    eager = module.forward
    fast = torch.compile(eager, dynamic=None if num_shapes else True)
    # The layers of a network share their code and with it this limit. Up to eight graphs per shape: T5 has
    # two stacks whose first layers differ, and a batch of one row is specialised.
    limit = max(torch._dynamo.config.recompile_limit, 8 * num_shapes + 8)
    torch._dynamo.config.recompile_limit = limit

    @functools.wraps(eager)
    def forward(*args: Any, **inputs: Any) -> Any:
        if not module.training:
            return eager(*args, **inputs)
        if num_shapes:
            for tensor in (*args, *inputs.values()):
                if isinstance(tensor, Tensor):
                    _fix_lengths(tensor)
        return fast(*args, **inputs)

    module.forward = forward


def _fix_lengths(tensor: Tensor) -> None:
    """Only the first dimension is symbolic."""
    torch._dynamo.maybe_mark_dynamic(tensor, 0)
    for dimension in range(1, tensor.ndim):
        torch._dynamo.mark_static(tensor, dimension)

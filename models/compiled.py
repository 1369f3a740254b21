"""torch.compile for batches of varying size."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


def compiled(model: nn.Module, num_shapes: int = 0) -> nn.Module:
    """Compile a model. num_shapes 0: one graph with symbolic sizes. Otherwise: one graph for each of
    the `num_shapes` padded shapes, with kernels for fixed lengths; the number of rows stays symbolic.
    """
    if not num_shapes:
        return cast(nn.Module, torch.compile(model, dynamic=True))
    # Two graphs per shape, as a batch of one row is specialised; 8 more for other inputs of a caller.
    limit = max(torch._dynamo.config.recompile_limit, 2 * num_shapes + 8)
    torch._dynamo.config.recompile_limit = limit
    return ByWidth(model)


class ByWidth(nn.Module):
    """A compiled model in which only the first dimension of each input is symbolic."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.compiled = cast(nn.Module, torch.compile(model))

    def forward(self, **inputs: Tensor) -> Any:
        for tensor in inputs.values():
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
            for dimension in range(1, tensor.ndim):
                torch._dynamo.mark_static(tensor, dimension)
        return self.compiled(**inputs)

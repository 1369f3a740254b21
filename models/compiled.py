"""torch.compile for batches of changing size."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


def compiled(model: nn.Module, num_shapes: int = 0) -> nn.Module:
    """num_shapes 0: one graph with symbolic sizes. Else one for each padded width, of which there are so
    many: kernels for fixed lengths, while the number of rows stays symbolic.
    """
    if not num_shapes:
        return cast(nn.Module, torch.compile(model, dynamic=True))
    # One row is a case of its own; and there is room for what else a caller may bring.
    limit = max(torch._dynamo.config.recompile_limit, 2 * num_shapes + 8)
    torch._dynamo.config.recompile_limit = limit
    return ByWidth(model)


class ByWidth(nn.Module):
    """A compiled model that takes tensors whose first size alone is symbolic."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.compiled = cast(nn.Module, torch.compile(model))

    def forward(self, **inputs: Tensor) -> Any:
        for tensor in inputs.values():
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
            for dimension in range(1, tensor.ndim):
                torch._dynamo.mark_static(tensor, dimension)
        return self.compiled(**inputs)

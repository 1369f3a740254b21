"""torch.compile for batches of varying size."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

SYMBOLIC = 64  # graphs that may be needed besides those of padded shapes; torch would stop at 8


def compile_training(module: nn.Module, num_shapes: int = 0) -> None:
    """Compile a module's forward pass in training, in place; in evaluation it stays as it is.

    num_shapes 0: graphs with symbolic sizes. Otherwise: one graph for each of the `num_shapes` padded shapes,
    with kernels for fixed lengths; of each tensor that is an argument, the first dimension stays symbolic.
    """
    config, shapes = torch._dynamo.config, torch.fx.experimental._config
    # Sizes that happen to be equal in one batch must not give it a graph of its own: which batches came first
    # would decide how the others are rounded, and a resumed run has others.
    shapes.use_duck_shape = False
    # The layers of a network share their code and with it these limits, beyond which nothing is compiled. T5
    # has two stacks whose first layers differ, and a batch of one row has its own graph: eight per shape.
    config.recompile_limit = max(config.recompile_limit, 8 * num_shapes + SYMBOLIC)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 2 * config.recompile_limit)
    # By its class, as FSDP does it, and not by an attribute: a copy of the module must run its own weights.
    module.__class__ = _compiled_class(cast(Any, type(module)), num_shapes)


@functools.cache
def _compiled_class(kind: Any, num_shapes: int) -> type[nn.Module]:
    """A subclass whose forward pass is compiled. One for all layers of a kind, which thereby share graphs."""
    # `forward` alone, so that FSDP's hooks stay outside: Module.compile includes them, and torch 2.13 aborts.
    eager = kind.forward
    fast = torch.compile(eager, dynamic=None if num_shapes else True)

    @functools.wraps(eager)
    def forward(self: nn.Module, *args: Any, **inputs: Any) -> Any:
        if not self.training:
            return eager(self, *args, **inputs)
        if num_shapes:
            for tensor in (*args, *inputs.values()):
                if isinstance(tensor, Tensor):
                    _fix_lengths(tensor)
        return fast(self, *args, **inputs)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _fix_lengths(tensor: Tensor) -> None:
    """Only the first dimension is symbolic."""
    torch._dynamo.maybe_mark_dynamic(tensor, 0)
    for dimension in range(1, tensor.ndim):
        torch._dynamo.mark_static(tensor, dimension)

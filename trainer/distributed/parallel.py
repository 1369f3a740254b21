"""How a model is spread over the ranks: whole on each of them (DDP), or in shards (FSDP2).

The loop calls a Parallel and knows neither.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from plainloop.trainer.distributed.world import World
from plainloop.trainer.errors import InputError


class Parallel:
    """A model on one rank. module runs the forward passes."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def syncing(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Context of a micro-batch's forward and backward pass. last: of this step."""
        return contextlib.nullcontext()

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        """L2 norm of the gradient of the whole model, 0-dim, the same on all ranks."""
        return get_total_norm(gradients)

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)

    def after_first_pass(self, optimizer: torch.optim.Optimizer) -> None:
        """Called once, after the first backward pass of the warm-up."""

    def shard_of(self, rank: int) -> int:
        """Which shard a rank holds. Ranks with the same shard must have the same weights."""
        return 0


class Replicated(Parallel):
    """DistributedDataParallel: every rank holds the model, gradients are all-reduced once per step.

    If some parameters are never used, the model or its network must have the attribute unused_parameters =
    True: DDP then looks for them at each pass. Otherwise it would wait for their gradients.
    """

    def __init__(self, module: nn.Module, world: World) -> None:
        ids = [world.device.index] if world.device.type == "cuda" else None
        # No buffer of these networks changes, so none is broadcast. torch 2.13 renamed the option.
        known = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {name: False}
        options["find_unused_parameters"] = _has(module, "unused_parameters")
        self.ddp = DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True, **options)
        super().__init__(self.ddp)

    def syncing(self, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if last else self.ddp.no_sync()

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero the gradients in DDP's buckets: under no_sync, a new gradient would be allocated outside the
        buckets, at the cost of 4 bytes per parameter and a copy.
        """
        optimizer.zero_grad(set_to_none=False)

    def after_first_pass(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)  # frees the buckets, which DDP replaces now


class Sharded(Parallel):
    """FSDP2: every rank holds some rows of each parameter, of its gradient and of its optimizer state.

    A pass gathers the weights of one block at a time. Every micro-batch reduces its gradients to the shards:
    otherwise each rank would hold the gradient of the whole model between micro-batches.
    """

    def __init__(self, module: nn.Module, shards: int) -> None:
        super().__init__(module)
        self.shards = shards

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        norm: Any = get_total_norm(gradients)
        return cast(Tensor, norm.full_tensor())

    def shard_of(self, rank: int) -> int:
        return rank % self.shards


def parallelise(
    module: nn.Module, world: World, compile_module: Callable[[nn.Module], None] | None = None
) -> Parallel:
    """All ranks. Spread a model over the ranks, unless `shard` has done so. compile_module: compiles a
    module in place. It gets the whole model or, if that is sharded, each block, since each gathers its
    weights by itself. Raises InputError.
    """
    if world.size > 1 and _has(module, "separate_experts"):
        raise InputError(
            "model.path: a model whose experts are separate layers, such as Switch Transformers, can only be"
            " trained by one process: an expert has no gradient on the ranks that did not use it."
        )
    shards = getattr(module, "plainloop_shards", 0)
    if compile_module:
        for part in (blocks(module) if shards else []) or [module]:
            compile_module(part)
    if shards:
        return Sharded(module, shards)
    return Replicated(module, world) if world.size > 1 else Parallel(module)


def shard(model: nn.Module, world: World, *, shard_size: int | None, gather_dtype: str) -> None:
    """All ranks. Shard a model in place with FSDP2, on the meta device or not; its blocks and the rest.

    shard_size: ranks that hold one copy of the model; default: all. If fewer, consecutive ranks share a copy
    and the copies are kept equal by all-reduces. gather_dtype: in which weights are gathered, "fp32" or
    "bf16"; gradients are always summed in fp32. Raises InputError.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    shards = shard_size or world.size
    if world.size == 1:
        raise InputError(
            "parallel fsdp: needs several processes; start with torchrun, or use --parallel ddp."
        )
    if world.size % shards or shards == 1:
        raise InputError(
            f"parallel.shard_size {shards}: must be at least 2 and divide the number of ranks, {world.size}."
        )
    # A warning for in-place operations on a block's output, of which there are none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    sizes = (shards,) if shards == world.size else (world.size // shards, shards)
    names = ("replica", "shard")[-len(sizes) :]
    mesh = init_device_mesh(world.device.type, sizes, mesh_dim_names=names)
    for group in mesh.get_all_groups():  # never freed: see world.process_group
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    dtype = {"fp32": None, "bf16": torch.bfloat16}[gather_dtype]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.plainloop_shards = shards  # type: ignore[assignment]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformer: the elements of its outermost lists of modules, or of lists in them."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList) and not any(isinstance(e, nn.ModuleList) for e in child):
            found += list(child)
        else:
            found += blocks(child)
    return found


def _has(module: nn.Module, flag: str) -> bool:
    """Whether a model, or the network in it, has an attribute that is True."""
    return any(getattr(part, flag, False) for part in (module, getattr(module, "network", module)))


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds: its rows of a sharded one, or all."""
    return cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor


def first_row(tensor: Tensor) -> int:
    """Where this rank's rows of a tensor start. FSDP splits n rows as torch.chunk: ceil(n / shards) each."""
    if not hasattr(tensor, "device_mesh"):
        return 0
    mesh = tensor.device_mesh
    chunk = -(-tensor.shape[0] // mesh.size(-1))
    return min(chunk * mesh.get_local_rank(mesh.ndim - 1), tensor.shape[0])


def like(parameter: Tensor, rows: Tensor) -> Tensor:
    """Make a tensor with as many rows as `parameter`, and spread as it is, of this rank's rows of it."""
    if not hasattr(parameter, "device_mesh"):
        return rows
    from torch.distributed.tensor import DTensor

    mesh, places = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    whole = torch.empty(parameter.shape[:1] + rows.shape[1:], device="meta")
    return DTensor.from_local(rows, mesh, places, run_check=False, shape=whole.shape, stride=whole.stride())

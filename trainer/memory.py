"""What a rank needs: memory and time of a forward and backward pass, measured; for `plainloop doctor`."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from plainloop.data.types import InputError, MicroBatch
from plainloop.trainer.config import TrainConfig
from plainloop.trainer.distributed import World
from plainloop.trainer.errors import is_out_of_memory
from plainloop.trainer.loop import StepOptions, add_gradients, clear_gradients
from plainloop.trainer.optim import make_optimizer
from plainloop.trainer.precision import make_scaler
from plainloop.trainer.state import TrainState
from plainloop.trainer.tasks import Task

RESERVE = 1 << 30  # bytes: of a CUDA context, or of Python and its libraries
BACKWARD = 1.25  # activations' gradients and workspaces on top of what forward keeps


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass, measured: padded tokens in it, seconds, bytes that forward keeps for
    backward (activations, and casts of the weights to 16 bits), and how many parameters there are.
    """

    tokens: int
    seconds: float
    activations: int
    casts: int
    parameters: int

    def memory(self, tokens: int, optimizer: str) -> int:
        """Bytes of a rank with micro-batches of so many padded tokens: weights and gradients in fp32, AdamW's
        two moments, what forward keeps for backward (measured), and a reserve.
        """
        state = 8 if optimizer == "adafactor" else 16
        activations = BACKWARD * self.activations / self.tokens * tokens
        return int(state * self.parameters + self.casts + activations) + RESERVE

    def fitting(self, memory: int, optimizer: str) -> int:
        """The largest tokens_per_device for this memory, in whole 256; 0 when not even that fits."""
        per_token = BACKWARD * self.activations / self.tokens
        return max(0, int((memory - self.memory(0, optimizer)) / per_token / 256)) * 256


class _Casts(TorchDispatchMode):
    """Notes the storages of what autocast makes of the weights: their size does not grow with the tokens."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.weights, self.storages = weights, set[int]()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten._to_copy.default and _storage(args[0]) in self.weights:
            self.storages.add(_storage(result))
        return result


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def measure_pass(
    model: torch.nn.Module, task: Task, micro_batch: MicroBatch, world: World, config: TrainConfig
) -> Pass:
    """Two forward and backward passes, without an optimizer step. Raises InputError if memory runs out."""
    device = world.device
    try:
        model.to(device).train()
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"not even the weights fit into memory: is another program there? ({error})"
        ) from None
    optimizer, scaler = make_optimizer(model, config.optim), make_scaler(config.precision, device)
    state = TrainState(model, model, optimizer, scaler, device)
    options = StepOptions(task.loss_sum, lambda _: 0.0, world, config.seed, config.precision, 0.0)
    weights = {_storage(p) for p in model.parameters()}
    kept: dict[int, int] = {}  # bytes of each storage: a tensor may be kept for several operations

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in weights:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself would be a circle, left in memory by an error in forward

    with saved_tensors_hooks(note, lambda tensor: tensor), _Casts(weights) as casts:
        _pass(state, micro_batch, options)
    _wait(device)
    started = time.perf_counter()
    _pass(state, micro_batch, options)
    _wait(device)
    seconds = time.perf_counter() - started
    tokens = sum(t.numel() for name, t in micro_batch[0].items() if name.endswith("input_ids"))
    cast = sum(size for storage, size in kept.items() if storage in casts.storages)
    parameters = sum(p.numel() for p in model.parameters())
    return Pass(tokens, seconds, sum(kept.values()) - cast, cast, parameters)


def _pass(state: TrainState, micro_batch: MicroBatch, options: StepOptions) -> None:
    try:
        add_gradients(state, micro_batch, 1.0, options)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise InputError(f"the largest micro-batch does not fit into memory: {error}") from None
        raise
    clear_gradients(state)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_of(world: World) -> tuple[int, str]:
    """Bytes that a rank may have, and where that is known from."""
    if world.device.type == "cuda":
        found = torch.cuda.get_device_properties(world.device)
        return found.total_memory, found.name
    node, cpu, cpus = (
        int(value) if (value := os.environ.get(f"SLURM_{name}", "")).isdigit() else 0
        for name in ("MEM_PER_NODE", "MEM_PER_CPU", "CPUS_ON_NODE")
    )
    if given := node or cpu * cpus:
        return given << 20, "the job has on a node, for all its ranks"
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) << 10, "this machine has free"


def parameters_of(config: Any) -> int:
    """Of a transformers config, without its weights: the network is built on the meta device."""
    from transformers import AutoModel

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModel.from_config(config).parameters())

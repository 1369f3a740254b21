"""The memory a rank needs, for `plainloop doctor`: measured here, or estimated for other machines."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from plainloop.data.samplers import total_lengths
from plainloop.data.types import MicroBatch
from plainloop.trainer.checkpoint.folder import checkpoint_bytes
from plainloop.trainer.config.command_options import DoctorConfig
from plainloop.trainer.config.options import MOMENTS, PeftConfig, TrainConfig
from plainloop.trainer.config.validate import validate
from plainloop.trainer.distributed.world import World
from plainloop.trainer.errors import CheckWarning, InputError, is_out_of_memory
from plainloop.trainer.loop import StepOptions, add_gradients
from plainloop.trainer.run import new_state
from plainloop.trainer.state import TrainState
from plainloop.trainer.tasks import base as tasks
from plainloop.trainer.tasks.base import Dataset, Task
from plainloop.trainer.tasks.find import find_task
from plainloop.trainer.tasks.footprint import RESERVE, Footprint, footprint, made_up_data
from plainloop.trainer.tasks.model import load_model

OF_DDP = "that is for ddp: for fsdp, give --gpus and --gpu_gb"
SAMPLE = 256  # training examples to tokenise for a check
BACKWARD = 1.25  # factor for activation gradients and workspaces on top of saved activations


class TooLarge(InputError):
    """The model or its batch does not fit into memory."""


@dataclass(frozen=True)
class Pass:
    """A measured forward and backward pass: padded tokens, seconds, bytes saved for backward (activations,
    and 16-bit casts of the weights), bytes of the weights, and number of trained parameters.
    """

    tokens: int
    seconds: float
    activations: int
    casts: int
    weights: int
    trained: int

    def memory(self, tokens: int, optimizer: str) -> int:
        """Bytes a rank needs for micro-batches of this many padded tokens: weights, gradients in fp32,
        AdamW's two moments, what forward saves for backward (measured), and a reserve.
        """
        state = self.weights + (4 + MOMENTS[optimizer]) * self.trained
        activations = BACKWARD * self.activations / self.tokens * tokens
        return int(state + self.casts + activations) + RESERVE

    def fitting(self, memory: int, optimizer: str) -> int:
        """The largest multiple of 256 for tokens_per_device that fits into this memory; 0 if none does."""
        per_token = BACKWARD * self.activations / self.tokens
        return max(0, int((memory - self.memory(0, optimizer)) / per_token / 256)) * 256


class _Casts(TorchDispatchMode):
    """Record the storages of autocast's casts of the weights: their size does not grow with the tokens."""

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


def measure(task: Task, data: Dataset, config: TrainConfig, world: World, max_tokens: int) -> Pass:
    """Load the whole model and measure its largest micro-batch; if that does not fit, a smaller one.

    Raises TooLarge if nothing fits; CheckWarning if the run would shard the model; InputError.
    """
    try:
        return _measure(task, data, config, world, max_tokens)
    except TooLarge as error:
        if config.parallel.mode == "fsdp":
            raise CheckWarning(f"not measured: {error}; {OF_DDP}") from None
        raise


def _measure(task: Task, data: Dataset, config: TrainConfig, world: World, max_tokens: int) -> Pass:
    config = replace(config, model=replace(config.model, compile=False))
    try:
        model = load_model(task, config.model.path, config, world, new_head=True)
    except torch.OutOfMemoryError as error:
        raise TooLarge(
            f"not even the weights fit into memory: is another program using the GPU? ({error})"
        ) from None
    state = new_state(model.train(), config, world)
    options = StepOptions(task.loss_sum, lambda _: 0.0, world, config.seed, config.precision, 0.0)
    while True:
        steps = tasks.make_steps(task, data, config, world, max_tokens=max_tokens)
        try:
            return measure_pass(state, steps.largest()[0], options)
        except InputError:
            if max_tokens < 1024:
                raise
            max_tokens //= 4


def measure_pass(state: TrainState, micro_batch: MicroBatch, options: StepOptions) -> Pass:
    """Run two forward and backward passes without an optimizer step. Raises InputError if memory runs out."""
    model, device = state.model, state.device
    weights = {_storage(p) for p in model.parameters()}
    kept: dict[int, int] = {}  # bytes of each storage: a tensor may be saved for several operations

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in weights:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself would be a reference cycle, leaked by an error in forward

    with saved_tensors_hooks(note, lambda tensor: tensor), _Casts(weights) as casts:
        _pass(state, micro_batch, options)
    _wait(device)
    started = time.perf_counter()
    _pass(state, micro_batch, options)
    _wait(device)
    seconds = time.perf_counter() - started
    tokens = sum(t.numel() for name, t in micro_batch[0].items() if name.endswith("input_ids"))
    cast = sum(size for storage, size in kept.items() if storage in casts.storages)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Pass(tokens, seconds, sum(kept.values()) - cast, cast, size, trained)


def _pass(state: TrainState, micro_batch: MicroBatch, options: StepOptions) -> None:
    try:
        add_gradients(state, micro_batch, 1.0, options)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise TooLarge(f"the largest micro-batch does not fit into memory: {error}") from None
        raise
    state.parallel.clear_gradients(state.optimizer)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_of(world: World) -> tuple[int, str]:
    """Return the bytes available to a rank, and a description of them."""
    if world.device.type == "cuda":
        found = torch.cuda.get_device_properties(world.device)
        return found.total_memory, found.name
    node, cpu, cpus = (
        int(value) if (value := os.environ.get(f"SLURM_{name}", "")).isdigit() else 0
        for name in ("MEM_PER_NODE", "MEM_PER_CPU", "CPUS_ON_NODE")
    )
    if given := node or cpu * cpus:
        return given << 20, "the job's memory per node, for all ranks"
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) << 10, "free memory of this machine"


def estimate(config: DoctorConfig, scratch: Path) -> int:
    """Print what the run needs as configured, and in other layouts. Return 1 if it does not fit as it is.

    Raises InputError.
    """
    started, memory = time.monotonic(), (config.gpu_gb or 0.0) * 1e9
    config = replace(config, precision="bf16" if config.precision == "auto" else config.precision)
    task = find_task(config.task)(config)
    made_up = config.data.train is None
    given = replace(config, data=replace(config.data, train="made up" if made_up else config.data.train))
    validate(given, uses=task.uses, metric_names=task.metric_names)
    data = made_up_data(task, config, scratch) if made_up else _sample(task, config, scratch)
    row = int(total_lengths(data.store.row_lengths).max())
    wanted = max(row, min(config.max_tokens("cuda"), config.batch_size * row))
    known, code = dict[str, Footprint](), 0
    for number, layout in enumerate(layouts(config)):
        key = repr((layout.peft, layout.model))
        try:
            if key not in known:
                known[key] = footprint(task, data, layout, wanted)
        except InputError as error:
            if number == 0:
                raise
            print(f"      {described(layout)}: {error}", flush=True)
            continue
        found, shards = known[key], layout_shards(layout, config.gpus)
        options: dict[str, Any] = {"shards": shards, "gather_dtype": layout.parallel.gather_dtype}
        needed, fits = found.memory(wanted, **options), found.fitting(memory, **options)
        if number == 0:
            rows = "" if made_up else " of this data"
            print(
                f"{config.model.path}: {found.parameters / 1e6:.1f} M parameters, {config.optim.name},"
                f" {config.precision}, micro-batches of {wanted} tokens, the longest rows{rows}"
            )
            code = int(needed > memory)
        level = "ok" if needed <= memory else ("FAIL" if number == 0 else "no")
        text = f"{described(layout)}: {needed / 1e9:.1f} GB"
        text += f", a checkpoint of {checkpoint_size(found, layout) / 1e9:.2f} GB"
        one_row = found.memory(row, **options) <= memory
        text += f"; up to {max(row, fits)} tokens fit" if one_row else "; the longest row does not fit"
        print(f"{level:4}  {text}", flush=True)
    shares = ", with fsdp a share on each rank" if can_shard(config) else ""
    print(f"a save needs as much host memory as the checkpoint: on rank 0{shares}")
    print(f"estimated for {config.gpus} x {memory / 1e9:.0f} GB in {time.monotonic() - started:.0f} s")
    return code


def can_shard(config: DoctorConfig) -> bool:
    return config.gpus > 1 and config.optim.name != "adamw8bit"


def layouts(config: DoctorConfig) -> Iterator[TrainConfig]:
    """The configured run first, then others that need less memory."""
    yield config
    less = replace(config, model=replace(config.model, activation_checkpointing=True))
    if can_shard(config) and config.parallel.mode == "ddp":
        sharded = replace(config.parallel, mode="fsdp")
        yield replace(config, parallel=sharded)
        yield replace(less, parallel=sharded)
    elif not config.model.activation_checkpointing:
        yield less
    if can_shard(config) and config.precision == "bf16" and config.parallel.gather_dtype == "fp32":
        yield replace(less, parallel=replace(config.parallel, mode="fsdp", gather_dtype="bf16"))
    if config.peft.rank == 0:
        base: Any = "bf16" if config.precision == "bf16" else "fp32"
        whole = replace(config.parallel, mode="ddp", shard_size=None, gather_dtype="fp32")
        yield replace(config, peft=PeftConfig(rank=16, base_dtype=base), parallel=whole)


def layout_shards(config: TrainConfig, gpus: int) -> int:
    """Into how many shards the model is cut. Raises InputError."""
    if config.parallel.mode == "ddp":
        return 1
    if gpus == 1:
        raise InputError("parallel fsdp: needs several GPUs; say how many with --gpus.")
    shards = config.parallel.shard_size or gpus
    if gpus % shards:
        raise InputError(f"parallel.shard_size {shards}: must divide the number of GPUs, {gpus}.")
    return shards


def described(config: TrainConfig) -> str:
    parts: list[str] = [config.parallel.mode]
    if config.parallel.gather_dtype == "bf16":
        parts.append("parallel.gather_dtype bf16")
    if config.model.activation_checkpointing:
        parts.append("model.activation_checkpointing true")
    if config.peft.rank:
        parts.append(f"peft.rank {config.peft.rank}, peft.base_dtype {config.peft.base_dtype}")
    return ", ".join(parts)


def checkpoint_size(found: Footprint, config: TrainConfig) -> int:
    """Bytes of a checkpoint with its optimizer state."""
    kept = found.trained if config.peft.rank else found.parameters
    return checkpoint_bytes(kept, config.optim.name)


def _sample(task: Task, config: TrainConfig, scratch: Path) -> Dataset:
    data = replace(config.data, cache_dir=str(scratch), processes=1)
    limit = min(SAMPLE, config.data.limit or SAMPLE)
    one = World(0, 1, 0, torch.device("cpu"))
    small = replace(config, data=data)
    return tasks.load_split(task, "train", config.data.train or "", small, one, limit=limit)

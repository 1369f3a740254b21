"""Load the model of a task, from a model folder or a checkpoint, whole or in shards; save what it learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from plainloop.models import adapters
from plainloop.models.cpu_dropout import speed_up_dropout
from plainloop.models.load import checkpoint_activations, save_network
from plainloop.models.on_meta import NO_WEIGHTS, read_weights, weights_later
from plainloop.models.position_bias import mask_in_each_layer, share_position_bias
from plainloop.trainer.config.options import TrainConfig
from plainloop.trainer.distributed.parallel import first_row, local, shard
from plainloop.trainer.distributed.world import World
from plainloop.trainer.errors import InputError
from plainloop.trainer.run_folder.tensors import (
    Tensors,
    open_pretrained,
    open_shards,
    open_tensors,
    pretrained_folder,
)
from plainloop.trainer.tasks.base import Task


def load_model(
    task: Task, path: str, config: TrainConfig, world: World, *, new_head: bool, sharded: bool = False
) -> Any:
    """Load the task's model onto this rank's device. new_head: the head may be missing, and is initialised.
    sharded: each rank loads only its share, as config.parallel says. A folder with adapters is read together
    with its base model, config.model.path. Raises InputError.
    """
    trained = open_adapters(pretrained_folder(path))
    base = path if trained is None else config.model.path
    if trained is not None and base == path:
        raise InputError(
            f"model.path {path}: has only adapters; give a whole model, or merge them first: plainloop export"
            " RUN --out FOLDER --merge true."
        )
    weights = open_shards(Path(base))
    if weights is not None:
        weights = weights.below("weights/network.")
    elif sharded:
        weights = open_pretrained(base)
    with weights_later(weights):
        model: Any = task.load_model(base)
    if model.network.new_parameters and not new_head and trained is None:
        missing = ", ".join(model.network.new_parameters[:3])
        raise InputError(f"model.path {path}: has no trained head for this task ({missing} missing).")
    if config.peft.rank:
        _add_adapters(model, config)
    if config.model.activation_checkpointing:
        checkpoint_activations(model.network)
    if world.device.type == "cpu":
        speed_up_dropout(model.network)
    else:
        share_position_bias(model.network)
    if sharded:
        if config.parallel.gather_dtype == "bf16" and config.precision != "bf16":
            raise InputError(
                f"parallel.gather_dtype bf16 needs precision bf16, which is {config.precision} here."
            )
        if config.model.activation_checkpointing:
            mask_in_each_layer(model.network)
        size, dtype = config.parallel.shard_size, config.parallel.gather_dtype
        shard(model, world, shard_size=size, gather_dtype=dtype)
    if weights is not None:
        read_weights(model.network, weights, world.device, first_row=first_row, local=local)
    if config.peft.rank and config.peft.method == "dora" and trained is None:
        adapters.measure_magnitudes(model.network, local=local)
    if trained is not None:
        try:
            adapters.read_adapters(model.network, trained, first_row=first_row, local=local)
        except ValueError as error:
            raise InputError(f"{path}: these adapters do not fit the options peft: {error}.") from None
    return model if sharded else model.to(world.device)


def shape_model(task: Task, config: TrainConfig, device: str = "cuda") -> Any:
    """The model of config.model.path on the meta device, without weights, as load_model prepares it for a
    device: "cuda" or "cpu".
    """
    with weights_later(NO_WEIGHTS):
        model: Any = task.load_model(config.model.path)
    if config.peft.rank:
        _add_adapters(model, config)
    if config.model.activation_checkpointing:
        checkpoint_activations(model.network)
    (speed_up_dropout if device == "cpu" else share_position_bias)(model.network)
    return model


def _add_adapters(model: Any, config: TrainConfig) -> None:
    options = config.peft
    head = getattr(model, "head", None)  # of a SpanModel; a task of your own may mean something else by it
    if not isinstance(head, tuple):
        head = tuple(model.network.new_parameters)
    adapters.add_adapters(
        model.network, head, rank=options.rank, targets=options.targets, alpha=options.alpha,
        dropout=options.dropout, method=options.method, seed=config.seed,
    )  # fmt: skip
    if options.base_dtype == "bf16":
        if config.precision != "bf16":
            raise InputError(f"peft.base_dtype bf16 needs precision bf16, which is {config.precision} here.")
        adapters.frozen_in_bf16(model.network)


def open_adapters(folder: Path) -> Tensors | None:
    """The trained weights in a folder with adapters, under our names or PEFT's; None if it has none."""
    if not (folder / adapters.CONFIG_FILE).is_file():
        return None
    if (shards := open_shards(folder)) is not None:
        return shards.below("weights/network.")
    return open_tensors([folder / adapters.WEIGHTS_FILE])


def save_model(task: Task, model: Any, folder: Path, weights: dict[str, Tensor] | None) -> None:
    """Rank 0 only, in a thread. Write what from_pretrained reads, with these weights of the model; None:
    without weights. Of a model with adapters, write what PEFT reads.
    """
    network = model.network
    adapted = adapters.has_adapters(model)
    save_network(network, folder, None if weights is None or adapted else dict(weights))
    if adapted:
        named = weights and {name.removeprefix("network."): tensor for name, tensor in weights.items()}
        adapters.save_adapters(network, folder, named, save_file)
    task.tokenizer.save_pretrained(folder)

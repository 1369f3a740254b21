"""Low-rank adapters by PEFT, put into a network in place: LoRA (Hu et al. 2021), DoRA, rsLoRA.

The base weights are frozen; the adapters and the head are trained. A folder with adapters has PEFT's own
files, adapter_config.json and adapter_model.safetensors, and nothing of the base model but its configs.
"""

from __future__ import annotations

import copy
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plainloop.data.errors import InputError
from plainloop.models.on_meta import Weights

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
NAME = "default"  # PEFT's name of an adapter that is the only one


def add_adapters(
    network: Any, head: Collection[str], *, rank: int, targets: list[str], alpha: float | None,
    dropout: float, method: str, seed: int,
) -> None:  # fmt: skip
    """Freeze a network and put adapters beside its linear layers of these names. They start at zero effect.

    head: prefixes of the parameters that are trained in full. targets: last parts of module names; empty:
    PEFT's choice for the model type. alpha: the adapters are scaled by alpha / rank (rslora: / sqrt(rank));
    None: 2 x rank. method: "lora", "dora" or "rslora". Raises InputError.
    """
    peft = import_peft()
    possible = _possible_targets(network, tuple(head))
    named = ", ".join(sorted({name.rpartition(".")[2] for name in possible}))
    for target in targets:
        found = [n for n, m in network.named_modules() if f".{n}".endswith(f".{target}") and _is_layer(m)]
        if not found or not possible.issuperset(found):
            what = "is the head or shares its weight" if found else "is no linear layer of the model"
            raise InputError(f"peft.targets: {target} {what}; choose from {named}.")
    config = peft.LoraConfig(
        r=rank, target_modules=targets or None, lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout, use_dora=method == "dora", use_rslora=method == "rslora",
    )  # fmt: skip
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    try:
        peft.inject_adapter_in_model(config, network)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"peft: {reason}; name layers with --peft.targets, of {named}.") from None
    torch.manual_seed(seed)  # the same adapters however the network was loaded
    for layer in adapter_layers(network):
        for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            if NAME in part and part[NAME].weight.is_meta:
                part[NAME].to_empty(device="cpu")
        layer.reset_lora_parameters(NAME, True)
    for name, parameter in network.named_parameters():
        if name.startswith(tuple(head)):
            parameter.requires_grad_(True)


def import_peft() -> Any:
    """The peft package. Raises InputError if it is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it has notes to make
    try:
        import peft
    except ImportError:
        raise InputError("peft: the package is not installed; pip install 'plainloop[peft]'.") from None
    return peft


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is a linear layer: GPT-2's are a class of their own."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _possible_targets(network: Any, head: tuple[str, ...]) -> set[str]:
    """The names of the linear layers, without the head, which is trained in full, and without those that
    share their weight, as an output embedding may: merging would change the other layer too.
    """
    owners = Counter(id(p) for m in network.modules() for p in m.parameters(recurse=False))
    output, found = network.get_output_embeddings(), set()
    for name, module in network.named_modules():
        start = f"{name}."
        in_head = any(start.startswith(part) or part.startswith(start) for part in head)
        if _is_layer(module) and module is not output and not in_head and owners[id(module.weight)] == 1:
            found.add(name)
    return found


def has_adapters(model: Any) -> bool:
    """Whether a model, or a network, has adapters."""
    return hasattr(getattr(model, "network", model), "peft_config")


def adapter_layers(network: Any) -> list[Any]:
    """The layers with adapters: each computes base_layer(x) + scaling * lora_B(lora_A(x))."""
    from peft.tuners.lora import LoraLayer

    return [module for module in network.modules() if isinstance(module, LoraLayer)]


def frozen_in_bf16(network: Any) -> None:
    """Keep the frozen weights and biases of linear layers in bf16, to which autocast would round them for
    each product: LoRA gives the same bits. Others, such as embeddings, stay in fp32.
    """
    others = {
        id(p) for m in network.modules() if not isinstance(m, nn.Linear) for p in m.parameters(recurse=False)
    }
    for module in network.modules():
        if not isinstance(module, nn.Linear):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad and id(parameter) not in others:
                setattr(module, name, nn.Parameter(parameter.detach().bfloat16(), requires_grad=False))


@torch.no_grad()
def read_adapters(network: Any, weights: Weights, *, first_row: Callable[[Tensor], int], local: Any) -> None:
    """Fill what is trained with weights under our names or PEFT's; each process with its rows, as
    on_meta.read_weights. Raises ValueError if one is missing or has another shape.
    """
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        key = name if name in weights else peft_name(name)
        if key not in weights or weights.shape(key) != tuple(parameter.shape):
            raise ValueError(f"{name} is missing or has another shape")
        rows, start = local(parameter), first_row(parameter)
        rows.copy_(weights.rows(key, start, start + len(rows)))


@torch.no_grad()
def measure_magnitudes(network: Any, *, local: Any) -> None:
    """DoRA: set the magnitudes to the norms of the rows of the base weights, which were read or rounded only
    now. Raises InputError.
    """
    for layer in adapter_layers(network):
        for dora in layer.lora_magnitude_vector.values():
            if layer.fan_in_fan_out:
                raise InputError(
                    "peft.method dora: not with this model, whose weights are transposed; use lora."
                )
            weight = local(layer.get_base_layer().weight)
            local(dora.weight).copy_(torch.linalg.norm(weight.float(), dim=1))


def peft_name(name: str) -> str:
    """What PEFT calls a parameter in adapter_model.safetensors."""
    short = re.sub(rf"(lora_magnitude_vector)\.{NAME}\.weight$", r"\1", name)
    return "base_model.model." + re.sub(rf"\.{NAME}(\.|$)", r"\1", short)


def save_adapters(
    network: Any, folder: Path, weights: dict[str, Tensor] | None, save_file: Callable[..., None]
) -> None:
    """Write adapter_config.json and, if given, the weights, with names of the network's parameters."""
    config = copy.copy(network.peft_config[NAME])
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    heads = sorted({name.split(".")[0] for name in trained if ".lora_" not in name})
    config.modules_to_save = heads or None
    config.base_model_name_or_path = network.config._name_or_path
    config.inference_mode = True
    config.save_pretrained(folder)
    if weights is not None:
        named = {peft_name(name): tensor.contiguous() for name, tensor in weights.items()}
        save_file(named, folder / WEIGHTS_FILE, metadata={"format": "pt"})


@torch.no_grad()
def merge_adapters(network: Any) -> None:
    """Add the adapters to the base weights and remove them: the network is as before, up to rounding."""
    for layer in adapter_layers(network):
        layer.merge()
    for name, module in list(network.named_modules()):
        if name and hasattr(module, "lora_A"):
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, module.get_base_layer())
    del network.peft_config

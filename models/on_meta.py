"""Build networks without their weights, on torch's meta device, and read the weights later, by rows.

This way a network can be sharded before it has any weights, and no process needs the memory of all of them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Weights(Protocol):
    """Named tensors in files, of which some rows can be read."""

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def rows(self, name: str, start: int, stop: int) -> Tensor: ...

    def whole(self, name: str) -> Tensor: ...


class NoWeights:
    """Stands for the weights where only the shapes of a network are wanted: it stays on the meta device."""


NO_WEIGHTS = NoWeights()
_LATER: ContextVar[Weights | NoWeights | None] = ContextVar("weights that are read later", default=None)


@contextlib.contextmanager
def weights_later(weights: Weights | NoWeights | None) -> Iterator[None]:
    """In this context load_network leaves the weights out; read_weights adds them. None: no such context."""
    token = _LATER.set(weights)
    try:
        yield
    finally:
        _LATER.reset(token)


def promised_weights() -> Weights | NoWeights | None:
    """The argument of the surrounding weights_later."""
    return _LATER.get()


def build(
    auto_class: Any, path: str, config: Any, weights: Weights | NoWeights, **options: Any
) -> tuple[Any, list[str]]:
    """Return a network on the meta device and the names of its parameters that the weights lack. These are
    initialised as from_pretrained does, with torch's generator; buffers too.
    """
    from transformers import GenerationConfig

    with torch.device("meta"):
        network = auto_class.from_config(config, dtype=torch.float32, **options)
    if network.can_generate():
        with contextlib.suppress(OSError):
            network.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    if isinstance(weights, NoWeights):
        return network, []
    new = []
    for name, parameter in list(network.named_parameters()):
        key = _key(network, name, weights)
        if key is None or weights.shape(key) != tuple(parameter.shape):
            new.append(name)
            _set(network, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
            continue
        if parameter.device.type != "meta":  # made by a constructor that does not know of devices, as XLNet's
            parameter = nn.Parameter(torch.empty_like(parameter, device="meta"))
            _set(network, name, parameter)
        parameter._is_hf_initialized = True
    for name, buffer in list(network.named_buffers()):
        key = _key(network, name, weights)
        value = torch.empty_like(buffer, device="cpu") if key is None else weights.whole(key)
        setattr(value, "_is_hf_initialized", key is not None)  # noqa: B010
        _set(network, name, value)
    for module in network.modules():  # else transformers takes it for done
        module._is_hf_initialized = False
    network.initialize_weights()
    computed = network._keys_to_ignore_on_load_missing or []  # from the config alone
    return network, [name for name in new if not any(re.search(pattern, name) for pattern in computed)]


@torch.no_grad()
def read_weights(
    network: Any, weights: Weights, device: torch.device, *, first_row: Callable[[Tensor], int], local: Any
) -> None:
    """Give the parameters on the meta device memory and their values, each its own rows of the weights.

    local(parameter): the rows that this process holds; first_row(parameter): where they start. Tied
    parameters stay tied.
    """
    done: dict[int, tuple[Tensor, nn.Parameter]] = {}
    for prefix, module in network.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None or parameter.device.type != "meta":
                continue
            if id(parameter) not in done:
                key = _key(network, f"{prefix}.{leaf}" if prefix else leaf, weights)
                assert key is not None
                new = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
                rows, start = local(new), first_row(parameter)
                if rows.ndim == 0:
                    rows.copy_(weights.whole(key))
                else:
                    rows.copy_(weights.rows(key, start, start + len(rows)))
                done[id(parameter)] = parameter, new
            module._parameters[leaf] = done[id(parameter)][1]


def _key(network: Any, name: str, weights: Weights) -> str | None:
    """The name of a parameter in the weights, which may lack the base model's prefix or have old names."""
    name = name.replace(".base_layer.", ".")  # beside which there is an adapter
    names = [name, name.removeprefix(f"{network.base_model_prefix}.")]
    names += [n.replace("LayerNorm.weight", "LayerNorm.gamma") for n in names]
    names += [n.replace("LayerNorm.bias", "LayerNorm.beta") for n in names]
    return next((n for n in names if n in weights), None)


def _set(network: Any, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer, in every module that has it."""
    module_name, _, leaf = name.rpartition(".")
    old = getattr(network.get_submodule(module_name), leaf)
    for module in network.modules():
        for values in (module._parameters, module._buffers):
            for key, tensor in values.items():
                if tensor is old:
                    values[key] = value

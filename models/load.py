"""Load models and tokenizers from a folder or hub name; save models. Errors say what to do offline."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from plainloop.data.errors import InputError
from plainloop.models.families import (
    SEPARATE_EXPERTS,
    UNUSED_PARAMETERS,
    prepare,
    require_usable,
    set_everywhere,
)
from plainloop.models.on_meta import build, promised_weights

# Their feed-forward output exceeds 65,504, the largest fp16 number; under autocast nothing clamps it.
OVERFLOWS_IN_FP16 = {"t5", "mt5", "umt5", "longt5", "switch_transformers"}


def overflows_in_fp16(path: str) -> bool:
    """Return whether the model in this folder or of this hub name overflows in fp16. Raises InputError."""
    return load_config(path).model_type in OVERFLOWS_IN_FP16


def load_tokenizer(path: str, *, fast: bool = True) -> Any:
    """Load the tokenizer of a model folder or hub name. fast: require offsets. Raises InputError."""
    from transformers import AutoTokenizer

    local = is_local(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True, local_files_only=local)
    except Exception as error:  # tokenizers raises bare Exceptions for a damaged tokenizer.json
        raise InputError(_cannot_load("tokenizer", path, error)) from None
    if (fast and not tokenizer.is_fast) or not len(tokenizer):
        raise InputError(
            f"model.path {path}: has no fast tokenizer, which is needed for offsets; add a tokenizer.json."
        )
    return tokenizer


def load_config(path: str, **overrides: Any) -> Any:
    """Load the transformers config of a folder or hub name, with overrides. Raises InputError."""
    from transformers import AutoConfig

    local = is_local(path)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=local)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise InputError(_cannot_load("model", path, error)) from None
    for key, value in overrides.items():
        if not set_everywhere(config, key, value):
            raise InputError(
                f"model.path {path}: {config.model_type} models have no '{key}'; remove that option."
            )
    return config


def load_network(
    auto_class: Any,
    path: str,
    *,
    head: str | tuple[str, ...] | Callable[[Any], tuple[str, ...]] = (),
    attention: str | None = None,
    **overrides: Any,
) -> Any:
    """`auto_class.from_pretrained(path)` in fp32 with config overrides; only a head may be newly initialised.

    head: prefixes of the parameters that may be new, or a function of the network that returns them.
    attention: transformers' attn_implementation; None: its default. Raises InputError if the model can't be
    loaded, or if other weights are missing: an encoder with random layers would silently train.
    """
    import torch
    from safetensors import SafetensorError
    from transformers.utils import logging

    local, config = is_local(path), load_config(path, **overrides)
    require_usable(config, path)
    prepare(config)
    options = {} if attention is None else {"attn_implementation": attention}
    dropouts = ("attention_probs_dropout_prob", "attention_dropout", "dropout_rate")
    if attention == "flex_attention" and any(getattr(config, name, 0) for name in dropouts):
        raise InputError(
            "model.attention flex_attention: has no attention dropout; set --model.attention_dropout 0."
        )
    try:
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            if (weights := promised_weights()) is not None:
                network, new = build(auto_class, path, config, weights, **options)
                info = {"missing_keys": new, "mismatched_keys": []}
            else:
                network, info = auto_class.from_pretrained(
                    path, config=config, dtype=torch.float32, output_loading_info=True,
                    local_files_only=local, ignore_mismatched_sizes=True, **options,
                )  # fmt: skip
        finally:
            logging.set_verbosity(verbosity)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if attention is not None and "ttention" in str(error):
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"model.attention {attention}: {reason}; leave it out, or choose eager."
            ) from None
        raise InputError(_cannot_load("model", path, error)) from None
    prefixes = head(network) if callable(head) else head
    wrong = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    new = sorted({*info["missing_keys"], *wrong})
    if lost := [key for key in new if not key.startswith(prefixes)]:
        hint = "wrong folder?"
        if weights is not None:
            hint += " Or a family that can't be sharded, listed in docs/models.md: use --parallel ddp."
        raise InputError(
            f"model.path {path}: weights are missing or have the wrong shape ({', '.join(lost[:3])} ...);"
            f" {hint}"
        )
    network.new_parameters = new
    network.unused_parameters = config.model_type in UNUSED_PARAMETERS
    network.separate_experts = config.model_type in SEPARATE_EXPERTS
    return network


def save_network(network: Any, folder: Path, weights: dict[str, Any] | None) -> None:
    """Save in the format of from_pretrained. weights: a state_dict of our model, or a copy of one, with names
    that start with `network.`; None: only save the configs.
    """
    if weights is None:
        config = copy.copy(network.config)
        config.architectures = [type(network).__name__]
        config.save_pretrained(folder)
        if network.can_generate():
            network.generation_config.save_pretrained(folder)
        return
    from transformers.utils import logging

    logging.disable_progress_bar()
    prefix = "network."
    network.save_pretrained(
        folder, state_dict={name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    )


def checkpoint_activations(network: Any) -> None:
    """Recompute activations in backward. transformers 5.2x renamed the method."""
    name = "activation_checkpointing_enable"
    enable = getattr(network, name, None) or network.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise InputError(f"model.activation_checkpointing true: {error}") from None


def is_local(path: str) -> bool:
    """Return whether the model is a folder or in the hub's cache.

    If so, no network is used, and every run loads the same files. Otherwise the hub must be
    reachable: InputError after 5 s (the hub's own retries would take a minute).
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if Path(path).is_dir() or constants.HF_HUB_OFFLINE:
        return True
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise InputError(f"model.path {path}: no such folder.")
    if isinstance(try_to_load_from_cache(path, "config.json"), str):
        return True
    if not getproxies():
        url = urlsplit(constants.ENDPOINT)
        try:
            address = (url.hostname or "", url.port or (80 if url.scheme == "http" else 443))
            socket.create_connection(address, timeout=5).close()
        except OSError as error:
            raise InputError(_cannot_load("model", path, error)) from None
    return False


def _cannot_load(what: str, path: str, error: Exception) -> str:
    folder = Path(path)
    reason = " ".join(str(error).split())[:200]
    if folder.is_dir():
        return f"model.path {path}: no {what} can be loaded from this folder: {reason}"
    return (
        f"model.path {path}: no such folder, and the {what} could not be downloaded from the hub ({reason})."
        f" Offline: download it elsewhere (hf download {path} --local-dir FOLDER) and pass that folder."
    )

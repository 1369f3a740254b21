"""Where figures come from: the command, the weights, the data and the versions."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import shlex
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from plainloop.data.store import digest
from plainloop.trainer.config.parse import flatten
from plainloop.trainer.run_folder.files import sha256


def provenance(command: str, config: Any, model: str, data: Iterable[str]) -> dict[str, Any]:
    """What a file of figures says about its origin."""
    return {
        "command": command_line(command, config),
        "weights": weights_of(Path(model)),
        "data": {str(Path(file).resolve()): _digest(Path(file)) for file in data},
        "versions": versions(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _digest(path: Path) -> str:
    """The SHA-256 of a file; of a folder, a digest of its files."""
    return digest(path) if path.is_dir() else sha256(path)


def command_line(command: str, config: Any) -> str:
    """The command with the options that differ from their defaults, as a shell would read it."""
    values, default = (flatten(dataclasses.asdict(c)) for c in (config, type(config)()))
    words = ["plainloop", command]
    for name, value in values.items():
        if value != default[name]:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def weights_of(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of the weights in a model folder; {} for a Hub name."""
    patterns = ("model*.safetensors", "adapter_model.safetensors", "model.onnx*")
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    return {file.name: sha256(file) for file in files}


def versions() -> dict[str, str]:
    names = ("plainloop", "torch", "transformers", "tokenizers", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}

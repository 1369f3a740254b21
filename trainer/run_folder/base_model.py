"""The base model of adapters: what a checkpoint records of it, and whether this is still the one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from plainloop.trainer.errors import InputError
from plainloop.trainer.run_folder.files import sha256
from plainloop.trainer.run_folder.tensors import pretrained_folder


def describe_base(path: str) -> dict[str, str]:
    """The path of a model folder, or its hub name, and a SHA-256 over the weight files that are loaded from
    it. Raises InputError.
    """
    folder = pretrained_folder(path)
    kinds = ("model*.safetensors", "shard-*.safetensors", "pytorch_model*.bin")  # the first that is there
    files = next((found for kind in kinds if (found := sorted(folder.glob(kind)))), [])
    if not files:
        raise InputError(f"model.path {path}: no weights are there, which the adapters belong to.")
    digests = [f"{file.name} {sha256(file)}" for file in files]
    where = str(Path(path).resolve()) if Path(path).is_dir() else path
    return {"path": where, "sha256": hashlib.sha256("\n".join(digests).encode()).hexdigest()}


def require_base(recorded: dict[str, str], path: str) -> None:
    """Raise InputError if the model at `path` is not the one that adapters were trained with."""
    if not pretrained_folder(path).is_dir():
        raise InputError(
            f"{path}: the base model of these adapters is not there; fetch it (plainloop fetch), or say where"
            " it is with --base FOLDER (train: --model.path)."
        )
    if describe_base(path)["sha256"] != recorded["sha256"]:
        raise InputError(
            f"{path}: not the base model of these adapters, which was {recorded['path']} (SHA-256"
            f" {recorded['sha256'][:12]}...); give that one."
        )

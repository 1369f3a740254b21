"""calibration.json: beside the weights that it was fitted for, with their digests and its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from plainloop.data.errors import InputError
from plainloop.trainer.config.options import TrainConfig
from plainloop.trainer.run_folder.files import write_atomically
from plainloop.trainer.trained.provenance import weights_of

NAME = "calibration.json"


class Calibration(NamedTuple):
    """contexts: digests of those of the half that was used to fit."""

    null_threshold: float
    temperature: float
    contexts: frozenset[str]


def windows(max_length: int, stride: int, max_answer_length: int) -> dict[str, Any]:
    return {"max_length": max_length, "stride": stride, "max_answer_length": max_answer_length}


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the result with its own digest. Raises InputError if the folder is not writable."""
    try:
        write_atomically(path, json.dumps({**result, "sha256": digest_of(result)}, indent=1))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}.") from None


def digest_of(result: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def read_calibration(model: str, run: TrainConfig) -> Calibration:
    """Read what `calibrate` fitted for this model and these windows. Raises InputError."""
    path = Path(model) / NAME
    again = f"run plainloop calibrate --model {model} --data FILE again"
    if not path.is_file():
        raise InputError(
            f"--null_threshold calibrated: {path}: no such file; {again.removesuffix(' again')}."
        )
    content = read(path, weights_of(Path(model)))
    options, contexts = content["options"], frozenset(content["fitted_contexts"])
    fitted = Calibration(content["null_threshold"], content["temperature"], contexts)
    asked = windows(run.data.max_length, run.data.stride, run.evaluation.max_answer_length)
    if options != asked:
        changed = ", ".join(f"--{n} {options.get(n)}" for n in asked if options.get(n) != asked[n])
        raise InputError(f"{path}: was fitted with {changed}; use the same, or {again}.")
    return fitted


def read(path: Path, weights: dict[str, str]) -> dict[str, Any]:
    """The content of the file. Raises InputError if it is damaged, or does not belong to these weights."""
    again = f"run plainloop calibrate --model {path.parent} --data FILE again"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("sha256") != digest_of(content):
            raise ValueError("its digest is another one")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({error}); {again}.") from None
    if content["weights"] != weights:
        raise InputError(f"{path}: was fitted for other weights; {again}.")
    return content


def context_digests(contexts: Iterable[str]) -> list[str]:
    """Short digests of contexts, by which data that was used to fit is known again in any format."""
    return sorted({hashlib.sha256(context.strip().encode()).hexdigest()[:12] for context in contexts})


def move(path: Path, before: dict[str, str], weights: dict[str, str]) -> None:
    """Make the file belong to weights that compute the same, such as an ONNX export. Raises InputError."""
    content = read(path, before)
    write(path, {**content, "weights": weights, "fitted_with_weights": content["weights"]})

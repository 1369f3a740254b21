"""Write weights as from_pretrained reads them, from the shards of a checkpoint, a few at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from plainloop.trainer.run_folder.files import rust_errors
from plainloop.trainer.run_folder.tensors import open_shards

PLAIN_FILE_BYTES = 2 << 30  # weights are copied through this much memory


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    with rust_errors(path):
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def write_plain(source: Path, folder: Path) -> None:
    """Write the weights in the shards of a checkpoint into a folder, as from_pretrained reads them, in files
    of 2 GB. Raises OSError.
    """
    tensors = open_shards(source)
    assert tensors is not None
    weights = tensors.below("weights/network.")
    files: list[list[str]] = [[]]
    room = PLAIN_FILE_BYTES
    for name in weights.places:
        size = 4 * math.prod(weights.shape(name))
        if size > room and files[-1]:
            files.append([])
            room = PLAIN_FILE_BYTES
        files[-1].append(name)
        room -= size
    index: dict[str, str] = {}
    for i, names in enumerate(files):
        file = "model.safetensors"
        if len(files) > 1:
            file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        save_tensors({name: weights.whole(name) for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    if len(files) > 1:
        total = sum(4 * math.prod(weights.shape(name)) for name in weights.places)
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=1))

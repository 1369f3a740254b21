"""Read tensors by rows from safetensors files, so that no process needs the memory of a whole model.

Two layouts: the files of a from_pretrained folder, each tensor in one of them; and the shards of a checkpoint
(`shard-00000-of-00004.safetensors`), where each file has the rows of one rank, in order. A tensor that only
the first shard has is not split.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, cat

from plainloop.trainer.errors import InputError

SHARD = re.compile(r"shard-(\d{5})-of-(\d{5})\.safetensors")


def shard_name(index: int, count: int) -> str:
    return f"shard-{index:05d}-of-{count:05d}.safetensors"


def complete_set(names: Iterable[str]) -> set[str]:
    """All shards of the checkpoint to which the shards among these file names belong; empty without any."""
    counts = [int(match[2]) for match in map(SHARD.fullmatch, names) if match]
    return {shard_name(i, counts[0]) for i in range(counts[0])} if counts else set()


def has_plain_weights(names: Iterable[str]) -> bool:
    """Whether these files of a checkpoint include those from which from_pretrained reads the weights."""
    starts = ("model", "adapter_model")
    return any(name.startswith(starts) and name.endswith(".safetensors") for name in names)


class Tensors:
    """Tensors of some safetensors files. Reading touches only the rows that are asked for."""

    def __init__(self, places: dict[str, list[tuple[Any, str]]]) -> None:
        """places: name -> (open file, name in that file) of each of its parts, in order."""
        self.places = places

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def named(self, rename: Callable[[str], str | None]) -> Tensors:
        """The same tensors under other names; None leaves one out."""
        new = {rename(name): parts for name, parts in self.places.items()}
        return Tensors({name: parts for name, parts in new.items() if name is not None})

    def below(self, prefix: str) -> Tensors:
        """The tensors whose names start with a prefix, without it."""
        return self.named(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)

    def shape(self, name: str) -> tuple[int, ...]:
        shapes = [tuple(file.get_slice(key).get_shape()) for file, key in self.places[name]]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start ... stop - 1 of a tensor with at least one dimension."""
        parts: list[Tensor] = []
        first = 0
        for file, key in self.places[name]:
            part = file.get_slice(key)
            length = part.get_shape()[0]
            low, high = max(start - first, 0), min(stop - first, length)
            if low < high or not parts:
                parts.append(part[min(low, length) : max(high, min(low, length))])
            first += length
        return cat(parts)

    def whole(self, name: str) -> Tensor:
        if shape := self.shape(name):
            return self.rows(name, 0, shape[0])
        file, key = self.places[name][0]
        tensor: Tensor = file.get_tensor(key)
        return tensor


def open_shards(folder: Path) -> Tensors | None:
    """The tensors in the shards of a checkpoint; None if it has none, or only some beside whole weights:
    dropping those of the best may have been interrupted. Raises InputError.
    """
    there = {path.name for path in folder.glob("*.safetensors")}
    names = complete_set(there)
    if not names or (not names <= there and has_plain_weights(there)):
        return None
    return open_tensors([folder / name for name in sorted(names)])


def pretrained_folder(path: str) -> Path:
    """The folder itself, or that of a hub name in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(path)
    if not folder.is_dir() and not path.startswith((".", "/", "~")) and path.count("/") < 2:
        cached = try_to_load_from_cache(path, "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else folder
    return folder


def open_pretrained(path: str) -> Tensors:
    """The weights of a folder or cached hub model that from_pretrained reads. Raises InputError."""
    folder = pretrained_folder(path)
    names = ["model.safetensors"]
    if (index := folder / "model.safetensors.index.json").is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if not (folder / names[0]).is_file():
        raise InputError(
            f"model.path {path}: has no model.safetensors, which is needed to read weights in slices; load it"
            " with transformers and save it again with save_pretrained."
        )
    return open_tensors([folder / name for name in names])


def open_tensors(paths: list[Path]) -> Tensors:
    """The tensors in some safetensors files; one that is in several is split by rows. Raises InputError."""
    places: dict[str, list[tuple[Any, str]]] = {}
    for path in paths:
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: can't be read ({error}).") from None
        for name in file.keys():  # noqa: SIM118 - not a dict
            places.setdefault(name, []).append((file, name))
    return Tensors(places)

"""Shared by the benchmarks: our task on real or generated data, and the report of a comparison."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


def training_file(folder: str) -> str:
    from plainloop.data.demo import write_demo

    if real := os.environ.get("PLAINLOOP_REAL_DATA"):
        return str(Path(real) / "squad2/train-v2.0.subset.json")
    return str(write_demo(Path(folder) / "demo")[0])


@dataclass(frozen=True)
class Bench:
    """Our task on the training file, as `plainloop train` sets it up."""

    task: Any
    config: Any
    world: Any
    data: Any
    path: str  # of the model

    @property
    def precision(self) -> str:
        """What `auto` resolves to here."""
        from plainloop.models.load import overflows_in_fp16
        from plainloop.trainer.precision import choose_precision

        return choose_precision(self.world.device, overflows_in_fp16=overflows_in_fp16(self.path))[0]

    def model(self) -> Any:
        from plainloop.trainer.tasks.model import load_model

        return load_model(self.task, self.path, self.config, self.world, new_head=True).train()

    def steps(self, batch_size: int, max_tokens: int = 4096, world: Any = None) -> Any:
        from plainloop.trainer.tasks import base as tasks

        config = replace(self.config, batch_size=batch_size, seed=1)
        return tasks.make_steps(self.task, self.data, config, world or self.world, max_tokens=max_tokens)

    def state(self, model: Any, *, compile_it: bool = False, world: Any = None, **optim: Any) -> Any:
        from plainloop.trainer.run import new_state

        config = replace(
            self.config, precision=self.precision, optim=replace(self.config.optim, **optim),
            model=replace(self.config.model, compile=compile_it),
        )  # fmt: skip
        return new_state(model, config, world or self.world)


def setup(
    cache: str, *, threads: int = 2, device: str = "cpu", model: str | None = None, limit: int | None = 4000,
    file: str | None = None, split: str = "train", **options: Any,
) -> Bench:  # fmt: skip
    """The file's features are built once, then read from the cache. options: of the config's text section."""
    import torch

    from plainloop.trainer.commands.demo import packaged_encoder
    from plainloop.trainer.config.options import DataConfig, ModelConfig, TextConfig, TrainConfig
    from plainloop.trainer.distributed.device import set_up_device
    from plainloop.trainer.distributed.world import world_from_env
    from plainloop.trainer.tasks import base as tasks
    from plainloop.trainer.tasks.find import find_task

    torch.set_num_threads(threads)
    path, world = model or packaged_encoder(), world_from_env(device)
    if world.size == 1:
        set_up_device(world, tf32=True, deterministic=False)
    network = ModelConfig(path=path, dropout=options.pop("dropout", None))
    kind = "text" if options else "span"
    config = TrainConfig(
        task=kind, model=network, data=DataConfig(cache_dir=cache), text=TextConfig(**options)
    )
    task = find_task(kind)(config)
    data = tasks.load_split(task, split, file or training_file(cache), config, world, limit=limit)
    return Bench(task, config, world, data, path)


def settle(device: Any) -> float:
    """Synchronize the device and return the time."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def show_ratios(results: dict[str, list[dict[str, Any]]], targets: dict[str, str]) -> None:
    """Print the speed of ours relative to each of the others, paired by round."""
    for name, target in targets.items():
        pairs = zip(results["ours"], results.get(name, []), strict=name in results)
        if ratios := [o["tokens_per_s"] / r["tokens_per_s"] for o, r in pairs]:
            print(f"ours / {name} = {statistics.median(ratios):.2f} (median of rounds; target {target})")

"""What the benchmarks share: our task on real or generated data, and how a comparison is shown."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any


def training_file(folder: str) -> str:
    from plainloop.data.demo import write_demo

    if real := os.environ.get("PLAINLOOP_REAL_DATA"):
        return str(Path(real) / "squad2/train-v2.0.subset.json")
    return str(write_demo(Path(folder) / "demo")[0])


def setup(
    cache: str, *, threads: int = 2, device: str = "cpu", model: str | None = None, limit: int = 4000
) -> tuple[Any, Any, str]:
    """Our task, its windows of the training file (made once, then from the cache), and the model's path."""
    import torch

    from plainloop.trainer.config import DataConfig, ModelConfig, TextConfig
    from plainloop.trainer.demo import packaged_encoder
    from plainloop.trainer.device import set_up_device
    from plainloop.trainer.distributed import world_from_env
    from plainloop.trainer.tasks import make_task

    torch.set_num_threads(threads)
    model, world = model or packaged_encoder(), world_from_env(device)
    if world.size == 1:
        set_up_device(world, tf32=True, deterministic=False)
    task = make_task("span", ModelConfig(path=model), DataConfig(cache_dir=cache), TextConfig(), world)
    return task, task.prepare("train", training_file(cache), limit=limit), model


def precision_of(task: Any, path: str) -> str:
    from plainloop.models.load import overflows_in_fp16
    from plainloop.trainer.precision import choose_precision

    return choose_precision(task.world.device, overflows_in_fp16=overflows_in_fp16(path))[0]


def settle(device: Any) -> float:
    """The time when the device has done all that was asked of it."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def show_ratios(results: dict[str, list[dict[str, Any]]], targets: dict[str, str]) -> None:
    """Ours against each of the others, round by round."""
    for name, target in targets.items():
        pairs = zip(results["ours"], results.get(name, []), strict=name in results)
        if ratios := [o["tokens_per_s"] / r["tokens_per_s"] for o, r in pairs]:
            print(f"ours / {name} = {statistics.median(ratios):.2f} (median of rounds; target {target})")

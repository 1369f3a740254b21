"""How long a save stalls training, asynchronous and synchronous: 125 M parameters with AdamW state.

python tests/bench/saving.py [ROUNDS] [FOLDER]

Paired: each round saves both ways, then times steps during an asynchronous save and steps alone.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import RobertaConfig, RobertaForQuestionAnswering

from plainloop.models.load import save_network
from plainloop.models.spans import SpanModel
from plainloop.trainer.checkpoint.writer import SaveCheckpoint
from plainloop.trainer.config.options import CheckpointConfig, OptimConfig
from plainloop.trainer.distributed.parallel import Parallel
from plainloop.trainer.distributed.world import World
from plainloop.trainer.optim import make_optimizer
from plainloop.trainer.run_folder.log import Log
from plainloop.trainer.run_folder.status import hold
from plainloop.trainer.state import Progress, TrainState

CPU = torch.device("cpu")


def step(state: TrainState) -> float:
    """Run a training step on 2 x 64 tokens; return its seconds."""
    ids = torch.ones(2, 64, dtype=torch.int64)
    started = time.perf_counter()
    state.model(input_ids=ids, attention_mask=ids).square().mean().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    return time.perf_counter() - started


def main(rounds: int, parent: str | None) -> None:
    size = {"num_hidden_layers": 1} if "TINY" in os.environ else {}  # smoke test: one round
    rounds = 1 if size else rounds
    network = RobertaForQuestionAnswering(
        RobertaConfig(vocab_size=50265, max_position_embeddings=514, **size)
    )
    model = SpanModel(network)
    state = TrainState(
        model,
        Parallel(model),
        make_optimizer(model, OptimConfig()),
        torch.amp.GradScaler("cpu", enabled=False),
        CPU,
    )
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")
    figures: dict[str, list[float]] = {"synchronous": [], "stall": [], "beside": [], "alone": []}
    with tempfile.TemporaryDirectory(dir=parent) as root, hold(Path(root), 0, print) as folder:
        log = Log(Path(root), enabled=False, tensorboard=False)
        metadata: dict[str, Any] = {"config": {"precision": "fp32"}, "fingerprint": {}, "environment": {}}

        def saver(in_background: bool) -> SaveCheckpoint:
            config = CheckpointConfig(every_steps=1, keep_last=1, async_=in_background)
            return SaveCheckpoint(
                progress, folder, lambda path, weights: save_network(network, path, weights), config,
                metric="f1", metadata=metadata,
            )  # fmt: skip

        progress = Progress(state, 2**40, 2**40, log, World(0, 1, 0, CPU))
        background, synchronous = saver(True), saver(False)
        step(state)
        for number in range(rounds + 1):  # the first round fills the buffers and is not counted
            taken: dict[str, float] = {}
            for name, save in (("synchronous", synchronous), ("stall", background)):
                state.step += 1
                started = time.perf_counter()
                save(progress)
                taken[name] = time.perf_counter() - started
            beside, save_in_progress = [], background.in_progress
            while save_in_progress is not None and not save_in_progress.result.done():
                beside.append(step(state))
            written_s = save_in_progress.result.result()[1] if save_in_progress else 0.0
            taken["beside"] = statistics.median(beside or [0.0])
            taken["alone"] = statistics.median(step(state) for _ in range(5))
            print(
                f"round {number}: synchronous {taken['synchronous']:.2f} s; asynchronous: stalls for"
                f" {taken['stall']:.3f} s, writes for {written_s:.2f} s; a step takes {taken['alone']:.2f} s,"
                f" during the write {taken['beside']:.2f} s"
            )
            if number:
                for name, seconds in taken.items():
                    figures[name].append(seconds)
        background.close()
        synchronous.close()
    ratios = [a / b for a, b in zip(figures["synchronous"], figures["stall"], strict=True)]
    print(
        f"medians of {rounds}: synchronous {statistics.median(figures['synchronous']):.2f} s, stall"
        f" {statistics.median(figures['stall']):.3f} s: {statistics.median(ratios):.1f} times shorter"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, sys.argv[2] if len(sys.argv) > 2 else None)

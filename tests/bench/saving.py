"""How long a save holds up training: in the background and without, 125 M parameters with AdamW state.

python tests/bench/saving.py [ROUNDS] [FOLDER]

Paired: each round saves both ways, then takes steps beside a background save and steps alone.
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
from plainloop.trainer.config import CheckpointConfig, OptimConfig
from plainloop.trainer.deadline import StopTime
from plainloop.trainer.distributed import World
from plainloop.trainer.hooks import Stopwatch
from plainloop.trainer.log import Log
from plainloop.trainer.loop import Progress
from plainloop.trainer.optim import make_optimizer
from plainloop.trainer.run_folder import hold
from plainloop.trainer.saving import SaveCheckpoint
from plainloop.trainer.state import TrainState

CPU = torch.device("cpu")


def step(state: TrainState) -> float:
    """A training step on 2 x 64 tokens; its seconds."""
    ids = torch.ones(2, 64, dtype=torch.int64)
    started = time.perf_counter()
    state.model(input_ids=ids, attention_mask=ids).square().mean().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    return time.perf_counter() - started


def main(rounds: int, parent: str | None) -> None:
    size = {"num_hidden_layers": 1} if "TINY" in os.environ else {}  # one round, to see that it runs
    rounds = 1 if size else rounds
    network = RobertaForQuestionAnswering(
        RobertaConfig(vocab_size=50265, max_position_embeddings=514, **size)
    )
    model = SpanModel(network)
    state = TrainState(
        model, model, make_optimizer(model, OptimConfig()), torch.amp.GradScaler("cpu", enabled=False), CPU
    )
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")
    figures: dict[str, list[float]] = {"synchronous": [], "stall": [], "beside": [], "alone": []}
    with tempfile.TemporaryDirectory(dir=parent) as root, hold(Path(root), 0, print) as folder:
        log = Log(Path(root), enabled=False, tensorboard=False)
        extra: dict[str, Any] = {"config": {"precision": "fp32"}, "fingerprint": {}, "surroundings": {}}

        def saver(in_background: bool) -> SaveCheckpoint:
            config = CheckpointConfig(every_steps=1, keep_last=1, async_=in_background)
            return SaveCheckpoint(
                folder, lambda path, weights: save_network(network, path, weights), log, Stopwatch(),
                World(0, 1, 0, CPU), config, metric="f1", saved_step=0, extra=extra,
                stop_time=StopTime(),
            )  # fmt: skip

        background, synchronous = saver(True), saver(False)
        progress = Progress(state, total_steps=2**40, steps_per_epoch=2**40)
        step(state)
        for number in range(rounds + 1):  # the first fills the buffers and is not counted
            taken: dict[str, float] = {}
            for name, save in (("synchronous", synchronous), ("stall", background)):
                state.step += 1
                started = time.perf_counter()
                save(progress)
                taken[name] = time.perf_counter() - started
            beside, under_way = [], background._under_way
            while under_way is not None and not under_way.result.done():
                beside.append(step(state))
            written_s = under_way.result.result()[1] if under_way else 0.0
            taken["beside"] = statistics.median(beside or [0.0])
            taken["alone"] = statistics.median(step(state) for _ in range(5))
            print(
                f"round {number}: synchronous {taken['synchronous']:.2f} s; background: stalls for"
                f" {taken['stall']:.3f} s, writes for {written_s:.2f} s; a step takes {taken['alone']:.2f} s,"
                f" beside the writing {taken['beside']:.2f} s"
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

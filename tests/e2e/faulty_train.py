"""`plainloop` with faults on order: the environment variable FAULT holds JSON. Run like trainer/__main__.py.

rank            whom it happens to (default: all)
life            of a Slurm job: the only one in which it happens (0: before any requeue)
slow_save_s     every save takes so much longer
slow_step_s     every step takes so much longer
slow_batch_s    every batch of an evaluation takes so much longer
hang_at         before this step the main thread sleeps for ever
poison_at       before this step one weight becomes NaN
drift_at        before this step one bit of one weight flips
disorder_at     before this step the digest of the data order is another one
"""

import json
import os
import time
from typing import Any

from plainloop.trainer import checkpoint, hooks, loop
from plainloop.trainer.cli import main, main_of_process  # noqa: F401

FAULT = json.loads(os.environ.get("FAULT", "{}"))
HERE = int(os.environ.get("RANK", 0)) == FAULT.get("rank", int(os.environ.get("RANK", 0)))
LIFE = int(os.environ.get("SLURM_RESTART_COUNT", 0))
settle, train_step, agreed = checkpoint._settle, loop.train_step, hooks.Stop.agreed


def slow_settle(*arguments: Any) -> None:
    time.sleep(FAULT.get("slow_save_s", 0))
    settle(*arguments)


def slow_agreed(self: Any) -> bool:
    time.sleep(FAULT.get("slow_batch_s", 0))
    return agreed(self)


def faulty_step(state: Any, *arguments: Any) -> None:
    import torch

    time.sleep(FAULT.get("slow_step_s", 0))
    weight = next(state.model.parameters())
    if state.step == FAULT.get("hang_at"):
        time.sleep(1000)
    if state.step == FAULT.get("poison_at"):
        weight.data[0, 0] = torch.nan
    if state.step == FAULT.get("disorder_at"):
        state.order = "f" * 64
    if state.step == FAULT.get("drift_at"):
        weight.data.view(torch.int32)[0, 0] ^= 1
    train_step(state, *arguments)


if HERE and LIFE == FAULT.get("life", LIFE):
    hooks.Stop.agreed = slow_agreed  # type: ignore[method-assign]
    checkpoint._settle = slow_settle
    loop.train_step = faulty_step

if __name__ == "__main__":
    main_of_process()

"""`plainloop` with injected faults: the environment variable FAULT holds JSON. Run like trainer/__main__.py.

rank            only on this rank (default: all ranks)
life            only in the run after this many requeues of a Slurm job (0: before any; default: all runs)
slow_save_s     seconds added to every save
slow_step_s     seconds added to every step
slow_batch_s    seconds added to every batch of an evaluation
hold_save       a save waits until this file exists
hold_batch      a batch of an evaluation waits until this file exists
hang_at         before this step, the main thread hangs
poison_at       before this step, one weight becomes NaN
drift_at        before this step, one bit of one weight flips
disorder_at     before this step, the digest of the data order changes
fill_at         in the save of this step of a sharded run, the disk is filled but for 8 MB, once
fill_in         when: before `write_shard` or `write_plain`
"""

import json
import os
import time
from typing import Any

from plainloop.trainer import hooks, loop
from plainloop.trainer.cli import main, main_of_process  # noqa: F401

FAULT = json.loads(os.environ.get("FAULT", "{}"))
HERE = int(os.environ.get("RANK", 0)) == FAULT.get("rank", int(os.environ.get("RANK", 0)))
LIFE = int(os.environ.get("SLURM_RESTART_COUNT", 0))
fsync, train_step, agreed = os.fsync, loop.train_step, hooks.Stop.agreed


def wait_for(gate: str | None) -> None:
    """Wait until the test opens the gate, for two minutes at most."""
    until = time.monotonic() + 120
    while gate and not os.path.exists(gate) and time.monotonic() < until:
        time.sleep(0.01)


def slow_fsync(descriptor: int) -> None:
    """A slow disk: once per save, when the temporary folder is synced."""
    name = os.readlink(f"/proc/self/fd/{descriptor}")
    if os.path.isdir(name) and os.path.basename(name).startswith(".tmp-step-"):
        wait_for(FAULT.get("hold_save"))
        time.sleep(FAULT.get("slow_save_s", 0))
    fsync(descriptor)


def slow_agreed(self: Any) -> bool:
    wait_for(FAULT.get("hold_batch"))
    time.sleep(FAULT.get("slow_batch_s", 0))
    return agreed(self)


def fill_before(name: str) -> None:
    from plainloop.trainer.checkpoint import sharded

    write = getattr(sharded, name)

    def filling(folder: Any, *arguments: Any) -> Any:
        disk = folder.parents[2]  # the run folder lies on it
        ballast = disk / "ballast"
        if folder.name.startswith(f".tmp-step-{FAULT['fill_at']:08d}") and not ballast.exists():
            free = os.statvfs(disk)
            with open(ballast, "wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, free.f_bavail * free.f_frsize - (8 << 20))
        return write(folder, *arguments)

    setattr(sharded, name, filling)


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
    os.fsync = slow_fsync
    loop.train_step = faulty_step
    if "fill_at" in FAULT:
        fill_before(FAULT["fill_in"])

if __name__ == "__main__":
    main_of_process()

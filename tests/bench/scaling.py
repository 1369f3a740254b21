"""Speedup of two processes over one, one thread each: python tests/bench/scaling.py (data as in speed.py).

Paired step by step, since a machine's speed drifts: under torchrun with two processes, rank 0 alone trains on
a global batch while rank 1 waits, then both train on the same global batch with DDP, and so on. MiniLM,
precision as `plainloop train` chooses it; batches of 16 rows, where the 90 MB of gradients and the optimizer
step weigh most, and of 64. TINY=1: smoke test with a few rows.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from common import setup
from speed import LR

TINY = "TINY" in os.environ
WARMUP, STEPS, LIMIT = (1, 2, 40) if TINY else (2, 16, 4000)


def measure(cache: str, batch_size: int) -> None:
    """All ranks. Rank 0 prints as its last line the seconds of each step, alone and together."""
    import torch.distributed as dist

    from plainloop.trainer.distributed.world import process_group
    from plainloop.trainer.loop import StepOptions, train_step

    bench = setup(cache, threads=1, limit=LIMIT)
    task, both, precision = bench.task, bench.world, bench.precision
    alone = dataclasses.replace(both, rank=0, size=1)
    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    with process_group(both, timeout_s=300):
        networks = {"alone": bench.model()}
        networks["together"] = copy.deepcopy(networks["alone"])
        states, options, sources = {}, {}, {}
        for name, world in (("alone", alone), ("together", both)):
            states[name] = bench.state(networks[name], world=world, lr=LR)
            options[name] = StepOptions(task.loss_sum, lambda _: LR, world, 1, precision, 1.0)
            sources[name] = bench.steps(batch_size, world=world)
        for step in range(WARMUP + STEPS):
            for name in ("alone", "together") if step % 2 else ("together", "alone"):
                batch = sources[name][step]
                dist.barrier()
                started = time.perf_counter()
                if name == "together" or both.is_main:
                    train_step(states[name], batch, options[name])
                dist.barrier()
                if step >= WARMUP:
                    seconds[name].append(time.perf_counter() - started)
        if both.is_main:
            print(json.dumps(seconds), flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        from plainloop.data.processes import exit_rank

        measure(sys.argv[2], int(sys.argv[3]))
        exit_rank()
    with tempfile.TemporaryDirectory() as cache:
        setup(cache, limit=LIMIT)
        for batch_size in (4,) if TINY else (16, 64):
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
            line = [*launcher, __file__, "--child", cache, str(batch_size)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            result = subprocess.run(line, capture_output=True, text=True, env=environment)
            if result.returncode:
                raise SystemExit(result.stderr[-2000:])
            found = json.loads([text for text in result.stdout.splitlines() if text.startswith("{")][-1])
            alone, together = found["alone"], found["together"]
            times, median = sum(alone) / sum(together), statistics.median
            ratio = median(a / t for a, t in zip(alone, together, strict=True))
            print(
                f"batch {batch_size}: a step alone {median(alone):.2f} s, together {median(together):.2f} s"
            )
            print(f"    together {times:.2f} times as fast (median of the steps {ratio:.2f}; target 1.8)")


if __name__ == "__main__":
    main()

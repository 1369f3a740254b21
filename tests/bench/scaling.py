"""Two processes against one, a thread each: python tests/bench/scaling.py (real data as in speed.py).

Paired step by step, since a machine's speed drifts: under torchrun with two processes, rank 0 alone trains
a global batch while rank 1 sleeps, then both train the same global batch through DDP, and so on. MiniLM,
precision as `plainloop train` chooses it; a batch of 16 rows, where 90 MB of gradients and the optimizer's
step weigh most, and one of 64. TINY=1: a few rows, to see that it runs.
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

from common import precision_of, setup
from speed import LR

TINY = "TINY" in os.environ
WARMUP, STEPS, LIMIT = (1, 2, 40) if TINY else (2, 16, 4000)


def measure(cache: str, batch_size: int) -> None:
    """All ranks. Rank 0's last line: seconds of each step alone, and of the same step together."""
    import torch.distributed as dist

    from plainloop.trainer.config import OptimConfig
    from plainloop.trainer.distributed import process_group
    from plainloop.trainer.loop import StepOptions, train_step
    from plainloop.trainer.optim import make_optimizer
    from plainloop.trainer.precision import make_scaler
    from plainloop.trainer.run import wrap
    from plainloop.trainer.state import TrainState

    task, windows, path = setup(cache, threads=1, limit=LIMIT)
    precision = precision_of(task, path)
    both = task.world
    alone = dataclasses.replace(both, rank=0, size=1)
    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    with process_group(both, timeout_s=300):
        networks = {"alone": task.load_model(path, new_head=True).train()}
        networks["together"] = copy.deepcopy(networks["alone"])
        states, options, sources = {}, {}, {}
        for name, world in (("alone", alone), ("together", both)):
            network = networks[name]
            states[name] = TrainState(
                network, wrap(network, world, compile_it=False), make_optimizer(network, OptimConfig(lr=LR)),
                make_scaler(precision, world.device), world.device,
            )  # fmt: skip
            options[name] = StepOptions(task.loss_sum, lambda _: LR, world, 1, precision, 1.0)
            whole = task.steps(windows, batch_size=batch_size, seed=1, tokens=4096)
            whole.world_size, whole.rank = world.size, world.rank
            sources[name] = whole
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
        measure(sys.argv[2], int(sys.argv[3]))
        return
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

"""A run killed at any point ends bitwise identical to a run that was never interrupted."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

KILLS = {"ddp": {"saving": 24, "any": 17, "agent": 3}, "fsdp": {"saving": 10, "any": 9, "agent": 1}}


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "precision"), [(3, "fp32"), (4, "bf16")])
def test_resume_is_exact_on_more_ranks(
    processes: int,
    precision: str,
    finish: Any,
    start: Any,
    tensors: Any,
    assert_same_bits: Any,
    tmp_path: Path,
) -> None:
    """Kill one rank after step 3; all processes are replaced by new ones."""
    changes = {"precision": precision, "max_steps": 6, "checkpoint.every_steps": 3}
    whole = finish(processes, restarts=0, run_dir=tmp_path / "whole", **changes)
    job = start(processes, restarts=3, fault={"slow_step_s": 0.3}, **changes)
    job.wait_until(lambda: (job.run_dir / "checkpoints/step-00000003").exists())
    os.kill(job.ranks()[1], signal.SIGKILL)
    assert job.end() == 0, job.output()
    assert "guaranteed: the same bits" in job.output()
    assert_same_bits(tensors(job.run_dir, 6), tensors(whole.run_dir, 6))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_many_kills(
    mode: str,
    start: Any,
    finish: Any,
    options: Any,
    metrics: Any,
    tensors: Any,
    assert_same_bits: Any,
    tmp_path: Path,
) -> None:
    """SIGKILL a random rank, or sometimes the agent: many kills 0 to 250 ms after a save began, the others at
    any moment. With dropout, buckets, loader workers, evaluations and asynchronous saves.
    """
    seed = int(os.environ.get("PLAINLOOP_KILL_SEED") or time.time_ns() % 10**6)
    print(f"PLAINLOOP_KILL_SEED={seed}")
    chance = random.Random(seed)
    kinds = [kind for kind, count in KILLS[mode].items() for _ in range(count)]
    chance.shuffle(kinds)
    epochs = len(kinds) // 5 * 2
    steps = 15 * epochs
    changes = {
        "parallel.mode": mode, "epochs": epochs, "checkpoint.every_steps": 4,
        "data.dev": options["data.train"],
        "evaluation.every_steps": 10, "data.workers": 1,
    }  # fmt: skip
    whole = finish(2, restarts=0, run_dir=tmp_path / "whole", **changes)
    fault = {"slow_step_s": 0.03, "slow_save_s": 0.15}
    job = start(2, restarts=100, fault=fault, **changes)
    folder, kills = job.run_dir / "checkpoints", Counter[str]()
    began = time.monotonic()
    while kills.total() < len(kinds):
        pids = job.ranks()
        if len(pids) < 2:
            assert job.process.poll() is None, f"the run finished too early, after {kills}:\n{job.output()}"
            time.sleep(0.01)
            continue
        left = set(folder.glob(".tmp-step-*"))  # left by the last kill
        kind = kinds[kills.total()]
        if kind == "saving":
            wait(
                lambda job=job, pids=pids, left=left: (
                    set(folder.glob(".tmp-step-*")) - left or job.ranks() != pids
                )
            )
        delay_s = chance.uniform(0, 0.25 if kind == "saving" else 2.5)
        until = time.monotonic() + delay_s
        # Each kill has its share of the steps: a fast machine kills earlier, or the run would end too soon.
        budget = (kills.total() + 1) * (steps - 20) // len(kinds)
        while time.monotonic() < until and job.steps_done() < budget:
            time.sleep(0.001)
        victim = job.process.pid if kind == "agent" else chance.choice(list(pids.values()))
        if not Path(f"/proc/{victim}").exists():
            continue
        os.kill(victim, signal.SIGKILL)
        kills[kind] += 1
        newest = max((p.name for p in folder.glob("step-*")), default="none")
        after_s = time.monotonic() - began
        print(f"{after_s:.1f} s: kill {kills.total()}: {kind}, {delay_s * 1000:.0f} ms; newest {newest}")
        if kind == "agent":
            job.end(30)
            job = start(2, restarts=100, fault=fault, **changes)
        else:
            wait(lambda job=job, v=victim: len(r := job.ranks()) == 2 and v not in r.values())
    assert job.end(120) == 0, job.output()
    print(f"{dict(kills)}, {steps} steps: comparing weights, optimizer state, losses, evaluations")
    assert_same_bits(tensors(job.run_dir, steps), tensors(whole.run_dir, steps))
    assert losses(metrics, job.run_dir) == losses(metrics, whole.run_dir)
    evaluations = [
        [{**r, "seconds": 0} for r in metrics(d, "evaluation")] for d in (job.run_dir, whole.run_dir)
    ]
    assert evaluations[0] == evaluations[1] and len(evaluations[0]) == steps // 10
    assert not [p for p in folder.iterdir() if not p.name.startswith("step-")]


def wait(happened: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.005)


def losses(metrics: Any, run_dir: Any) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in metrics(run_dir, "train")]

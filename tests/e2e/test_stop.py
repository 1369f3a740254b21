"""Graceful shutdown on every kind of stop request: all ranks save the same step, and the next start resumes.

The tests vary which process gets the signal, when, and how often.
"""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from plainloop.trainer.checkpoint.folder import verify
from plainloop.trainer.distributed import signals

SLOW = {"slow_step_s": 0.05}
ANY_SIGNAL = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def assert_stopped(job: Any, *, after: int = 1, reason: str = "") -> int:
    """Assert that there is one checkpoint, of the step in status.json; return the step."""
    status = job.status()
    assert status["status"] == "stopped" and status["exit_code"] == 75, job.output()
    assert reason in status["reason"] or status["reason"].startswith("another rank"), status
    assert after <= status["step"] < status["total_steps"]
    (saved,) = (job.run_dir / "checkpoints").glob("*")
    assert saved.name == f"step-{status['step']:08d}" and verify(saved) is None
    assert not (job.run_dir / "lock").exists()
    return int(status["step"])


@pytest.mark.parametrize(
    ("number", "to", "torchrun"),
    [
        pytest.param(signal.SIGTERM, "rank 0, then rank 1", [], id="SIGTERM-0.6s-apart"),
        pytest.param(signal.SIGUSR1, "agent", [ANY_SIGNAL], id="SIGUSR1-agent", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "agent", [], id="SIGINT-agent", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "ranks, then agent", [], id="SIGTERM-all", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, "rank 1", [], id="SIGUSR1-one-rank", marks=pytest.mark.slow),
    ],
)
def test_stop_on_signal(number: int, to: str, torchrun: list[str], start: Any) -> None:
    job = start(2, fault=SLOW, torchrun=torchrun, epochs=40, **{"data.workers": 2})
    job.wait_for_step(3)
    ranks = job.ranks()
    targets = {
        "agent": [job.process.pid], "rank 1": [ranks[1]], "rank 0, then rank 1": [ranks[0], ranks[1]],
        "ranks, then agent": [ranks[0], ranks[1], job.process.pid],
    }[to]  # fmt: skip
    for i, pid in enumerate(targets):
        time.sleep(0.6 if i else 0.0)  # the skew that is tested: several steps
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, number)
    assert job.end() != 0
    assert_stopped(job, after=3, reason=signal.Signals(number).name)


def test_stop_file_works_with_max_restarts(start: Any) -> None:
    """torchrun would restart ranks that exit with a nonzero code."""
    job = start(2, fault=SLOW, torchrun=["--max-restarts=1"], epochs=40)
    job.wait_for_step(3)
    (job.run_dir / "stop").touch()
    assert job.end() == 0
    assert_stopped(job, after=3, reason="the file")


@pytest.mark.parametrize("step_s", [1.5, pytest.param(12, marks=pytest.mark.slow)])
def test_slow_steps_stop_at_the_next_boundary(step_s: float, start: Any) -> None:
    """torchrun kills its ranks 30 s after SIGTERM: with 12 s per step there is time for one more."""
    job = start(2, fault={"slow_step_s": step_s}, torchrun=[])
    job.wait_for_step(2)
    step, signalled = job.steps_done(), time.monotonic()
    job.process.send_signal(signal.SIGTERM)
    assert job.end() != 0
    print(f"ended {time.monotonic() - signalled:.1f} s after the signal")
    assert assert_stopped(job, after=2, reason="SIGTERM") <= step + 1


def saving(job: Any) -> bool:
    return any((job.run_dir / "checkpoints").glob(".tmp-step-*"))


def test_second_signal_while_saving_is_ignored(start: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = start(0, fault={**SLOW, "hold_save": str(gate)}, epochs=40)
    job.wait_for_step(2)
    job.process.send_signal(signal.SIGTERM)
    job.wait_until(lambda: saving(job))
    job.process.send_signal(signal.SIGTERM)
    gate.touch()
    job.wait_until(lambda: not saving(job))
    job.process.send_signal(signal.SIGTERM)  # while the interpreter shuts down
    assert job.end() == 75
    assert_stopped(job, after=2, reason="SIGTERM")


@pytest.mark.parametrize("moment", ["evaluation", "save"])
def test_both_ranks_signalled_at_once_during(moment: str, start: Any, options: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    changes: dict[str, Any] = {"checkpoint.every_steps": 4, "checkpoint.keep_last": 1, "epochs": 40}
    if moment == "evaluation":
        often = {"evaluation.every_steps": 4, "evaluation.tokens_per_device": 100}
        changes = {"checkpoint.every_steps": 0, "data.dev": options["data.train"], **often}
    hold = {"save": "hold_save", "evaluation": "hold_batch"}[moment]
    job = start(2, restarts=0, fault={**SLOW, hold: str(gate)}, **changes)
    if moment == "save":
        job.wait_until(lambda: saving(job))
    else:
        job.wait_for_step(4)  # the line is logged before the evaluation of 120 batches
    for pid in job.ranks().values():
        os.kill(pid, signal.SIGTERM)
    gate.touch()
    assert job.end() != 0
    step = assert_stopped(job, after=4, reason="evaluation" if moment == "evaluation" else "SIGTERM")
    assert step == 4 or moment == "save"


def test_stop_while_generating(text_options: Any, start: Any, text_files: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    dev = {"data.dev": text_files[1], "evaluation.every_steps": 2, "evaluation.best_metric": "em"}
    job = start(0, fault={"hold_batch": str(gate)}, **dev, **{"evaluation.tokens_per_device": 40})
    job.wait_for_step(2)  # the line is logged before the evaluation of 80 batches
    job.process.send_signal(signal.SIGTERM)
    gate.touch()
    assert job.end() == 75
    assert assert_stopped(job, reason="evaluation") == 2


def test_second_sigint_aborts_at_once(start: Any, tmp_path: Path) -> None:
    job = start(0, fault={**SLOW, "hold_save": str(tmp_path / "never")}, epochs=40)
    job.wait_for_step(2)
    job.process.send_signal(signal.SIGINT)
    job.wait_until(lambda: saving(job))
    time.sleep(signals.SECOND_S)  # within this time, a SIGINT is the first one again, by way of torchrun
    job.process.send_signal(signal.SIGINT)
    assert job.end(60) == 130  # the save would have waited for two minutes
    assert job.status()["status"] == "failed" and "second SIGINT" in job.status()["reason"]


def test_stop_during_an_evaluation(start: Any, options: Any, finish: Any, tmp_path: Path) -> None:
    dev = {
        "data.dev": options["data.train"],
        "evaluation.every_steps": 4,
        "evaluation.tokens_per_device": 100,
    }
    gate = tmp_path / "gate"
    job = start(0, fault={"hold_batch": str(gate)}, **dev)
    job.wait_for_step(4)  # the line is logged before the evaluation of 120 batches
    job.process.send_signal(signal.SIGTERM)
    gate.touch()
    assert job.end() == 75
    assert assert_stopped(job, reason="evaluation") == 4
    done = finish(0, **dev)
    assert done.status()["status"] == "completed" and '"kind": "evaluation", "step": 4' in (
        (job.run_dir / "metrics.jsonl").read_text()
    )


@pytest.mark.slow
def test_grace_too_short_keeps_the_old_checkpoint_and_the_next_start_warns(start: Any, finish: Any) -> None:
    changes = {"checkpoint.every_steps": 5, "checkpoint.async": "false", "checkpoint.grace_s": 3}
    job = start(2, fault={**SLOW, "slow_save_s": 4}, torchrun=["--shutdown-timeout=3"], **changes)
    job.wait_for_step(7)
    job.process.send_signal(signal.SIGTERM)
    assert job.end() != 0
    status = job.status()  # killed before any rank could update it, except perhaps the last one
    assert status["status"] == "running" or "lost another rank" in status["reason"]
    (saved,) = (job.run_dir / "checkpoints").glob("step-*")
    assert saved.name == "step-00000005" and verify(saved) is None
    told = finish(2, **changes).output()
    assert re.search("WARNING: a stop takes up to [4-9] s .* a save of [4-9].* s.*grace period of 3 s", told)
    assert not list((job.run_dir / "checkpoints").glob(".tmp-*"))


def test_ranks_exit_when_their_agent_is_killed(start: Any) -> None:
    job = start(2, fault=SLOW, epochs=40, **{"data.workers": 1})
    job.wait_for_step(3)
    workers = job.children_of(0) + job.children_of(1)
    job.seen |= set(workers)
    assert len(workers) >= 2
    job.process.kill()
    job.end(60)
    assert_stopped(job, after=3, reason="SIGTERM")

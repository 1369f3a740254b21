"""Ranks that die, hang or diverge; run folders that are full, locked or tampered with. Real processes."""

import json
import os
import re
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

SLOW = {"slow_step_s": 0.05}
EVERY_5 = {"checkpoint.every_steps": 5}


def test_killed_rank_is_replaced_and_the_result_is_bitwise_identical(
    start: Any, finish: Any, tensors: Any, assert_same_bits: Any, tmp_path: Path
) -> None:
    whole = finish(2, restarts=0, run_dir=tmp_path / "whole")
    job = start(2, fault=SLOW, restarts=1, **EVERY_5)
    job.wait_for_step(12)
    os.kill(job.ranks()[1], signal.SIGKILL)
    assert job.end() == 0, job.output()
    assert "resuming from" in job.output() and "lost another rank" in job.log.read_text()
    assert_same_bits(tensors(job.run_dir, 30), tensors(whole.run_dir, 30))


@pytest.mark.slow
def test_torchrun_replaces_killed_ranks_every_time(start: Any) -> None:
    """Real torchrun, whose store outlives the ranks; kill rank 0, then rank 1."""
    job = start(2, fault={"slow_step_s": 0.1}, torchrun=["--max-restarts=2"], **EVERY_5)
    for life in range(2):
        began = 5 * life
        job.wait_until(lambda began=began: job.steps_done() >= began + 6)
        pid = job.ranks()[life % 2]
        os.kill(pid, signal.SIGKILL)
        job.wait_until(lambda pid=pid, r=life % 2: job.ranks().get(r, pid) != pid)
    assert job.end() == 0, job.output()
    assert job.log.read_text().count("resuming from") == 2


def test_rank_paused_by_sigstop_is_detected(start: Any) -> None:
    job = start(2, fault=SLOW, timeout_s=4)
    job.wait_for_step(3)
    victim = job.ranks()[1]
    os.kill(victim, signal.SIGSTOP)
    job.wait_until(lambda: job.status()["status"] == "failed", 60)
    status = job.status()
    assert status["exit_code"] == 70
    who = f"rank 1 (host {socket.gethostname()}, process {victim}) at step"
    assert f"no heartbeat from {who}" in status["reason"]
    os.kill(victim, signal.SIGKILL)  # otherwise torchrun does it 30 s later
    assert job.end() != 0
    assert "train_step" in (job.run_dir / "hang-rank-0.txt").read_text()


def test_hung_rank_is_named_with_its_step_and_stack(start: Any) -> None:
    job = start(2, restarts=0, fault={"rank": 1, "hang_at": 5}, timeout_s=4)
    job.wait_for_step(5)
    assert job.end(60) != 0
    reason = job.status()["reason"]
    assert "at step 5, waiting for data; blocking rank 0" in reason and "rank 1 (host" in reason
    assert "faulty_step" in (job.run_dir / "hang-rank-1.txt").read_text()
    assert "plainloop: error: no progress for" in job.output()


@pytest.mark.slow
def test_first_step_has_its_own_timeout(start: Any) -> None:
    job = start(2, restarts=0, fault={"rank": 1, "hang_at": 0}, timeout_s=2, start_timeout_s=8)
    assert job.end(60) != 0
    (seconds,) = re.findall(r"no progress for (\d+) s: rank 1 .* at step 0", job.status()["reason"])
    assert int(seconds) >= 8  # not 2


def test_two_jobs_one_run_folder(start: Any, finish: Any) -> None:
    first = start(0, fault={"hang_at": 2})
    first.wait_for_step(2)
    second = start(0)
    assert second.end() == 2
    assert f"host {socket.gethostname()}, process {first.process.pid}" in second.output()
    assert first.status()["status"] == "running"
    first.process.kill()
    first.process.wait()
    assert "taking over a stale lock" in finish(0).output()


def test_run_that_lost_its_lock_writes_nothing_more(start: Any) -> None:
    job = start(0, fault=SLOW)
    job.wait_for_step(2)
    (job.run_dir / "lock").write_text(json.dumps({"token": "another", "host": "n2", "pid": 1, "job": "77"}))
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 74
    assert "now belongs to host n2, process 1, job 77" in job.output()
    assert not list((job.run_dir / "checkpoints").glob("*"))
    assert json.loads((job.run_dir / "lock").read_text())["token"] == "another"


@pytest.mark.parametrize(
    ("fault", "what"),
    [("drift_at", "weights"), pytest.param("disorder_at", "data order", marks=pytest.mark.slow)],
)
def test_diverged_ranks_end_the_run(fault: str, what: str, start: Any) -> None:
    job = start(3, restarts=0, fault={"rank": 2, fault: 4}, compare_every_steps=3)
    assert job.end() != 0
    assert (
        f"after step 6 the ranks differ in their {what}, which must be equal (outside the majority: 2)"
        in job.output()
    )
    assert job.status()["exit_code"] == 70 and not list(job.run_dir.glob("checkpoints/step-*"))


def test_nan_weights_are_never_saved(start: Any) -> None:
    job = start(0, fault={"poison_at": 5}, **{"checkpoint.every_steps": 4, "optim.max_nonfinite_steps": 20})
    assert job.end() == 70
    assert "the weights contain NaN or Inf after step 8, so it was not saved" in job.output()
    assert [p.name for p in (job.run_dir / "checkpoints").glob("*")] == ["step-00000004"]
    assert "loss nan" in job.output()


def test_nonfinite_steps_end_the_run_and_name_the_records(start: Any) -> None:
    job = start(0, fault={"poison_at": 5}, **{"optim.max_nonfinite_steps": 4})
    assert job.end() == 70
    assert "Records of the last step: train-" in job.output(), job.output()


def test_killed_loader_worker_is_reported_at_once(start: Any) -> None:
    job = start(0, fault={"slow_step_s": 0.3}, epochs=40, **{"data.workers": 1})
    job.wait_for_step(2)
    (worker,) = job.children_of(0)
    os.kill(worker, signal.SIGKILL)
    job.wait_until(lambda: job.status()["status"] == "failed", 60)  # 0.02 s on an idle machine
    assert job.end() == job.status()["exit_code"] == 70, job.output()
    assert "a loader process was killed, most likely because memory ran out" in job.output()


def test_run_on_a_full_disk_deletes_old_checkpoints_and_continues(start: Any, small_disk: Path) -> None:
    job = start(0, fault=SLOW, run_dir=small_disk / "run", **{"checkpoint.every_steps": 3})
    job.wait_until(lambda: (small_disk / "run/checkpoints/step-00000006").exists())
    ballast = small_disk / "ballast"
    free = os.statvfs(small_disk)
    ballast.write_bytes(b"x" * (free.f_bavail * free.f_bsize - 100_000))
    job.wait_until(lambda: "checkpoint NOT saved" in job.output())
    names = [p.name for p in (small_disk / "run/checkpoints").glob("*")]
    assert len(names) == 1 and names[0].startswith("step-")
    ballast.unlink()
    assert job.end() == 0, job.output()
    assert (small_disk / "run/checkpoints/step-00000030").exists()


def test_fewer_examples_than_ranks(finish: Any, tmp_path: Path, options: Any) -> None:
    content = json.loads(Path(options["data.train"]).read_text())
    article = content["data"][0]
    article["paragraphs"] = [{**article["paragraphs"][0], "qas": article["paragraphs"][0]["qas"][:1]}]
    (tmp_path / "one.json").write_text(json.dumps({"version": "v2.0", "data": [article]}))
    job = finish(
        2, restarts=0, max_steps=2, **{"data.train": tmp_path / "one.json", "data.dev": tmp_path / "one.json"}
    )
    assert job.status()["step"] == 2

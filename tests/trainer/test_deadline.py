"""A job's time limit: time left, number of requeues, lead time of the signal."""

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from plainloop.trainer.distributed.deadline import Deadline, StopTime
from plainloop.trainer.distributed.world import World
from plainloop.trainer.hooks import LogLine
from plainloop.trainer.run_folder.log import format_duration
from plainloop.trainer.state import Progress


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Any:
    """job(began_s_ago, ends_in_s) -> Deadline, with saves that take 20 s."""

    now = int(time.time())
    monkeypatch.setattr(time, "time", lambda: float(now))  # the clock stands still

    def make(ago: float, left: float) -> Deadline | None:
        monkeypatch.setenv("SLURM_JOB_START_TIME", str(int(now - ago)))
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now + left)))
        return Deadline.from_env(StopTime(step_s=4.0, batch_s=1.0, save_s=20.0))

    return make


def test_requeues(job: Any) -> None:
    """A one-hour job trains for 3600 s - 100 s of start-up - 90 s of signal lead time (60, a step of 4, a
    batch of 1, a save of 20, rounded up to 10 s) = 3410 s; this job has 3500 - 90 s left.
    """
    deadline = job(100, 3500)
    for needed, expected in ((3000, 0), (3400, 0), (3450, 1), (3410 + 3400, 1), (3410 + 3500, 2), (33000, 9)):
        assert deadline.outlook(needed)["requeues"] == expected
    assert deadline.stop_time.signal_s == 90 and "--signal=B:USR1@90 is early enough" in deadline.advice()
    outlook = deadline.outlook(7000)
    warning = deadline.warning(outlook, 7000)
    assert warning and "00:58:" in warning and "needs about 01:56:40 more; expect about 2 requeues" in warning
    assert deadline.warning(outlook, 7000) is None  # already warned
    assert deadline.warning(deadline.outlook(34100), 34100)  # more than in the first warning


def test_job_too_short_to_make_progress(job: Any) -> None:
    assert job(100, 10).outlook(1000)["requeues"] == 1000


def test_no_time_limit(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job(0, 30 * 365 * 86400) is None  # UNLIMITED
    assert job(100, -10) is None
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert Deadline.from_env(StopTime()) is None


def test_durations_and_signal_lead_time() -> None:
    assert (
        format_duration(59.9) == "00:00:59"
        and format_duration(90061) == "1d 01:01:01"
        and format_duration(0) == "00:00:00"
    )
    assert StopTime().signal_s == 60 and StopTime(step_s=0.5).signal_s == 70
    slow = StopTime(step_s=20.0, batch_s=15.0, save_s=10.0)
    assert slow.signal_s == 110 and slow.too_long(45) is None
    warning = slow.too_long(30)
    assert warning and "a stop takes up to 45 s (a step of 20.0 s, an evaluation batch of 15.0 s" in warning


def test_estimate_excludes_catching_up_after_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 100 s evaluation before the first step, then 1 s steps with 2 s of evaluation each."""
    now, told, cpu = [0.0], [], torch.device("cpu")
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    log: Any = SimpleNamespace(train_line=lambda *a: told.append(a[2]["left_s"]), record=lambda *a: None)
    line = LogLine(1, lambda _: 0.0)
    zero = torch.zeros(())
    state = SimpleNamespace(
        step=50, loss_count=0, loss_sum=zero.double(), grad_norm=zero, nonfinite_total=zero,
        device=cpu,
    )  # fmt: skip
    progress = Progress(state, 150, 100, log, World(0, 1, 0, cpu))  # type: ignore[arg-type]
    watch = progress.stopwatch
    line(progress)
    now[0], watch.seconds["evaluate"] = 100.0, 100.0
    for step in range(51, 61):
        now[0], state.step, state.loss_count = now[0] + 1, step, 1
        line(progress)
        now[0] += 2
        watch.seconds["evaluate"] += 2
    assert told[0] == pytest.approx(99) and told[-1] == pytest.approx(90 * (10 + 18) / 10)


def test_log_line_and_time_limit_warning(
    train: Any, job: Any, options: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    job(10, 300)
    Path(options["run_dir"]).mkdir()
    (Path(options["run_dir"]) / "status.json").write_text('{"save_s": 1000}')  # longer than the job has left
    train(max_steps=3)
    told = capsys.readouterr().err
    assert "  job 00:05:00" in told and "  requeues " in told
    assert re.search("the job ends in 00:05:00, the run needs .* expect about .* requeue", told)
    assert "--signal=B:USR1@70 is early enough" in told  # from this run's own save

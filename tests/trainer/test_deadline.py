"""A job's time limit: what is left, how many requeues, how early the signal."""

import time
from typing import Any

import pytest

from plainloop.trainer.deadline import Deadline, clock, signal_s


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Any:
    """job(began_s_ago, ends_in_s) -> its Deadline, with saves of 20 s."""

    def make(ago: float, left: float) -> Deadline | None:
        now = time.time()
        monkeypatch.setenv("SLURM_JOB_START_TIME", str(int(now - ago)))
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now + left)))
        return Deadline.from_env(lambda: 20.0)

    return make


def test_requeues(job: Any) -> None:
    """A life of an hour has 3600 s - 100 s of start-up - 90 s before its end (60, a step of 5, a save of 20,
    in whole 10 s) = 3410 s; this one has 3500 - 90 left.
    """
    deadline = job(100, 3500)
    for needed, expected in ((3000, 0), (3400, 0), (3450, 1), (3410 + 3400, 1), (3410 + 3500, 2), (33000, 9)):
        assert deadline.outlook(needed, 5.0)["requeues"] == expected
    assert deadline.signal_s == 90 and "--signal=B:USR1@90 is early enough" in deadline.advice()
    outlook = deadline.outlook(7000, 5.0)
    warning = deadline.warning(outlook, 7000)
    assert warning and "00:58:" in warning and "needs about 01:56:40 more: about 2 requeues" in warning
    assert deadline.warning(outlook, 7000) is None  # told
    assert deadline.warning(deadline.outlook(34100, 5.0), 34100)  # more than was told


def test_a_life_too_short_for_anything(job: Any) -> None:
    assert job(100, 10).outlook(1000, 1.0)["requeues"] == 1000


def test_no_limit(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job(0, 30 * 365 * 86400) is None  # UNLIMITED
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert Deadline.from_env(lambda: 0.0) is None


def test_clock_and_lead() -> None:
    assert clock(59.9) == "00:00:59" and clock(90061) == "1d 01:01:01" and clock(0) == "00:00:00"
    assert signal_s(0.0, 0.0) == 60 and signal_s(0.5, 0.0) == 70 and signal_s(20.0, 10.0) == 90


def test_the_log_line_tells_it(
    train: Any, job: Any, options: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    job(10, 65)
    train(max_steps=3)
    told = capsys.readouterr().err
    assert "job 00:01:0" in told and "requeues 1" in told
    assert "the job ends in 00:01:0" in told and "requeue to be expected" in told
    assert "--signal=B:USR1@70 is early enough" in told

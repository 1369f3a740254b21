"""Real torchrun jobs with injected faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HELPERS = Path(__file__).parents[1] / "helpers"
TRAIN, FORKING = str(HELPERS / "faulty_train.py"), str(HELPERS / "forking_torchrun.py")


class Job:
    """`faulty_train.py train` under torchrun (processes > 0) or in a single process.

    restarts: if given, ranks are forked (forking_torchrun.py) and restarted up to this many times.
    """

    def __init__(
        self, processes: int, options: dict[str, Any], *, fault: dict[str, Any], torchrun: list[str],
        restarts: int | None,
    ) -> None:  # fmt: skip
        self.run_dir, self.processes = Path(str(options["run_dir"])), processes
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *torchrun]
        line = [sys.executable, *(launcher if processes else []), TRAIN, "train"]
        if restarts is not None:
            line = [sys.executable, FORKING, str(processes), str(restarts), "train"]
        line += [text for name, value in options.items() for text in (f"--{name}", str(value))]
        self.run_dir.parent.mkdir(parents=True, exist_ok=True)
        self.log = self.run_dir.parent / f"{self.run_dir.name}-{time.monotonic_ns()}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": json.dumps(fault)}
        with open(self.log, "w") as stream:
            self.process = subprocess.Popen(line, stdout=stream, stderr=stream, env=environment)
        self.seen: set[int] = set()

    def ranks(self) -> dict[int, int]:
        """rank -> pid of the live ranks; forked ranks are numbered by age."""
        pids = children(self.process.pid) if self.processes else [self.process.pid]
        found = {}
        for pid in pids:
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                alive = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            except OSError:
                continue
            rank = next((int(e[5:]) for e in environment if e.startswith(b"RANK=")), len(found))
            if alive:
                found[rank] = pid
        self.seen |= set(found.values())
        return found

    def children_of(self, rank: int) -> list[int]:
        """Pids of a rank's loader workers."""
        return children(self.ranks()[rank])

    def wait_until(self, happened: Callable[[], bool], timeout_s: float = 120) -> None:
        until = time.monotonic() + timeout_s
        while True:
            ended = self.process.poll() is not None  # polled first, to see its last actions below
            if happened():
                break
            assert not ended, f"ended with {self.process.returncode}:\n{self.output()}"
            assert time.monotonic() < until, f"did not happen in {timeout_s} s:\n{self.output()}"
            time.sleep(0.01)
        self.ranks()

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: self.steps_done() >= step)

    def steps_done(self) -> int:
        """Last step in metrics.jsonl, which has one line per step."""
        try:
            lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
            return max((json.loads(line)["step"] for line in lines[-3:]), default=0)
        except (OSError, ValueError):
            return 0

    def end(self, timeout_s: float = 90) -> int:
        """Wait for the job and return its exit code; assert that no process is left after 10 s."""
        code = self.process.wait(timeout=timeout_s)
        until = time.monotonic() + 10
        while left := [pid for pid in self.seen if _alive(pid)]:
            assert time.monotonic() < until, f"processes {left} are still running"
            time.sleep(0.05)
        return code

    def signal_rank(self, rank: int, number: int) -> None:
        os.kill(self.ranks()[rank], number)

    def output(self) -> str:
        return self.log.read_text()[-6000:]

    def status(self) -> dict[str, Any]:
        return dict(json.loads((self.run_dir / "status.json").read_text()))

    def close(self) -> None:
        for pid in [self.process.pid, *self.ranks().values(), *self.seen]:
            if pid in (self.process.pid,) or _alive(pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        self.process.wait()


def children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Iterator[Callable[..., Job]]:
    """start(2, fault={...}, torchrun=[...], **more_options) -> Job; killed at the end of the test."""
    text = "text_options" in request.fixturenames
    options = request.getfixturevalue("text_options" if text else "options")
    jobs: list[Job] = []

    def begin(
        processes: int, *, fault: Any = None, torchrun: Any = (), restarts: int | None = None, **changes: Any
    ) -> Job:
        jobs.append(
            Job(processes, options | changes, fault=fault or {}, torchrun=list(torchrun), restarts=restarts)
        )
        return jobs[-1]

    yield begin
    for job in jobs:
        job.close()


@pytest.fixture
def finish(start: Callable[..., Job]) -> Callable[..., Job]:
    """Start a job and wait until it succeeds."""

    def run(processes: int, **changes: Any) -> Job:
        job = start(processes, **changes)
        assert job.end(240) == 0, job.output()
        return job

    return run

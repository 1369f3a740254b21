"""A real Slurm, and jobs in it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import cluster as slurm

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests/helpers"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes n1 and n2. If Slurm can't run here, tests are skipped with the reason."""
    if reason := slurm.why_not():
        pytest.skip(reason)
    running = slurm.Cluster(tmp_path_factory.mktemp("slurm"))
    running.start()
    yield running
    running.stop()


class SlurmJob:
    """A job of launch/NAME.sbatch; `python`: the text of a script to put in place of its `python`."""

    def __init__(
        self, cluster: Any, folder: Path, sbatch: list[str], script: Path, arguments: list[str],
        environment: dict[str, str], python: str | None,
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self.cluster, self.folder = cluster, folder
        self.log, self.notes = folder / "log.txt", folder / "notes.jsonl"
        path = str(Path(sys.executable).parent)
        if python is not None:
            (folder / "bin").mkdir(exist_ok=True)
            (folder / "bin/python").write_text(python)
            (folder / "bin/python").chmod(0o755)
            path = f"{folder}/bin:{path}"
        env = {
            **cluster.env, "PATH": f"{path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
            "VIRTUAL_ENV": sys.prefix, "NOTES": str(self.notes), **environment,
        }  # fmt: skip
        self.number = cluster.sbatch(
            f"--output={self.log}", *sbatch, str(script), *arguments, cwd=folder, env=env
        )

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def signal(self) -> None:
        """Send now the signal that --signal=B:USR1@... sends."""
        self.cluster.run("scancel", "--batch", "--signal=USR1", str(self.number))

    def wait_until(self, happened: Callable[[], Any], timeout_s: float = 120) -> None:
        until = time.monotonic() + timeout_s
        while not happened():
            assert time.monotonic() < until, f"did not happen in {timeout_s} s:\n{self.output()[-6000:]}"
            time.sleep(0.02)

    def end(self, timeout_s: float = 180) -> tuple[str, int]:
        """Wait for the job; return its final state and exit code."""
        shown = self.cluster.wait(self.number, timeout_s=timeout_s)
        return shown["JobState"], int(shown["ExitCode"].partition(":")[0])

    def restarts(self) -> int:
        return int(self.cluster.show(self.number)["Restarts"])

    def noted(self) -> list[dict[str, Any]]:
        return (
            [json.loads(line) for line in self.notes.read_text().splitlines()] if self.notes.exists() else []
        )


@pytest.fixture
def submit(cluster: Any, tmp_path: Path) -> Iterator[Callable[..., SlurmJob]]:
    """submit("train", *options, sbatch=[...], plan=[...] or fault={...}) -> SlurmJob.

    plan: run stand_in.py instead of the trainer. fault: run faulty_train.py. Neither: run the trainer.
    """
    jobs: list[SlurmJob] = []
    fault_program = HELPERS / "faulty_train.py"

    def begin(
        script: str, *arguments: str, sbatch: Any = (), plan: Any = None, fault: Any = None,
        folder: Path | None = None, scripts: Path = ROOT / "launch", **environment: str,
    ) -> SlurmJob:  # fmt: skip
        python = None
        if plan is not None:
            python = f'#!/bin/sh\nexec "{sys.executable}" -S "{HELPERS / "stand_in.py"}" "$@"\n'
        elif fault is not None:
            python = f"""#!/bin/bash
line=()
while [ $# -gt 0 ]; do
  if [ "$1 ${{2-}}" = "-m plainloop.trainer" ]; then line+=("{fault_program}"); shift; else line+=("$1"); fi
  shift
done
exec "{sys.executable}" "${{line[@]}}"
"""
        environment |= {"PLAN": json.dumps(plan), "FAULT": json.dumps(fault or {})}
        jobs.append(
            SlurmJob(
                cluster, folder or tmp_path / f"job{len(jobs)}", list(sbatch),
                scripts / f"{script}.sbatch", list(arguments), environment, python,
            )
        )  # fmt: skip
        return jobs[-1]

    yield begin
    for job in jobs:
        cluster.run("scancel", str(job.number), check=False)

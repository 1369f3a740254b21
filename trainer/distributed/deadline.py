"""Estimate how long a stop takes and, from a batch job's time limit, how many requeues a run needs."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from typing import Any

from plainloop.trainer.run_folder.log import format_duration

MARGIN_S = 60.0  # to notice RUN/stop (network file systems may show it late) and to end all processes


@dataclass
class StopTime:
    """Seconds from a signal to the last checkpoint, as measured so far. The signal may arrive at the start of
    a step or of an evaluation batch, which is finished first.
    """

    step_s: float = 0.0
    batch_s: float = 0.0  # the longest evaluation batch
    save_s: float = 0.0

    @classmethod
    def from_status(cls, status: dict[str, Any]) -> StopTime:
        """As measured before the last restart, according to status.json; zeros if there is none."""
        known = status.get("stop_time")
        return cls(**known) if isinstance(known, dict) else cls(save_s=status.get("save_s") or 0.0)

    @property
    def total(self) -> float:
        return self.step_s + self.batch_s + self.save_s

    @property
    def signal_s(self) -> int:
        """Lead time for sbatch's --signal: with a margin, rounded up to 10 s."""
        return math.ceil((MARGIN_S + self.total) / 10) * 10

    def __str__(self) -> str:
        batch = f", an evaluation batch of {self.batch_s:.1f} s" if self.batch_s else ""
        return f"a step of {self.step_s:.1f} s{batch} and a save of {self.save_s:.1f} s"

    def too_long(self, grace_s: float) -> str | None:
        """Return a warning if a stop takes longer than the grace period."""
        if self.total <= grace_s:
            return None
        return (
            f"WARNING: a stop takes up to {self.total:.0f} s ({self}), longer than the grace period"
            f" of {grace_s:.0f} s: the steps since the last checkpoint may be lost. Request an earlier signal"
            " (sbatch --signal) and set --checkpoint.grace_s to match."
        )


class Deadline:
    """Time limit of a batch job, from SLURM_JOB_START_TIME and SLURM_JOB_END_TIME (seconds since the epoch),
    which Slurm (23.11 or newer) or launch/train.sbatch sets.
    """

    def __init__(self, start: float, end: float, stop_time: StopTime) -> None:
        self.start, self.end, self.stop_time = start, end, stop_time
        self.startup_s = max(0.0, time.time() - start)  # from the job's start until training begins (now)
        self._told = 0

    @classmethod
    def from_env(cls, stop_time: StopTime) -> Deadline | None:
        end, start = (os.environ.get(f"SLURM_JOB_{name}_TIME", "") for name in ("END", "START"))
        # UNLIMITED is about a hundred years ahead; an end time in the past belongs to an outer job.
        if not end.isdigit() or not 0 < int(end) - time.time() < 10 * 365 * 86400:
            return None
        return cls(float(start) if start.isdigit() else time.time(), float(end), stop_time)

    def outlook(self, needed_s: float) -> dict[str, Any]:
        """Values for a log line: seconds left in the job and the expected number of requeues."""
        left = max(0.0, self.end - time.time())
        return {"job_left_s": left, "requeues": self._requeues(needed_s, left)}

    def _requeues(self, needed_s: float, left_s: float) -> int:
        missing = needed_s - max(0.0, left_s - self.stop_time.signal_s)
        life = self.end - self.start - self.startup_s - self.stop_time.signal_s
        return 0 if missing <= 0 else math.ceil(missing / max(life, 1.0))

    def warning(self, outlook: dict[str, Any], needed_s: float) -> str | None:
        """Return a warning if more requeues are expected than last reported."""
        if outlook["requeues"] <= self._told:
            return None
        self._told = outlook["requeues"]
        left, needed = format_duration(outlook["job_left_s"]), format_duration(needed_s)
        requeues = "1 requeue" if self._told == 1 else f"{self._told} requeues"
        return f"the job ends in {left}, the run needs about {needed} more; expect about {requeues}"

    def advice(self) -> str:
        early = f"--signal=B:USR1@{self.stop_time.signal_s} is early enough"
        return f"a stop takes {self.stop_time}: with a minute to spare, {early}"

"""How long a stop takes; and a batch job's time limit: how many requeues until the run ends?"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from typing import Any

MARGIN_S = 60.0  # to notice RUN/stop (a network file system may show it late) and to end all processes


@dataclass
class StopTime:
    """Seconds from a signal to the last checkpoint, as far as measured: a signal can come at the start of a
    step or of a batch of an evaluation, which is ended first.
    """

    step_s: float = 0.0
    batch_s: float = 0.0  # of an evaluation; the longest
    save_s: float = 0.0

    @property
    def total(self) -> float:
        return self.step_s + self.batch_s + self.save_s

    @property
    def signal_s(self) -> int:
        """The lead time for sbatch's --signal: with a margin, in whole 10 s."""
        return math.ceil((MARGIN_S + self.total) / 10) * 10

    def __str__(self) -> str:
        batch = f", a batch of an evaluation of {self.batch_s:.1f} s" * (self.batch_s > 0)
        return f"a step of {self.step_s:.1f} s{batch} and a save of {self.save_s:.1f} s"

    def too_long(self, grace_s: float) -> str | None:
        """A warning when a stop takes longer than it is given."""
        if self.total <= grace_s:
            return None
        return (
            f"WARNING: a stop takes up to {self.total:.0f} s ({self}), and after a signal there are"
            f" {grace_s:.0f} s: the steps since the last checkpoint may be lost. Ask for an earlier signal"
            " (sbatch --signal), and set --checkpoint.grace_s to the time that gives."
        )


class Deadline:
    """From SLURM_JOB_START_TIME and SLURM_JOB_END_TIME, seconds since the epoch, as Slurm (23.11 or newer) or
    launch/train.sbatch sets them.
    """

    def __init__(self, start: float, end: float, stop_time: StopTime) -> None:
        self.start, self.end, self.stop_time = start, end, stop_time
        self.startup_s = max(0.0, time.time() - start)  # of this life until now, where training begins
        self._told = 0

    @classmethod
    def from_env(cls, stop_time: StopTime) -> Deadline | None:
        end, start = (os.environ.get(f"SLURM_JOB_{name}_TIME", "") for name in ("END", "START"))
        # UNLIMITED is some hundred years ahead; a time that is past is that of an outer job.
        if not end.isdigit() or not 0 < int(end) - time.time() < 10 * 365 * 86400:
            return None
        return cls(float(start) if start.isdigit() else time.time(), float(end), stop_time)

    def outlook(self, needed_s: float) -> dict[str, Any]:
        """For a log line: seconds that the job has left, and the requeues that are to be expected."""
        left = max(0.0, self.end - time.time())
        return {"job_left_s": left, "requeues": self._requeues(needed_s, left)}

    def _requeues(self, needed_s: float, left_s: float) -> int:
        missing = needed_s - max(0.0, left_s - self.stop_time.signal_s)
        life = self.end - self.start - self.startup_s - self.stop_time.signal_s
        return 0 if missing <= 0 else math.ceil(missing / max(life, 1.0))

    def warning(self, outlook: dict[str, Any], needed_s: float) -> str | None:
        """When more requeues are expected than was told before."""
        if outlook["requeues"] <= self._told:
            return None
        self._told = outlook["requeues"]
        return (
            f"the job ends in {clock(outlook['job_left_s'])}, the run needs about {clock(needed_s)} more:"
            f" about {self._told} requeue{'s' * (self._told > 1)} to be expected"
        )

    def advice(self) -> str:
        early = f"--signal=B:USR1@{self.stop_time.signal_s} is early enough"
        return f"a stop takes {self.stop_time}: with a minute to spare, {early}"


def clock(seconds: float) -> str:
    """90061 -> '1d 01:01:01'."""
    days = f"{int(seconds // 86400)}d " if seconds >= 86400 else ""
    return days + time.strftime("%H:%M:%S", time.gmtime(seconds % 86400))

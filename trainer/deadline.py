"""A batch job's time limit: does the run end before it, and if not, how many lives will it take?"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

MARGIN_S = 60.0  # to notice RUN/stop (a network file system may show it late) and to end all processes


class Deadline:
    """From SLURM_JOB_START_TIME and SLURM_JOB_END_TIME, seconds since the epoch, as Slurm (23.11 or newer) or
    launch/train.sbatch sets them. save_s: seconds of a save, as far as known.
    """

    def __init__(self, start: float, end: float, save_s: Callable[[], float]) -> None:
        self.start, self.end, self._save_s = start, end, save_s
        self.startup_s = max(0.0, time.time() - start)  # of this life until now, where training begins
        self.step_s = 0.0
        self._told = 0

    @classmethod
    def from_env(cls, save_s: Callable[[], float]) -> Deadline | None:
        end, start = (os.environ.get(f"SLURM_JOB_{name}_TIME", "") for name in ("END", "START"))
        # UNLIMITED is some hundred years ahead; a time that is past is that of an outer job.
        if not end.isdigit() or not 0 < int(end) - time.time() < 10 * 365 * 86400:
            return None
        return cls(float(start) if start.isdigit() else time.time(), float(end), save_s)

    @property
    def signal_s(self) -> int:
        """Seconds before the limit at which a signal is early enough: a margin, a step, a save."""
        return signal_s(self.step_s, self._save_s())

    def outlook(self, needed_s: float, step_s: float) -> dict[str, Any]:
        """For a log line: seconds that the job has left, and the requeues that are to be expected."""
        self.step_s = max(self.step_s, step_s)
        left = max(0.0, self.end - time.time())
        return {"job_left_s": left, "requeues": self._requeues(needed_s, left)}

    def _requeues(self, needed_s: float, left_s: float) -> int:
        missing = needed_s - max(0.0, left_s - self.signal_s)
        life = self.end - self.start - self.startup_s - self.signal_s
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
        return (
            f"a stop takes a step of {self.step_s:.1f} s and a save of {self._save_s():.1f} s: with a minute"
            f" to spare, --signal=B:USR1@{self.signal_s} is early enough"
        )


def signal_s(step_s: float, save_s: float) -> int:
    """The lead time for sbatch's --signal, in whole 10 s."""
    return math.ceil((MARGIN_S + step_s + save_s) / 10) * 10


def clock(seconds: float) -> str:
    """90061 -> '1d 01:01:01'."""
    days = f"{int(seconds // 86400)}d " if seconds >= 86400 else ""
    return days + time.strftime("%H:%M:%S", time.gmtime(seconds % 86400))

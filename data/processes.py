"""End child processes with their parent: an orphan would keep training and writing."""

from __future__ import annotations

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask the kernel to send signal `number` to this process when its parent dies. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))

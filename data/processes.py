"""How processes end: a child with its parent, since an orphan would keep training and writing."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import NoReturn

PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_parent(number: int = signal.SIGKILL, *, parent: int | None = None) -> None:
    """Ask the kernel to send signal `number` to this process when its parent dies. Linux only.

    parent: its pid, taken before the fork. If it has died since, the kernel will send nothing: the process
    then sends the signal to itself. An orphan of a rank would hold the rank's connections open, and neither
    the other ranks nor torchrun would notice that the rank is dead.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), number)


def exit_rank(code: int = 0) -> NoReturn:
    """Exit a process that was in a process group. Python's own shutdown would tear the group down, and aborts
    now and then (torch 2.13, gloo): "terminate called without an active exception". Close files before.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

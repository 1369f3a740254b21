"""How a run ends that does not end well: one line that says why and what to do, and an exit code."""

from __future__ import annotations

import errno
import os

from plainloop.data.types import InputError

USAGE, UNKNOWN, NUMERICAL, IO, INTERRUPTED = 2, 1, 70, 74, 130  # 70 and 74 as in sysexits.h

LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "Gloo", "NCCL")
LOST_WORKER = ("DataLoader worker (pid", "Pin memory thread exited unexpectedly")
NO_MEMORY = ("out of memory", "DefaultCPUAllocator: ", "CUBLAS_STATUS_ALLOC_FAILED")
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.EACCES, errno.EPERM)


class RunError(RuntimeError):
    """The run cannot go on. exit_code: NUMERICAL or IO."""

    def __init__(self, message: str, exit_code: int = NUMERICAL) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Doubt(Exception):
    """Of a check by doctor: the run may work; the line says what to look at."""


def is_out_of_memory(error: BaseException) -> bool:
    """Of the GPU or of this process; torch has one class for the former, and texts for the rest."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in NO_MEMORY)


def explain(error: BaseException) -> tuple[str, int]:
    """The line and the exit code; UNKNOWN for what deserves a traceback."""
    text, rank = " ".join(str(error).split()), os.environ.get("RANK", "0")
    if isinstance(error, InputError):
        return str(error), USAGE
    if isinstance(error, RunError):
        return text, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted before there was anything to save", INTERRUPTED
    if isinstance(error, OSError) and error.errno in STORAGE:
        return f"{error.filename or 'storage'}: {error.strerror}; the same command continues.", IO
    if is_out_of_memory(error):
        return (
            f"rank {rank}: out of memory: lower --tokens_per_device (the curve stays the same), or set"
            " --model.activation_checkpointing true; in an evaluation lower --evaluation.tokens_per_device."
            f" ({text[:200]})",
            USAGE,
        )
    if isinstance(error, RuntimeError) and any(mark in text for mark in LOST_WORKER):
        remedy = "most likely for lack of memory: lower --data.workers, or ask for more memory"
        return f"rank {rank}: a loader process was killed, {remedy} ({text[:200]}).", NUMERICAL
    if isinstance(error, RuntimeError) and any(mark in text for mark in LOST_RANK):
        cause = "it was killed (for lack of memory?) or failed; its own message, if any, tells why"
        return (
            f"rank {rank}: lost another rank: {cause}. The same command continues. ({text[:120]})",
            NUMERICAL,
        )
    return text or type(error).__name__, UNKNOWN

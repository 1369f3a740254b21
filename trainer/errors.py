"""Map exceptions to a one-line message (what happened and what to do) and an exit code."""

from __future__ import annotations

import errno
import os

from plainloop.data.errors import InputError

USAGE, UNKNOWN, NUMERICAL, IO, INTERRUPTED = 2, 1, 70, 74, 130  # 70 and 74 as in sysexits.h

LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "Gloo", "NCCL")
UNUSED = "Expected to have finished reduction in the prior iteration"  # of DistributedDataParallel
LOST_WORKER = ("DataLoader worker (pid", "Pin memory thread exited unexpectedly")
NO_MEMORY = ("out of memory", "DefaultCPUAllocator: ", "CUBLAS_STATUS_ALLOC_FAILED")
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.EACCES, errno.EPERM)


class RunError(RuntimeError):
    """The run cannot continue. exit_code: NUMERICAL or IO."""

    def __init__(self, message: str, exit_code: int = NUMERICAL) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class CheckWarning(Exception):
    """Warning of a doctor check: the run may work; the message says what to look at."""


def is_out_of_memory(error: BaseException) -> bool:
    """GPU or host out of memory. torch has an exception class for the GPU, but only messages for the rest."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in NO_MEMORY)


def explain(error: BaseException) -> tuple[str, int]:
    """Return the message and the exit code; UNKNOWN for errors that deserve a traceback."""
    text, rank = " ".join(str(error).split()), os.environ.get("RANK", "0")
    if isinstance(error, InputError):
        return str(error), USAGE
    if isinstance(error, RunError):
        return text, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted before there was anything to save", INTERRUPTED
    if isinstance(error, OSError) and error.errno in STORAGE:
        return f"{error.filename or 'storage'}: {error.strerror}; rerun the same command to resume.", IO
    if is_out_of_memory(error):
        return (
            f"rank {rank}: out of memory: lower --tokens_per_device (the loss curve stays the same) or set"
            " --model.activation_checkpointing true; in evaluation, lower --evaluation.tokens_per_device."
            f" ({text[:200]})",
            USAGE,
        )
    if isinstance(error, RuntimeError) and UNUSED in text:
        return (
            "some parameters of the model got no gradient, so that DistributedDataParallel waited for them."
            " If they are never used, freeze them, or give the model the attribute unused_parameters = True.",
            USAGE,
        )
    if isinstance(error, RuntimeError) and any(mark in text for mark in LOST_WORKER):
        remedy = "most likely because memory ran out: lower --data.workers or request more memory"
        return f"rank {rank}: a loader process was killed, {remedy} ({text[:200]}).", NUMERICAL
    if isinstance(error, RuntimeError) and any(mark in text for mark in LOST_RANK):
        cause = "it was killed (out of memory?) or failed; see its own message, if any"
        return (
            f"rank {rank}: lost another rank: {cause}. Rerun the same command to resume. ({text[:120]})",
            NUMERICAL,
        )
    return text or type(error).__name__, UNKNOWN

"""The run folder: rank 0 holds its lock and keeps status.json.

RUN/status.json   running | completed | stopped | failed, the step and the reason, for scripts and people
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from plainloop.trainer.errors import InputError, explain
from plainloop.trainer.run_folder.files import sweep, write_atomically
from plainloop.trainer.run_folder.lock import Lock, job_id

OURS = "lock status.json stop checkpoints evaluation tensorboard metrics.jsonl config.yaml".split()


class RunFolder:
    """Rank 0 writes here. Other ranks write only the reason when they fail first."""

    def __init__(self, path: Path, rank: int, lock: Lock | None) -> None:
        self.path, self.rank, self.lock = path, rank, lock
        self.before = read_status(path)  # status.json of the previous start
        self.joined = lock is not None  # other ranks: once they know that rank 0 holds the lock
        self._verdict: dict[str, Any] = {}  # how the run ended, once it has
        self._known: dict[str, Any] = {}

    def status(self, status: str, **values: Any) -> None:
        """Atomically update status.json. Values not given stay as they were. No-op if the lock is lost."""
        if self.lock is not None and self.lock.lost():
            return
        self._known |= {"status": status, **values}
        record = {**self._known, "job": job_id(), "host": socket.gethostname(), "pid": os.getpid()}
        with contextlib.suppress(OSError):  # a full disk must not end the run
            write_atomically(self.path / "status.json", json.dumps({**record, "time": time.time()}, indent=1))

    def progress(self, **values: Any) -> None:
        """Rank 0 only. Update status.json, but never overwrite a failure of another rank."""
        if read_status(self.path).get("status") == "running":
            self.status("running", **values)

    def ended(self, status: str, **values: Any) -> None:
        """All ranks. How the run ended; written when the folder is released, after everything else."""
        self._verdict = {"status": status, **values}

    def require_ownership(self) -> None:
        """Raise RunError if another run has taken over the folder."""
        if self.lock is not None:
            self.lock.check()

    def failed(self, reason: str, exit_code: int) -> bool:
        """Any rank. Record the first failure. Return False for later ones, which are its consequences."""
        if not self.joined:
            return True
        if read_status(self.path).get("status") == "failed":
            return False
        self._known = {**read_status(self.path), **self._known}
        self.status("failed", reason=reason, exit_code=exit_code, rank=self.rank)
        return True


def read_status(run_dir: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run_dir / "status.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


@contextlib.contextmanager
def hold(run_dir: Path, rank: int, say: Callable[[str], None]) -> Iterator[RunFolder]:
    """All ranks. Rank 0 creates the folder, checks that it is writable, and holds the lock until the end.

    An exception that passes through is recorded in status.json with its exit code.
    """
    lock = None
    if rank == 0:
        lock = Lock(run_dir / "lock")
        _open(run_dir, lock, say)
    folder = RunFolder(run_dir, rank, lock)
    try:
        if lock:
            folder.status("running", reason=None, exit_code=None)
        yield folder
        if lock and folder._verdict:
            folder.status(**folder._verdict)
    except BaseException as error:
        folder.failed(*explain(error))
        raise
    finally:
        if lock:
            lock.release()


def _open(run_dir: Path, lock: Lock, say: Callable[[str], None]) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in OURS:
            if (run_dir / name).is_symlink():
                raise InputError(
                    f"{run_dir / name} is a symbolic link, which is never written through: remove it, or"
                    " make run_dir itself the link."
                )
        probe = run_dir / f".tmp-probe-{lock.token}"
        write_atomically(probe, "probe")
        probe.unlink()
        lock.acquire(say)
        sweep(run_dir)
        sweep(run_dir / "evaluation")
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if not restarted and "PLAINLOOP_KEEP_STOP" not in os.environ:  # which launch/train.sbatch sets
            (run_dir / "stop").unlink(missing_ok=True)  # left by an earlier job
    except OSError as error:
        raise InputError(f"run_dir {run_dir}: {error.strerror or error}; choose a writable folder.") from None

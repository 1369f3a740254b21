"""The run folder as its one writer holds it: a lock that tells a living holder from a dead one, status.json.

RUN/lock          who writes here: host, process, job; touched every few seconds by a thread
RUN/status.json   running | completed | stopped | failed, the step, the reason, for scripts and people
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from plainloop.data.types import InputError
from plainloop.trainer.checkpoint import no_follow, sweep, write_atomically
from plainloop.trainer.deadline import StopTime
from plainloop.trainer.errors import IO, RunError, explain

BEAT_S = 5.0  # the lock's time stamp is renewed this often
PATIENCE_S = 25.0  # a holder on another machine that is silent for so long is gone
LEAVING_S = 5.0  # a holder on this machine may be about to end
OURS = "lock status.json stop checkpoints evaluation tensorboard metrics.jsonl config.yaml".split()
JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")


class Lock:
    """One writer for a folder. Built on O_EXCL and time stamps, which network file systems have; flock they
    may not have.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.token = uuid.uuid4().hex
        self._ended = threading.Event()

    def acquire(self, say: Callable[[str], None]) -> None:
        """Raises InputError while another process holds it; takes it over from a dead one. OSError."""
        holder = {"token": self.token, "job": job_id(), **this_process(), "since": time.ctime()}
        for _ in range(10):
            try:
                with open(self.path, "x", encoding="utf-8", opener=no_follow) as stream:
                    stream.write(json.dumps(holder))
                threading.Thread(target=self._beat, daemon=True, name="lock").start()
                return
            except FileExistsError:
                other = self._read()
            if other is None:  # released just now
                continue
            if other and _lives(other, self.path):
                raise InputError(
                    f"{self.path.parent} is being written to by another run: {describe(other)}, since"
                    f" {other.get('since')}. Wait for it, stop it, or choose another run_dir."
                )
            if self._remove(other):
                say(f"the lock of a run that is gone is taken over: {describe(other)}")
        raise InputError(f"{self.path}: other runs keep taking this lock; choose another run_dir.")

    def check(self) -> None:
        """Raises RunError when somebody else has taken the folder over, as after a long suspension."""
        if self.lost():
            holder = describe(self._read() or {})
            raise RunError(
                f"{self.path.parent} now belongs to {holder}: this process writes nothing more.", IO
            )

    def lost(self) -> bool:
        """Is it another's, or gone for good? (For a moment it is, when another start looks at it.)"""
        holder = self._read()
        for _ in range(20):
            if holder is not None:
                break
            time.sleep(0.1)
            holder = self._read()
        return holder is None or holder.get("token") != self.token

    def release(self) -> None:
        self._ended.set()
        if (self._read() or {}).get("token") == self.token:
            self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any] | None:
        """The holder; {} when it was not written to its end, None when it can't be read."""
        for attempt in range(10):  # it may be being written
            try:
                return dict(json.loads(self.path.read_text(encoding="utf-8")))
            except FileNotFoundError:
                return None
            except (OSError, ValueError) as error:
                if attempt == 9 and isinstance(error, ValueError):
                    return {}
                time.sleep(0.1)
        return None

    def _remove(self, stale: dict[str, Any]) -> bool:
        """Move it away first: of two that see the same stale lock only one may remove it."""
        aside = self.path.with_name(f".tmp-lock-{self.token}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return False
        try:
            moved = json.loads(aside.read_text(encoding="utf-8"))
        except ValueError:
            moved = {}
        if moved.get("token") != stale.get("token"):  # a new holder's, in the meantime
            os.rename(aside, self.path)
            return False
        aside.unlink()
        return True

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            holder = self._read()
            if holder and holder.get("token") != self.token:
                return
            with contextlib.suppress(OSError):
                os.utime(self.path, follow_symlinks=False)


def this_process() -> dict[str, Any]:
    """What tells this process from every other one, now and after a reboot."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "start": _start(os.getpid()),
    }


def job_id() -> str | None:
    """Of the batch system, if there is one."""
    return next((os.environ[name] for name in JOB_VARIABLES if os.environ.get(name)), None)


def describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "an unknown process"
    job = f", job {holder['job']}" if holder.get("job") else ""
    return f"host {holder.get('host')}, process {holder.get('pid')}{job}"


def _lives(holder: dict[str, Any], path: Path) -> bool:
    """On this machine: is there that process? Elsewhere: does the lock's time stamp move, by any clock?"""
    if holder.get("machine") == _machine():
        until = time.monotonic() + LEAVING_S
        while _start(int(holder.get("pid", 0))) == holder.get("start"):
            if time.monotonic() > until:
                return True
            time.sleep(0.1)
        return False
    until, seen = time.monotonic() + PATIENCE_S, _stamp(path)
    while time.monotonic() < until:
        time.sleep(0.5)
        if (now := _stamp(path)) != seen:
            return now is not None  # gone: it was released
    return False


def _stamp(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _machine() -> str:
    """This boot of this machine, and the process namespace: where process numbers mean what they say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"unknown {uuid.uuid4().hex}"


def _start(pid: int) -> str | None:
    """When a process began, in clock ticks since boot; None when there is none, or only its zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class RunFolder:
    """Rank 0 writes here; a rank that fails by itself leaves its reason too."""

    def __init__(self, path: Path, lock: Lock | None) -> None:
        self.path, self.lock = path, lock
        self.before = read_status(path)  # of the last life
        self.joined = lock is not None  # other ranks: only when they know that rank 0 holds the folder
        self.verdict: dict[str, Any] = {}  # how the run ended, once it has
        self._known: dict[str, Any] = {}

    def status(self, status: str, **values: Any) -> None:
        """Replace status.json as a whole; what was told before stays unless told anew. Not another run's."""
        if self.lock is not None and self.lock.lost():
            return
        self._known |= {"status": status, **values}
        record = {**self._known, "job": job_id(), "host": socket.gethostname(), "pid": os.getpid()}
        with contextlib.suppress(OSError):  # a full disk costs the status, not the run
            write_atomically(self.path / "status.json", json.dumps({**record, "time": time.time()}, indent=1))

    def stop_time(self) -> StopTime:
        """As the life before measured it; zeros when there was none."""
        known = self.before.get("stop_time")
        return (
            StopTime(**known)
            if isinstance(known, dict)
            else StopTime(save_s=self.before.get("save_s") or 0.0)
        )

    def progress(self, **values: Any) -> None:
        """Rank 0 only. Not over a failure that another rank has left."""
        if read_status(self.path).get("status") == "running":
            self.status("running", **values)

    def still_ours(self) -> None:
        """Raises RunError when another run has taken the folder over."""
        if self.lock is not None:
            self.lock.check()

    def failed(self, reason: str, exit_code: int, rank: int) -> bool:
        """Any rank. The first reason counts: what other ranks see is its consequence. False: not it."""
        if not self.joined:
            return True
        if read_status(self.path).get("status") == "failed":
            return False
        self._known = {**read_status(self.path), **self._known}
        self.status("failed", reason=reason, exit_code=exit_code, rank=rank)
        return True


def read_status(run_dir: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run_dir / "status.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


@contextlib.contextmanager
def hold(run_dir: Path, rank: int, say: Callable[[str], None]) -> Iterator[RunFolder]:
    """All ranks. Rank 0 makes the folder, shows that it can be written to, and locks it to the end.

    An exception that passes through is written into status.json with its exit code.
    """
    lock = None
    if rank == 0:
        lock = Lock(run_dir / "lock")
        _open(run_dir, lock, say)
    folder = RunFolder(run_dir, lock)
    try:
        if lock:
            folder.status("running", reason=None, exit_code=None)
        yield folder
        if lock and folder.verdict:
            folder.status(**folder.verdict)
    except BaseException as error:
        folder.failed(*explain(error), rank)
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
                    f"{run_dir / name} is a symbolic link; nothing is written through it: remove it, or make"
                    " run_dir itself the link."
                )
        probe = run_dir / f".tmp-probe-{lock.token}"
        write_atomically(probe, "probe")
        probe.unlink()
        lock.acquire(say)
        sweep(run_dir)
        sweep(run_dir / "evaluation")
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if not restarted and "PLAINLOOP_KEEP_STOP" not in os.environ:  # which launch/train.sbatch sets
            (run_dir / "stop").unlink(missing_ok=True)  # of an earlier job
    except OSError as error:
        raise InputError(
            f"run_dir {run_dir}: {error.strerror or error}; choose a folder that can be written to."
        ) from None

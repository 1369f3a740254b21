"""Exclusive ownership of a folder. RUN/lock names the holder; a heartbeat thread touches it, so that stale
locks are detected and taken over.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plainloop.trainer.errors import IO, InputError, RunError
from plainloop.trainer.run_folder.files import no_follow

BEAT_S = 5.0  # heartbeat: how often the lock's timestamp is renewed
PATIENCE_S = 25.0  # a lock held on another machine is stale after this long without a heartbeat
LEAVING_S = 5.0  # how long to wait for a holder on this machine to exit
JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")


class Lock:
    """One writer per folder. Uses O_EXCL and timestamps, because network file systems may lack flock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.token = uuid.uuid4().hex
        self._ended = threading.Event()

    def acquire(self, say: Callable[[str], None]) -> None:
        """Take the lock, even a stale one. Raises InputError if a live process holds it, and OSError."""
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
                say(f"taking over a stale lock: {describe(other)}")
        raise InputError(f"{self.path}: other runs keep taking this lock; choose another run_dir.")

    def check(self) -> None:
        """Raise RunError if another run has taken over the folder, e.g. after a long suspension."""
        if self.lost():
            holder = describe(self._read() or {})
            raise RunError(
                f"{self.path.parent} now belongs to {holder}: this process has stopped writing.", IO
            )

    def lost(self) -> bool:
        """Is the lock another run's, or gone for good? (Another start may move it away for a moment.)"""
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
        """Return the holder; {} if the file is incomplete, None if it can't be read."""
        for attempt in range(10):  # another process may be writing it
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
        """Remove a stale lock. Rename it first: of two processes that see it, only one may remove it."""
        aside = self.path.with_name(f".tmp-lock-{self.token}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return False
        try:
            moved = json.loads(aside.read_text(encoding="utf-8"))
        except ValueError:
            moved = {}
        if moved.get("token") != stale.get("token"):  # meanwhile there is a new holder
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
    """Identify this process uniquely, even across reboots."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "start": _start(os.getpid()),
    }


def job_id() -> str | None:
    """Return the batch system's job id, or None."""
    return next((os.environ[name] for name in JOB_VARIABLES if os.environ.get(name)), None)


def describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "an unknown process"
    job = f", job {holder['job']}" if holder.get("job") else ""
    return f"host {holder.get('host')}, process {holder.get('pid')}{job}"


def _lives(holder: dict[str, Any], path: Path) -> bool:
    """Is the holder alive? On this machine: does its process exist? Elsewhere: does the lock's timestamp
    change, whatever the clocks say?
    """
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
            return now is not None  # None: the lock was released
    return False


def _stamp(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _machine() -> str:
    """Identify this boot of this machine and the PID namespace: PIDs are comparable only within both."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"unknown {uuid.uuid4().hex}"


def _start(pid: int) -> str | None:
    """Return a process's start time in clock ticks since boot; None if there is none or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]

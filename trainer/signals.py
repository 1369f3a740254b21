"""Requests to stop: SIGTERM, SIGINT and SIGUSR1 set a flag, and so does a file RUN/stop."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
FILE_POLL_S = 1.0  # a stat on a network file system costs about 1 ms
SECOND_S = 1.0  # a SIGINT within this time of the first is the same one, by way of torchrun


class StopRequest:
    """Has this process been asked to stop, and how? The ranks agree on it elsewhere."""

    def __init__(self, stop_file: Path | None) -> None:
        self.reason: str | None = None
        self._stop_file = stop_file
        self._next_look = 0.0

    def pending(self) -> bool:
        if self.reason is None and self._stop_file is not None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + FILE_POLL_S
            if os.path.exists(self._stop_file):  # False for an I/O error too
                self.reason = f"the file {self._stop_file}"
        return self.reason is not None

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.reason is None:
            self.reason = signal.Signals(number).name

    @contextlib.contextmanager
    def listening(self, at_once: Callable[[str], object]) -> Iterator[StopRequest]:
        """From here on, see handlers_restored. at_once(reason) is told before a second SIGINT ends all."""
        for number in NUMBERS:
            signal.signal(number, self._on_signal)
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        old = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        threading.Thread(
            target=_wait_for_second, args=(read_end, at_once), daemon=True, name="sigint"
        ).start()
        try:
            yield self
        finally:
            signal.set_wakeup_fd(old)
            os.close(write_end)  # the thread reads the end of it


@contextlib.contextmanager
def handlers_restored(*, ignore: bool) -> Iterator[None]:
    """When everything else is done, leave the handlers as they were; or ignore signals from then on: the
    outcome is decided and on disk, and a late one must not change the exit code.
    """
    before = {number: signal.getsignal(number) for number in NUMBERS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if ignore else handler)


def _wait_for_second(read_end: int, at_once: Callable[[str], object]) -> None:
    """A thread, since the main one may be waiting for another rank, where Python handles no signal."""
    first: float | None = None
    while numbers := os.read(read_end, 64):
        for number in numbers:
            if number == signal.SIGINT and first is not None and time.monotonic() - first > SECOND_S:
                reason = "a second SIGINT: ended at once, without a checkpoint"
                at_once(reason)
                print(f"plainloop: {reason}", file=sys.stderr, flush=True)
                os._exit(130)
            if number == signal.SIGINT and first is None:
                first = time.monotonic()
    os.close(read_end)

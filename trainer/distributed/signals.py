"""Graceful shutdown: SIGTERM, SIGINT, SIGUSR1 or the file RUN/stop set a flag."""

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

from plainloop.trainer.errors import INTERRUPTED

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
FILE_POLL_S = 1.0  # a stat on a network file system costs about 1 ms
SECOND_S = 1.0  # a SIGINT this soon after the first is the same one, forwarded by torchrun


class StopRequest:
    """Whether and how this process was asked to stop. The Stop hook makes all ranks agree."""

    def __init__(self, stop_file: Path | None) -> None:
        self.reason: str | None = None
        self._stop_file = stop_file
        self._next_look = 0.0

    def pending(self) -> bool:
        if self.reason is None and self._stop_file is not None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + FILE_POLL_S
            if os.path.exists(self._stop_file):  # also False on an I/O error
                self.reason = f"the file {self._stop_file}"
        return self.reason is not None

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.reason is None:
            self.reason = signal.Signals(number).name

    @contextlib.contextmanager
    def listening(self, at_once: Callable[[str, int], object]) -> Iterator[StopRequest]:
        """Install the handlers. A second SIGINT calls at_once(reason, exit code), then exits."""
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
            os.close(write_end)  # the thread reads EOF and ends


@contextlib.contextmanager
def handlers_restored(*, ignore: bool) -> Iterator[None]:
    """On exit, restore the handlers, or ignore signals from then on: the outcome is saved, and a late
    signal must not change the exit code.
    """
    before = {number: signal.getsignal(number) for number in NUMBERS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if ignore else handler)


def _wait_for_second(read_end: int, at_once: Callable[[str, int], object]) -> None:
    """Runs in a thread: Python handles no signals while the main thread waits for another rank."""
    first: float | None = None
    while numbers := os.read(read_end, 64):
        for number in numbers:
            if number == signal.SIGINT and first is not None and time.monotonic() - first > SECOND_S:
                reason = "second SIGINT: exited immediately without a checkpoint"
                at_once(reason, INTERRUPTED)
                print(f"plainloop: {reason}", file=sys.stderr, flush=True)
                os._exit(INTERRUPTED)
            if number == signal.SIGINT and first is None:
                first = time.monotonic()
    os.close(read_end)

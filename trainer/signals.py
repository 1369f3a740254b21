"""Requests to stop: SIGTERM, SIGINT and SIGUSR1 set a flag, and so does a file RUN/stop."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

FILE_POLL_S = 1.0  # a stat on a network file system costs about 1 ms


class StopRequest:
    """Has this process been asked to stop, and how? The ranks agree on it elsewhere."""

    def __init__(self, stop_file: Path | None) -> None:
        self.reason: str | None = None
        self._stop_file = stop_file
        self._next_look = 0.0

    def pending(self) -> bool:
        if self.reason is None and self._stop_file is not None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + FILE_POLL_S
            if self._stop_file.exists():
                self.reason = f"the file {self._stop_file}"
        return self.reason is not None

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == signal.Signals(number).name:
            raise KeyboardInterrupt  # the second Ctrl-C means it
        self.reason = signal.Signals(number).name

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

"""Detect hung ranks: a thread in every rank aborts a run that hangs, and reports which rank, and where."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from plainloop.trainer.distributed.world import World, connect
from plainloop.trainer.errors import NUMERICAL
from plainloop.trainer.run_folder.files import no_follow

LOOK_S = 1.0
ANSWER_S = 2.0


@dataclass
class Heartbeat:
    """Position of a rank, for the watchdog. order grows within a step and shows which rank is behind."""

    step: int = 0
    doing: str = "starting"
    order: float = 0.0
    ticks: int = 0  # liveness counter
    trained: bool = False  # this process has done a step

    def at(self, doing: str, order: float = 0.0) -> None:
        self.doing, self.order, self.ticks = doing, order, self.ticks + 1

    def tick(self) -> None:
        """Report liveness."""
        self.ticks += 1


class Watchdog:
    """Every rank publishes its position in the store; a rank without progress aborts the run.

    Timeouts: first_s until the first step of this process is done, then_s after that. A suspended rank, or
    one whose node is down, sends no heartbeat; the ranks that wait for it detect that.
    """

    def __init__(
        self,
        world: World,
        prefix: str,
        heartbeat: Heartbeat,
        run_dir: Path,
        on_hang: Callable[[str, int], bool],
        *,
        first_s: float,
        then_s: float,
    ) -> None:
        self.world, self.prefix, self.heartbeat = world, prefix, heartbeat
        self.on_hang = on_hang
        self.first_s, self.then_s = first_s, then_s
        self._ended = threading.Event()
        self._stacks = run_dir / f"hang-rank-{world.rank}.txt"
        self._store: dist.Store | None = None
        self._beats = 0
        self._asking: threading.Thread | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        if self.world.size > 1:
            self._store = dist.PrefixStore(f"plainloop/{self.prefix}", connect(self.world, timeout_s=60))
        self._stacks.unlink(missing_ok=True)  # left by an earlier start
        threading.Thread(target=self._run, daemon=True, name="watchdog").start()
        try:
            yield
        finally:
            self._ended.set()

    def _run(self) -> None:
        seen, since, looked = -1, time.monotonic(), time.monotonic()
        others: list[int] = []
        self._tell()  # at once: a rank that hangs in its first second is named too
        while not self._ended.wait(LOOK_S):
            now, before = time.monotonic(), looked
            looked = now
            if self.heartbeat.ticks != seen:
                seen, since = self.heartbeat.ticks, now
            elif now - before > 5 * LOOK_S:  # this process was suspended: don't count that time
                since += now - before
            self._tell()
            limit = self.then_s if self.heartbeat.trained else self.first_s
            if now - since > limit / 2:  # waiting for a rank that makes progress is not a hang
                ticks = [place["ticks"] if place else -1 for place in self._places()]
                if ticks != others:
                    others, since = ticks, max(since, now - limit / 2)
            if now - since > limit:
                self._end(now - since)

    def _tell(self) -> None:
        here = self.heartbeat
        self._beats += 1
        record = {
            "beats": self._beats,
            "step": here.step,
            "order": here.order,
            "doing": here.doing,
            "ticks": here.ticks,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        if (store := self._store) is not None:
            self._ask(lambda: store.set(f"place/{self.world.rank}", json.dumps(record)))

    def _places(self) -> list[dict[str, Any] | None]:
        """Return the last record that each rank published, or None."""
        places: list[dict[str, Any] | None] = [None] * self.world.size

        def read() -> None:
            for rank in range(self.world.size):
                if self._store is not None and self._store.check([f"place/{rank}"]):
                    places[rank] = json.loads(self._store.get(f"place/{rank}"))

        self._ask(read)
        return places

    def _ask(self, question: Callable[[], None]) -> None:
        """Run in a separate thread: a store whose host process is suspended never answers."""
        if self._asking is not None and self._asking.is_alive():
            return

        def ask() -> None:
            with contextlib.suppress(RuntimeError):  # the store's host process is gone
                question()

        self._asking = threading.Thread(target=ask, daemon=True, name="ask")
        self._asking.start()
        self._asking.join(timeout=ANSWER_S)

    def _end(self, still_s: float) -> None:
        """Dump this rank's stacks, report which rank hangs, and exit; torchrun then ends the other ranks."""
        with contextlib.suppress(OSError), open(self._stacks, "w", opener=no_follow) as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
        if self.world.device.type == "cuda":
            self._dump_collectives()
        if self.world.size == 1:
            verdict = f"no progress for {still_s:.0f} s at step {self.heartbeat.step}, {self.heartbeat.doing}"
        else:
            before, seen = self._places(), self.heartbeat.ticks
            for _ in range(3):  # let every rank dump its stacks before the first exit ends them all
                time.sleep(LOOK_S)
                self._tell()
            if self._ended.is_set() or self.heartbeat.ticks != seen:
                return  # it made progress after all
            verdict = blame(before, self._places(), still_s)
        option = "--timeout_s" if self.heartbeat.trained else "--start_timeout_s"
        message = f"{verdict}; stacks: {self._stacks.with_name('hang-rank-*.txt')}; time limit: {option}"
        if self.on_hang(message, NUMERICAL):
            print(f"plainloop: error: {message}", file=sys.stderr, flush=True)
        os._exit(NUMERICAL)  # the main thread may never return

    def _dump_collectives(self) -> None:
        """Dump NCCL's flight recorder (the last collectives), which would be lost with this process."""
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
        if dump is not None:
            with (
                contextlib.suppress(Exception),  # private API; the process must exit anyway
                open(self._stacks.with_suffix(".json"), "wb", opener=no_follow) as stream,
            ):
                stream.write(dump())


def blame(
    before: Sequence[dict[str, Any] | None], after: Sequence[dict[str, Any] | None], still_s: float
) -> str:
    """Name the hung ranks: those without a heartbeat, or else those behind the others."""

    def line(rank: int) -> str:
        place = after[rank]
        if place is None:
            return f"rank {rank} (never reported)"
        who = f"rank {rank} (host {place['host']}, process {place['pid']})"
        return f"{who} at step {place['step']}, {place['doing']}"

    silent = [r for r, (a, b) in enumerate(zip(before, after, strict=True)) if b is None or a == b]
    if silent:
        return f"no progress for {still_s:.0f} s: no heartbeat from " + " and ".join(map(line, silent))
    places = [(place["step"], place["order"]) for place in after if place is not None]
    behind = [rank for rank, place in enumerate(places) if place < max(places)]
    if not behind:
        return f"no progress for {still_s:.0f} s: all ranks are at the same point: {line(0)}"
    rest = [rank for rank in range(len(after)) if rank not in behind]
    return (
        f"no progress for {still_s:.0f} s: {' and '.join(map(line, behind))};"
        f" blocking {' and '.join(map(line, rest))}"
    )

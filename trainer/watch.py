"""Watching that the ranks go on, and go on together.

Watch       a thread in every rank: ends the run when a rank makes no progress, and says which one, and where
CompareRanks    a hook: all ranks have the same weights and have seen the same rows
"""

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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from plainloop.trainer.checkpoint import no_follow
from plainloop.trainer.distributed import World, all_ranks, connect
from plainloop.trainer.errors import NUMERICAL, RunError
from plainloop.trainer.hooks import due
from plainloop.trainer.loop import Progress
from plainloop.trainer.state import Place

LOOK_S = 1.0
ANSWER_S = 2.0


class Watch:
    """Every rank tells the others where it is, through the store; a rank that stands still ends the run.

    first_s: until the first step of this process is done; then_s: later. A rank that is stopped or whose
    node is gone says nothing: the others, who wait for it, find that out.
    """

    def __init__(
        self, world: World, prefix: str, place: Place, run_dir: Path, on_hang: Callable[[str], bool], *,
        first_s: float, then_s: float,
    ) -> None:  # fmt: skip
        self.world, self.prefix, self.place = world, prefix, place
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
        self._stacks.unlink(missing_ok=True)  # of an earlier life
        threading.Thread(target=self._run, daemon=True, name="watch").start()
        try:
            yield
        finally:
            self._ended.set()

    def _run(self) -> None:
        seen, since, looked = -1, time.monotonic(), time.monotonic()
        others: list[int] = []
        while not self._ended.wait(LOOK_S):
            now, before = time.monotonic(), looked
            looked = now
            if self.place.ticks != seen:
                seen, since = self.place.ticks, now
            elif now - before > 5 * LOOK_S:  # this process was suspended itself: that does not count
                since += now - before
            self._tell()
            limit = self.then_s if self.place.trained else self.first_s
            if now - since > limit / 2:  # one that waits for a rank which goes on does not hang
                ticks = [place["ticks"] if place else -1 for place in self._places()]
                if ticks != others:
                    others, since = ticks, max(since, now - limit / 2)
            if now - since > limit:
                self._end(now - since)

    def _tell(self) -> None:
        place = self.place
        self._beats += 1
        record = {
            "beats": self._beats, "step": place.step, "order": place.order, "doing": place.doing,
            "ticks": place.ticks, "host": socket.gethostname(), "pid": os.getpid(),
        }  # fmt: skip
        if (store := self._store) is not None:
            self._ask(lambda: store.set(f"place/{self.world.rank}", json.dumps(record)))

    def _places(self) -> list[dict[str, Any] | None]:
        """Of every rank the last that it told, or None."""
        places: list[dict[str, Any] | None] = [None] * self.world.size

        def read() -> None:
            for rank in range(self.world.size):
                if self._store is not None and self._store.check([f"place/{rank}"]):
                    places[rank] = json.loads(self._store.get(f"place/{rank}"))

        self._ask(read)
        return places

    def _ask(self, question: Callable[[], None]) -> None:
        """In a thread of its own: a store whose keeper is stopped answers neither yes nor no."""
        if self._asking is not None and self._asking.is_alive():
            return

        def ask() -> None:
            with contextlib.suppress(RuntimeError):  # its keeper is gone
                question()

        self._asking = threading.Thread(target=ask, daemon=True, name="ask")
        self._asking.start()
        self._asking.join(timeout=ANSWER_S)

    def _end(self, still_s: float) -> None:
        """Write down this rank's stacks, say who is behind, end this process; torchrun ends the others."""
        with contextlib.suppress(OSError), open(self._stacks, "w", opener=no_follow) as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
        if self.world.device.type == "cuda":
            self._dump_collectives()
        if self.world.size == 1:
            verdict = f"no progress for {still_s:.0f} s at step {self.place.step}, {self.place.doing}"
        else:
            before, seen = self._places(), self.place.ticks
            for _ in range(3):  # time for every rank to write down its stacks before the first one ends all
                time.sleep(LOOK_S)
                self._tell()
            if self._ended.is_set() or self.place.ticks != seen:
                return  # it went on after all
            verdict = blame(before, self._places(), still_s)
        message = (
            f"{verdict}; stacks in {self._stacks.with_name('hang-rank-*.txt')}, the limit is --timeout_s"
        )
        if self.on_hang(message):
            print(f"plainloop: error: {message}", file=sys.stderr, flush=True)
        os._exit(NUMERICAL)  # the main thread may never come back

    def _dump_collectives(self) -> None:
        """What NCCL's flight recorder knows of the last collectives, which is lost with this process."""
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
        if dump is not None:
            with (
                contextlib.suppress(Exception),  # private names; the end must come
                open(self._stacks.with_suffix(".json"), "wb", opener=no_follow) as stream,
            ):
                stream.write(dump())


def blame(
    before: Sequence[dict[str, Any] | None], after: Sequence[dict[str, Any] | None], still_s: float
) -> str:
    """Which rank hangs: one that says nothing any more, or else the one that is behind the others."""

    def line(rank: int) -> str:
        place = after[rank]
        if place is None:
            return f"rank {rank} was never heard of"
        who = f"rank {rank} (host {place['host']}, process {place['pid']})"
        return f"{who} at step {place['step']}, {place['doing']}"

    silent = [r for r, (a, b) in enumerate(zip(before, after, strict=True)) if b is None or a == b]
    if silent:
        return f"no progress for {still_s:.0f} s: no sign of life from " + " and ".join(map(line, silent))
    places = [(place["step"], place["order"]) for place in after if place is not None]
    behind = [rank for rank, place in enumerate(places) if place < max(places)]
    if not behind:
        return f"no progress for {still_s:.0f} s: all ranks stand at the same place: {line(0)}"
    rest = [rank for rank in range(len(after)) if rank not in behind]
    return (
        f"no progress for {still_s:.0f} s: {' and '.join(map(line, behind))};"
        f" waited for by {' and '.join(map(line, rest))}"
    )


class CompareRanks:
    """All ranks. Every K steps: does everybody have the same weights, and has seen the same rows?"""

    def __init__(self, world: World, every: int) -> None:
        self.world, self.every = world, every

    def __call__(self, progress: Progress) -> None:
        state = progress.state
        if self.world.size == 1 or not due(state.step, self.every, progress.total_steps):
            return
        mine = torch.tensor([weights_digest(state.model), int(state.order[:15] or "0", 16)])
        for what, values in zip(("weights", "data order"), all_ranks(mine).T.tolist(), strict=True):
            if len(set(values)) > 1:
                raise RunError(
                    f"after step {state.step} {odd_ones(values)} from the other ranks in its {what}, which"
                    " must be equal: a broken device, or code that treats ranks apart. Continue from the last"
                    " checkpoint, without that node."
                )


def odd_ones(values: Sequence[int]) -> str:
    """The ranks outside the majority; of two all there is to say is that they differ."""
    common = max(set(values), key=lambda value: (values.count(value), value == values[0]))
    odd = [rank for rank, value in enumerate(values) if value != common]
    return f"rank{'s' * (len(odd) > 1)} {', '.join(map(str, odd))} differ{'s' * (len(odd) == 1)}"


def weights_digest(model: nn.Module) -> int:
    """A sum over the bits of all weights: one flipped bit anywhere changes it. One host sync."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = torch.zeros((), dtype=torch.int64)
    for parameter in model.parameters():
        bits = parameter.detach().view(integers[parameter.element_size()]).sum(dtype=torch.int64)
        total = total.to(bits.device) * 1_000_003 + bits
    return int(total)

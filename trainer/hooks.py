"""What happens between steps: stop, log, evaluate, checkpoint. Each says how often; `due` is the clock.

A hook is a callable that gets a Progress at every step boundary, on all ranks. One of your own is a function:

    def print_norm(progress: Progress) -> None:
        if due(progress.state.step, 100, progress.total_steps):
            print(progress.state.grad_norm.item())
"""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from plainloop.data.types import InputError
from plainloop.trainer.checkpoint import retain, save_checkpoint
from plainloop.trainer.config import CheckpointConfig, EvaluationConfig
from plainloop.trainer.distributed import SharedFlag, World, broadcast_json, sum_over_ranks
from plainloop.trainer.log import Log
from plainloop.trainer.loop import Progress, Traffic
from plainloop.trainer.signals import StopRequest
from plainloop.trainer.state import TrainState


def due(step: int, every: int, total: int, *, first: bool = False, last: bool = True) -> bool:
    """Is a periodic action due after `step` steps? every 0: only at the ends that are asked for."""
    if step in (0, total):
        return first if step == 0 else last
    return every > 0 and step % every == 0


def every_or_epoch(every_steps: int | None, progress: Progress) -> int:
    """The default of an `every_steps` option is once an epoch."""
    return progress.steps_per_epoch if every_steps is None else every_steps


@dataclass
class Stopwatch:
    """Seconds by what they went to, so that evaluating and saving do not count as training."""

    seconds: dict[str, float] = field(default_factory=dict)

    def time(self, name: str, action: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        try:
            return action()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    @property
    def other(self) -> float:
        return sum(self.seconds.values())


class Stop:
    """All ranks agree whether any of them was asked to stop: one answer for all, one boundary late."""

    def __init__(self, request: StopRequest, at_step: int | None) -> None:
        self.request = request
        self.at_step = at_step
        self.flag = SharedFlag()

    def __call__(self, progress: Progress) -> None:
        state = progress.state
        if state.step == progress.total_steps:
            self.flag.settle()
        elif self.flag.exchange(self.request.pending()):
            self.flag.settle()
            state.stop = self.request.reason or "another rank was asked to stop"
        elif self.at_step is not None and state.step >= self.at_step:
            self.flag.settle()
            state.stop = f"stop_at_step {self.at_step}"

    def agreed(self) -> bool:
        """For long work between steps: asked by all ranks equally often."""
        return self.flag.exchange(self.request.pending())


class NonFinite:
    """All ranks. Ends the run after so many skipped steps in a row; looks every `limit` steps."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __call__(self, progress: Progress) -> None:
        step = progress.state.step
        if self.limit and due(step, self.limit, progress.total_steps):
            if (in_a_row := int(progress.state.nonfinite_worst)) >= self.limit:
                raise FloatingPointError(
                    f"the loss or its gradient was NaN or Inf in {in_a_row} steps in a row, by step {step};"
                    " none was applied. Try a lower optim.lr, a longer optim.warmup, precision fp32 (or bf16"
                    " instead of fp16), or look at the data."
                )


class LogLine:
    """All ranks take part in the sum of the loss; rank 0 writes. Waits for the device."""

    def __init__(self, log: Log, every: int, watch: Stopwatch, lr: Callable[[int], float]) -> None:
        self.log, self.every, self.watch, self.lr = log, every, watch, lr
        self._since: tuple[float, float, Traffic, int] | None = None
        self._start: tuple[float, int] | None = None

    def __call__(self, progress: Progress) -> None:
        state, traffic = progress.state, progress.traffic
        now = time.perf_counter() - self.watch.other  # a clock that runs only while training
        if self._since is None:
            self._since = (now, traffic.waiting_s, Traffic(), int(state.nonfinite_total))
            self._start = (now, state.step)
        if state.loss_count == 0 or not due(state.step, self.every, progress.total_steps):
            return
        loss = sum_over_ranks(state.loss_sum).item() / state.loss_count  # one host sync
        state.loss_sum.zero_()
        state.loss_count = 0
        now = time.perf_counter() - self.watch.other
        before, waited, old, nonfinite = self._since
        assert self._start is not None
        elapsed = max(now - before, 1e-9)
        steps_done = max(state.step - self._start[1], 1)
        tokens, padded = traffic.tokens - old.tokens, traffic.padded_tokens - old.padded_tokens
        values = {
            "epoch": state.step / progress.steps_per_epoch,
            "loss": loss,
            "lr": self.lr(state.step - 1),
            "grad_norm": state.grad_norm.item(),
            "examples_per_s": (traffic.examples - old.examples) / elapsed,
            "tokens_per_s": tokens / elapsed,
            "padding": 1 - tokens / padded if padded else 0.0,
            "waiting": (traffic.waiting_s - waited) / elapsed,
            "memory_gb": peak_memory_gb(state.device),
            "left_s": (now - self._start[0]) / steps_done * (progress.total_steps - state.step),
            "skipped": int(state.nonfinite_total) - nonfinite or None,
        }
        self.log.train_line(state.step, progress.total_steps, values)
        self.log.record("train", state.step, {k: v for k, v in values.items() if v is not None})
        snapshot = Traffic(traffic.examples, traffic.tokens, traffic.padded_tokens)
        self._since = (now, traffic.waiting_s, snapshot, int(state.nonfinite_total))


class Evaluate:
    """All ranks. Evaluates when due, records it in the state, and stops when nothing improves."""

    def __init__(
        self,
        evaluate: Callable[[], dict[str, float] | None],
        log: Log,
        watch: Stopwatch,
        config: EvaluationConfig,
    ) -> None:
        self.evaluate, self.log, self.watch, self.config = evaluate, log, watch, config

    def __call__(self, progress: Progress) -> None:
        state = progress.state
        every, metric = every_or_epoch(self.config.every_steps, progress), self.config.best_metric
        done = any(record["step"] == state.step for record in state.evaluations)
        if not done and state.stop is None and due(state.step, every, progress.total_steps):
            self._run(state, metric)
        best = best_step(state.evaluations, metric)
        if self.config.early_stopping and best is not None and state.step < progress.total_steps:
            later = sum(record["step"] > best for record in state.evaluations)
            if later >= self.config.early_stopping:
                self.log.say(
                    f"early stopping: {later} evaluations without a better {metric} than at step {best}"
                )
                progress.total_steps = state.step

    def _run(self, state: TrainState, metric: str) -> None:
        started = time.perf_counter()
        metrics = self.watch.time("evaluate", self.evaluate)
        if metrics is None:
            state.stop = "asked to stop during an evaluation, which the next start repeats"
            return
        metrics = broadcast_json(metrics)
        if metric not in metrics:
            raise InputError(f"evaluation.best_metric {metric}: there are only {', '.join(metrics)}.")
        state.evaluations.append({"step": state.step, **metrics})
        seconds = time.perf_counter() - started
        self.log.record("evaluation", state.step, {**metrics, "seconds": seconds})
        shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if not k.endswith(("_thresh", "total")))
        self.log.say(f"step {state.step}: {shown}  ({seconds:.0f} s)")


def best_step(evaluations: list[dict[str, Any]], metric: str) -> int | None:
    """Step of the best evaluation (the first of equals; NaN is never best), or None."""
    sign = -1 if metric.endswith("loss") else 1
    values = [(sign * record[metric], -record["step"]) for record in evaluations if metric in record]
    ranked = [pair for pair in values if math.isfinite(pair[0])]
    return -max(ranked)[1] if ranked else None


class SaveCheckpoint:
    """All ranks wait for rank 0, which writes when due, at a new best, and at a stop.

    A full disk does not end a run; but it never ends well with its last state unwritten: then `failed` holds
    the reason.
    """

    def __init__(
        self, run_dir: Path, save_model: Callable[[Path], None], log: Log, watch: Stopwatch, world: World,
        config: CheckpointConfig, *, metric: str, saved_step: int, extra: dict[str, Any],
    ) -> None:  # fmt: skip
        self.run_dir, self.save_model, self.log, self.watch = run_dir, save_model, log, watch
        self.world, self.config, self.metric, self.extra = world, config, metric, extra
        self.saved_step = saved_step  # the newest on disk
        self.failed: str | None = None

    def __call__(self, progress: Progress) -> None:
        state = progress.state
        best = best_step(state.evaluations, self.metric)
        every = every_or_epoch(self.config.every_steps, progress)
        wanted = due(state.step, every, progress.total_steps) or best == state.step or state.stop is not None
        if state.step == self.saved_step:  # resumed here; an evaluation that was made up for may be the best
            self._retain_and_point(state)
        if not wanted or state.step in (0, self.saved_step):
            return
        # The sum so far of an open log line goes into the checkpoint as the sum over all ranks.
        window = sum_over_ranks(state.loss_sum.clone()).item()
        started = time.perf_counter()
        self.failed = broadcast_json(self.watch.time("save", lambda: self._save(state, window)))
        seconds = time.perf_counter() - started
        if self.failed:
            self.log.say(f"WARNING: step {state.step}: checkpoint NOT saved: {self.failed}")
            return
        self.saved_step = state.step
        self.log.record("save", state.step, {"seconds": seconds})

    def _save(self, state: TrainState, window: float) -> str | None:
        """Rank 0 only. None, or why it failed."""
        if not self.world.is_main:
            return None
        try:
            extra = {**self.extra, "loss_sum": window}
            path = save_checkpoint(self.run_dir / "checkpoints", state, self.save_model, extra)
            self._retain_and_point(state)
        except OSError as error:
            return f"{error.filename or self.run_dir}: {error.strerror or error}"
        self.log.say(f"step {state.step}: saved {path}")
        return None

    def _retain_and_point(self, state: TrainState) -> None:
        """Rank 0 only. Delete what is no longer kept; RUN/best leads to the best that could be saved."""
        if not self.world.is_main:
            return
        folder = self.run_dir / "checkpoints"
        saved = [r for r in state.evaluations if (folder / f"step-{r['step']:08d}").exists()]
        best = best_step(saved, self.metric)
        retain(folder, keep_last=self.config.keep_last, best_step=best)
        if best is not None:
            _point(self.run_dir / "best", Path("checkpoints") / f"step-{best:08d}")


def _point(link: Path, target: Path) -> None:
    """Replace a symbolic link as a whole."""
    temporary = link.with_name(f".tmp-{link.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def peak_memory_gb(device: torch.device) -> float:
    """Highest use so far: of the GPU's allocator, or on the CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

"""What happens between steps: stop, log, evaluate, checkpoint. Each says how often; `due` is the clock.

A hook is a callable that gets a Progress at every step boundary, on all ranks. One of your own is a function:

    def print_norm(progress: Progress) -> None:
        if due(progress.state.step, 100, progress.total_steps):
            print(progress.state.grad_norm.item())
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from plainloop.data.types import InputError
from plainloop.trainer.config import EvaluationConfig
from plainloop.trainer.deadline import Deadline, StopTime
from plainloop.trainer.device import peak_memory_gb
from plainloop.trainer.distributed import SharedFlag, broadcast_json, sum_over_ranks
from plainloop.trainer.errors import RunError
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
    """All ranks agree whether any of them was asked to stop: one answer for all of them."""

    def __init__(self, request: StopRequest, at_step: int | None, stop_time: StopTime) -> None:
        self.request, self.at_step, self.stop_time = request, at_step, stop_time
        self.flag, self.flag_within = SharedFlag(), SharedFlag()  # between steps, and within an evaluation
        self._asked: float | None = None  # when, in the evaluation under way

    def __call__(self, progress: Progress) -> None:
        state, self._asked = progress.state, None
        self.flag_within.settle()
        if state.step == progress.total_steps:
            self.flag.settle()
        elif self.flag.exchange(self.request.pending()):
            self.flag.settle()
            state.stop = self.request.reason or "another rank was asked to stop"
        elif self.at_step is not None and state.step >= self.at_step:
            self.flag.settle()
            state.stop = f"stop_at_step {self.at_step}"

    def agreed(self) -> bool:
        """For long work between steps, before each batch of it: asked by all ranks equally often."""
        now = time.perf_counter()
        if self._asked is not None:
            self.stop_time.batch_s = max(self.stop_time.batch_s, now - self._asked)
        self._asked = now
        return self.flag_within.exchange(self.request.pending())


class NonFinite:
    """All ranks. Ends the run after so many skipped steps in a row; looks every `limit` steps."""

    def __init__(self, limit: int, record_ids: Callable[[np.ndarray], list[str]]) -> None:
        self.limit, self.record_ids = limit, record_ids

    def __call__(self, progress: Progress) -> None:
        state = progress.state
        if not self.limit or not due(state.step, self.limit, progress.total_steps):
            return
        if (in_a_row := int(state.nonfinite_worst)) >= self.limit:
            ids = self.record_ids(state.rows) if int(state.nonfinite_run) else []  # the run may be over
            records = f" Records of the last step: {', '.join(ids[:8])}{' ...' * (len(ids) > 8)}."
            raise RunError(
                f"the loss or its gradient was NaN or Inf in {in_a_row} steps in a row, by step {state.step};"
                f" none was applied.{records if ids else ''}"
                " Try a lower optim.lr, a longer optim.warmup, precision fp32 (or bf16 instead of fp16), or"
                " look at the data."
            )


class LogLine:
    """All ranks take part in the sum of the loss; rank 0 writes. Waits for the device."""

    def __init__(
        self,
        log: Log,
        every: int,
        watch: Stopwatch,
        lr: Callable[[int], float],
        stop_time: StopTime,
        deadline: Deadline | None = None,
    ) -> None:
        self.log, self.every, self.watch, self.lr = log, every, watch, lr
        self.stop_time, self.deadline = stop_time, deadline
        self._since: tuple[float, float, Traffic, int] | None = None
        self._start: tuple[float, int] | None = None
        self._at_start = 0.0  # seconds apart from training

    def __call__(self, progress: Progress) -> None:
        state, traffic = progress.state, progress.traffic
        now = time.perf_counter() - self.watch.other  # a clock that runs only while training
        if self._since is None:
            self._since = (now, traffic.waiting_s, Traffic(), int(state.nonfinite_total))
            self._start = (now, state.step)
        assert self._start is not None
        if state.step <= self._start[1] + 1:
            self._at_start = self.watch.other  # an evaluation that this start had to make up for
        if state.loss_count == 0 or not due(state.step, self.every, progress.total_steps):
            return
        loss = sum_over_ranks(state.loss_sum).item() / state.loss_count  # one host sync
        state.loss_sum.zero_()
        state.loss_count = 0
        now = time.perf_counter() - self.watch.other
        before, waited, old, nonfinite = self._since
        elapsed = max(now - before, 1e-9)
        steps_done = max(state.step - self._start[1], 1)
        # What is left will be evaluated and saved as often as what is done; but not at its start.
        trained_s = now - self._start[0]
        left_s = (
            (trained_s + self.watch.other - self._at_start) / steps_done * (progress.total_steps - state.step)
        )
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
            "left_s": left_s,
            "skipped": int(state.nonfinite_total) - nonfinite or None,
        }
        self.stop_time.step_s = trained_s / steps_done
        if self.deadline:
            values |= (outlook := self.deadline.outlook(left_s))
            if warning := self.deadline.warning(outlook, left_s):
                self.log.say(warning)
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

"""Hooks: what happens between steps (stop, log, evaluate, compare the ranks), and the warm-up before.

A hook is a callable that gets a Progress at every step boundary, on all ranks:

    def print_norm(progress: Progress) -> None:
        if progress.due(100):
            print(progress.state.grad_norm.item())
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn

from plainloop.data.loader import Steps
from plainloop.data.types import MicroBatch
from plainloop.trainer.config.options import EvaluationConfig
from plainloop.trainer.distributed.deadline import Deadline
from plainloop.trainer.distributed.device import peak_memory_gb
from plainloop.trainer.distributed.parallel import local
from plainloop.trainer.distributed.signals import StopRequest
from plainloop.trainer.distributed.world import SharedFlag, all_ranks, broadcast_json, sum_over_ranks
from plainloop.trainer.errors import InputError, RunError
from plainloop.trainer.loop import StepOptions, add_gradients, allocate_optimizer_state
from plainloop.trainer.run_folder.log import format_duration
from plainloop.trainer.state import Progress, Traffic, TrainState, best_step


class Stop:
    """All ranks agree on whether any of them was asked to stop."""

    def __init__(self, request: StopRequest, at_step: int | None) -> None:
        self.request, self.at_step = request, at_step
        self.flag, self.flag_within = SharedFlag(), SharedFlag()  # between steps, and within an evaluation
        self._progress: Progress | None = None
        self._asked: float | None = None  # time of the last check in the current evaluation

    def __call__(self, progress: Progress) -> None:
        state, self._progress, self._asked = progress.state, progress, None
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
        """Has any rank been asked to stop? Call before each evaluation batch, equally often on all ranks."""
        assert self._progress is not None
        self._progress.state.heartbeat.tick()
        stop_time, now = self._progress.stop_time, time.perf_counter()
        if self._asked is not None:
            stop_time.batch_s = max(stop_time.batch_s, now - self._asked)
        self._asked = now
        return self.flag_within.exchange(self.request.pending())


class NonFinite:
    """All ranks. End the run after `limit` skipped steps in a row; checked every `limit` steps."""

    def __init__(self, limit: int, record_ids: Callable[[np.ndarray], list[str]]) -> None:
        self.limit, self.record_ids = limit, record_ids

    def __call__(self, progress: Progress) -> None:
        state = progress.state
        if not self.limit or not progress.due(self.limit):
            return
        if (in_a_row := int(state.nonfinite_worst)) < self.limit:
            return
        ids = self.record_ids(state.rows) if int(state.nonfinite_streak) else []  # the streak may be over
        more = " ..." if len(ids) > 8 else ""
        records = f" Records of the last step: {', '.join(ids[:8])}{more}." if ids else ""
        raise RunError(
            f"the loss or its gradient was NaN or Inf in {in_a_row} steps in a row, by step {state.step};"
            f" none was applied.{records}"
            " Try a lower optim.lr, a longer optim.warmup, precision fp32 (or bf16 instead of fp16), or"
            " look at the data."
        )


class LogLine:
    """All ranks. Sum the loss over the ranks; rank 0 writes the line. Waits for the device."""

    def __init__(self, every: int, lr: Callable[[int], float], deadline: Deadline | None = None) -> None:
        self.every, self.lr, self.deadline = every, lr, deadline
        self._since: tuple[float, Traffic, int] | None = (
            None  # at the last line: time, traffic, skipped steps
        )
        self._start = (0.0, 0)  # at the first call: time, step
        self._hooks_at_start_s = 0.0  # spent by hooks before the first step of this process

    def __call__(self, progress: Progress) -> None:
        state, traffic, stopwatch = progress.state, progress.traffic, progress.stopwatch
        now = time.perf_counter() - stopwatch.total  # a clock that runs only while training
        if self._since is None:
            self._since = (now, Traffic(), int(state.nonfinite_total))
            self._start = (now, state.step)
        if state.step <= self._start[1] + 1:
            self._hooks_at_start_s = stopwatch.total  # an evaluation left over from before the restart
        if state.loss_count == 0 or not progress.due(self.every):
            return
        loss = sum_over_ranks(state.loss_sum).item() / state.loss_count  # one host sync
        state.loss_sum.zero_()
        state.loss_count = 0
        now = time.perf_counter() - stopwatch.total
        before, old, skipped = self._since
        elapsed = max(now - before, 1e-9)
        tokens, padded = traffic.tokens - old.tokens, traffic.padded_tokens - old.padded_tokens
        left_s = self._left_s(progress, now)
        values = {
            "epoch": state.step / progress.steps_per_epoch,
            "loss": loss,
            "lr": self.lr(state.step - 1),
            "grad_norm": state.grad_norm.item(),
            "examples_per_s": (traffic.examples - old.examples) / elapsed,
            "tokens_per_s": tokens / elapsed,
            "padding": 1 - tokens / padded if padded else 0.0,
            "waiting": (traffic.waiting_s - old.waiting_s) / elapsed,
            "memory_gb": peak_memory_gb(state.device),
            "left_s": left_s,
            "skipped": int(state.nonfinite_total) - skipped or None,
        }
        if self.deadline:
            values |= (outlook := self.deadline.outlook(left_s))
            if warning := self.deadline.warning(outlook, left_s):
                progress.log.say(warning)
        progress.log.train_line(state.step, progress.total_steps, values)
        progress.log.record("train", state.step, {k: v for k, v in values.items() if v is not None})
        self._since = (now, replace(traffic), int(state.nonfinite_total))

    def _left_s(self, progress: Progress, now: float) -> float:
        """Seconds until the run ends, with as many evaluations and saves per step as so far."""
        steps = max(progress.state.step - self._start[1], 1)
        trained_s = now - self._start[0]
        progress.stop_time.step_s = trained_s / steps
        hooks_s = progress.stopwatch.total - self._hooks_at_start_s
        return (trained_s + hooks_s) / steps * (progress.total_steps - progress.state.step)


class Evaluate:
    """All ranks. Evaluate when due, record the result in the state, and stop early without improvement."""

    def __init__(self, evaluate: Callable[..., dict[str, float] | None], config: EvaluationConfig) -> None:
        """evaluate(step=...): metrics, the same on all ranks or only on rank 0; None when asked to stop."""
        self.evaluate, self.config = evaluate, config

    def __call__(self, progress: Progress) -> None:
        state, metric = progress.state, self.config.best_metric
        done = any(record["step"] == state.step for record in state.evaluations)
        if not done and state.stop is None and progress.due(self.config.every_steps):
            self._run(progress, metric)
        best = best_step(state.evaluations, metric)
        if self.config.early_stopping and best is not None and state.step < progress.total_steps:
            later = sum(record["step"] > best for record in state.evaluations)
            if later >= self.config.early_stopping:
                progress.log.say(
                    f"early stopping: {later} evaluations without a better {metric} than at step {best}"
                )
                progress.total_steps = state.step

    def _run(self, progress: Progress, metric: str) -> None:
        state, started = progress.state, time.perf_counter()
        metrics = progress.stopwatch.time("evaluate", partial(self.evaluate, step=state.step))
        if metrics is None:
            state.stop = "asked to stop during an evaluation; the next start repeats it"
            return
        metrics = broadcast_json(metrics)
        if metric not in metrics:
            raise InputError(f"evaluation.best_metric {metric}: must be one of {', '.join(metrics)}.")
        state.evaluations.append({"step": state.step, **metrics})
        seconds = time.perf_counter() - started
        progress.log.record("evaluation", state.step, {**metrics, "seconds": seconds})
        shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if not k.endswith(("_thresh", "total")))
        progress.log.say(f"step {state.step}: {shown}  ({seconds:.0f} s)")


class CompareRanks:
    """All ranks. Every K steps, check that all ranks have the same weights and have seen the same rows."""

    def __init__(self, every: int) -> None:
        self.every = every

    def __call__(self, progress: Progress) -> None:
        state = progress.state
        if progress.world.size == 1 or not progress.due(self.every):
            return
        mine = torch.tensor([weights_digest(state.model), int(state.order[:15] or "0", 16)])
        weights, order = all_ranks(mine).T.tolist()
        ranks = range(progress.world.size)
        copies: dict[int, list[int]] = {}  # the ranks that hold the same share of the weights
        for rank in ranks:
            copies.setdefault(state.parallel.shard_of(rank), []).append(rank)
        for what, values, group in [
            *(("weights", weights, group) for group in copies.values()), ("data order", order, ranks),
        ]:  # fmt: skip
            if len({values[rank] for rank in group}) > 1:
                raise RunError(
                    f"after step {state.step} the ranks differ in their {what}, which must be equal"
                    f" ({odd_ones(values, group)}): a faulty device, or code that treats ranks differently."
                    " Resume from the last checkpoint, without that node."
                )


def odd_ones(values: Sequence[int], group: Sequence[int]) -> str:
    """Name the ranks of a group outside its majority; between two ranks there is no majority."""
    mine = [values[rank] for rank in group]
    common = max(set(mine), key=mine.count)
    odd = [str(rank) for rank in group if values[rank] != common]
    return f"outside the majority: {', '.join(odd)}" if len(odd) < len(group) / 2 else "no majority"


def weights_digest(model: nn.Module) -> int:
    """Checksum over the bits of the weights that this rank holds: any flip changes it. One host sync."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = torch.zeros((), dtype=torch.int64)
    for parameter in model.parameters():
        bits = local(parameter.detach()).view(integers[parameter.element_size()]).sum(dtype=torch.int64)
        total = total.to(bits.device) * 1_000_003 + bits
    return int(total)


def warm_up_and_estimate(
    progress: Progress, steps: Steps, options: StepOptions, reserve: Callable[[TrainState], None]
) -> None:
    """All ranks. Warm up, reserve the memory of saves, and log how long training will take (evaluations and
    saves not included).
    """
    state, largest = progress.state, steps.largest()
    pass_s = warm_up(state, largest, options)
    reserve(state)
    estimate_s = pass_s * steps.passes(largest[-1]) * (progress.total_steps - state.step)
    memory_gb = peak_memory_gb(state.device)
    values = {"memory_gb": memory_gb, "pass_s": pass_s, "estimate_s": estimate_s}
    progress.log.record("warm_up", state.step, values)
    progress.log.say(
        f"training will take about {format_duration(estimate_s)}, by the {pass_s:.2f} s of a warm-up pass;"
        f" peak memory so far {memory_gb:.2f} GB"
    )


def warm_up(state: TrainState, micro_batches: Sequence[MicroBatch], options: StepOptions) -> float:
    """All ranks. Run passes that change nothing, before the first step; return the seconds of the last one.

    DDP reorders its buckets after the first backward pass. Without a warm-up, a resumed run would sum the
    gradients of three or more ranks in a different order than a run that never stopped. The memory peak also
    shows here, not after hours: the micro-batches are the largest of the run, the optimizer allocates its
    state in a step that it skips, and every pass but the first holds the gradients of the passes before.
    """
    again = micro_batches[-1:] if len(micro_batches) > 1 else []  # time it once its kernels are compiled
    for i, micro_batch in enumerate([micro_batches[0], *micro_batches, *again]):
        state.heartbeat.at("warm-up", 0)
        started = time.perf_counter()
        add_gradients(state, micro_batch, 1.0, options)
        if i == 0:
            allocate_optimizer_state(state)
            state.parallel.after_first_pass(state.optimizer)
    float(state.grad_norm)  # waits for the device
    state.parallel.clear_gradients(state.optimizer)
    return time.perf_counter() - started

"""A run, in reading order: world, data, model, restore, hooks, fit. `loop.py` is next."""

from __future__ import annotations

import inspect
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from plainloop.data.loader import Steps, step_batches
from plainloop.data.types import InputError
from plainloop.models.compiled import compiled
from plainloop.models.load import overflows_in_fp16
from plainloop.trainer import checkpoint as checkpoints
from plainloop.trainer.checks import check_train_config
from plainloop.trainer.config import TrainConfig
from plainloop.trainer.deadline import Deadline, clock
from plainloop.trainer.device import keep_compiled_code, peak_memory_gb, set_up_device
from plainloop.trainer.distributed import World, process_group, world_from_env
from plainloop.trainer.errors import NUMERICAL
from plainloop.trainer.hooks import Evaluate, LogLine, NonFinite, Stop, Stopwatch
from plainloop.trainer.log import Log
from plainloop.trainer.loop import Hook, Progress, StepOptions, Verdict, fit, warm_up
from plainloop.trainer.optim import learning_rate, make_optimizer
from plainloop.trainer.precision import make_scaler, resolve_precision, slow_precision
from plainloop.trainer.resume import (
    find_checkpoint,
    guarantee,
    record,
    require_same_run,
)
from plainloop.trainer.run_folder import hold
from plainloop.trainer.saving import SaveCheckpoint
from plainloop.trainer.signals import StopRequest, handlers_restored
from plainloop.trainer.state import Place, TrainState
from plainloop.trainer.tasks import make_task
from plainloop.trainer.watch import CompareRanks, Watch

TOKENS_PER_DEVICE = {"cuda": 8192, "cpu": 4096}


def train(config: TrainConfig, *, last: bool = False) -> Verdict:
    """All ranks. Train from the start or from the run folder's newest checkpoint, to the end or a stop.

    last: the process ends with it, and no late signal may change how.
    """
    with ExitStack() as stack:
        stack.enter_context(handlers_restored(ignore=last))
        # Who and where. Rank 0 holds the run folder; nobody else may write there.
        check_train_config(config)
        world = world_from_env(config.device)
        run_dir = Path(config.run_dir)
        log = Log(run_dir, enabled=world.is_main, tensorboard=config.log.tensorboard)
        folder = stack.enter_context(hold(run_dir, world.rank, log.say))
        stack.callback(log.close)

        # Data: tokenised by rank 0 before there is a process group that could time out.
        tokens = config.tokens_per_device or TOKENS_PER_DEVICE[world.device.type]
        task = make_task(config.task, config.model, config.data, config.text, world)
        rows = task.prepare("train", config.data.train or "", limit=config.data.limit)
        dev_rows = task.prepare("dev", config.data.dev) if config.data.dev else None
        if dev_rows and config.evaluation.best_metric not in task.metric_names():
            given, names = config.evaluation.best_metric, ", ".join(task.metric_names())
            raise InputError(f"evaluation.best_metric {given}: this data gives {names}.")
        steps = task.steps(rows, batch_size=config.batch_size, seed=config.seed, tokens=tokens)
        total_steps = min(config.max_steps or 2**62, config.epochs * steps.sampler.steps_per_epoch)

        # Together from here on; a thread in each rank ends a run that hangs.
        stop_time = folder.stop_time()
        place, longest = Place(), max(config.start_timeout_s, config.timeout_s)
        prefix = stack.enter_context(process_group(world, timeout_s=longest + 60))
        watch = Watch(
            world, prefix, place, run_dir, lambda why: folder.failed(why, NUMERICAL, world.rank),
            first_s=config.start_timeout_s, then_s=config.timeout_s,
        )  # fmt: skip
        stack.enter_context(watch.watching())

        # Model: own newest good checkpoint > the pretrained one. A new head depends on the seed alone.
        set_up_device(world, tf32=config.tf32, deterministic=config.deterministic)
        found = find_checkpoint(run_dir, world, log)
        precision, why = resolve_precision(
            config.precision, world.device, overflows_in_fp16=overflows_in_fp16(config.model.path),
            recorded=found.state["config"]["precision"] if found else None,
        )  # fmt: skip
        config = replace(config, precision=cast(Any, precision))
        identity = record(config, world, rows.path.name, tokens)
        require_same_run(found, config, identity, steps.sampler, world)
        folder.joined = True
        torch.manual_seed(config.seed)
        place.at("loading the model", 0)
        model = task.load_model(str(found.path) if found else config.model.path, new_head=found is None)
        model.to(world.device).train()
        keep_compiled_code(config.data.cache_dir, world.device)
        wrapped = wrap(model, world, compile_it=config.model.compile, num_shapes=steps.widths.num_shapes)
        scaler = make_scaler(config.precision, world.device)
        state = TrainState(model, wrapped, make_optimizer(model, config.optim), scaler, world.device, place)
        if found:
            checkpoints.restore(state, found, is_main=world.is_main)
            done = "; nothing is left to do" if state.step >= total_steps else ""
            log.say(f"continuing from {found.path} at step {state.step} of {total_steps}{done}")
            log.say(f"guaranteed: {guarantee(found, config, identity)}")
        if world.is_main:
            folder.status("running", step=state.step, began_at=state.step, total_steps=total_steps)
            if warning := stop_time.too_long(config.checkpoint.grace_s):
                log.say(warning)
        log.say(f"precision {precision}: {why}")
        if world.is_main and (warning := slow_precision(precision, world.device)):
            log.say(warning)
        log.say(f"train: {steps.describe()}")
        for part, path, data in (("train", config.data.train, rows), ("dev", config.data.dev, dev_rows)):
            name = path if isinstance(path, str) else ", ".join(path or [])
            for line in task.report(part, data, config.precision) if data else []:
                log.say(f"{part}: {name}: {line}")
        log.say(layout(model, world, config, tokens, total_steps))

        # What happens between steps, in this order. A hook of your own goes into this list.
        progress = Progress(state, total_steps, steps.sampler.steps_per_epoch)
        stopwatch, lr = Stopwatch(), learning_rate(config.optim, total_steps)
        request = StopRequest(run_dir / "stop" if world.is_main else None)
        stop = Stop(request, config.stop_at_step, stop_time)
        deadline = Deadline.from_env(stop_time)

        def should_stop() -> bool:
            place.tick()
            return stop.agreed()

        def evaluate() -> dict[str, float] | None:
            assert dev_rows is not None
            return task.evaluate(
                model, dev_rows, name=f"{run_dir} step {state.step}", config=config.evaluation,
                precision=config.precision, tokens=config.evaluation.tokens_per_device or 2 * tokens,
                folder=run_dir / "evaluation", should_stop=should_stop, training=True,
            )  # fmt: skip

        save = SaveCheckpoint(
            folder, lambda path, weights: task.save_model(model, path, weights), log, stopwatch, world,
            config.checkpoint, metric=config.evaluation.best_metric, saved_step=state.step, extra=identity,
            stop_time=stop_time,
        )  # fmt: skip
        stack.callback(save.close)
        hooks: list[Hook] = [
            stop,
            NonFinite(config.optim.max_nonfinite_steps, task.record_ids),
            CompareRanks(world, config.compare_every_steps),
            LogLine(log, config.log.every_steps, stopwatch, lr, stop_time, deadline),
            *([Evaluate(evaluate, log, stopwatch, config.evaluation)] if dev_rows is not None else []),
            save,
        ]

        # The loop. Until here a signal ends the program as usual; now it asks for a stop with a checkpoint.
        log.start(state.step, total_steps, {record["step"] for record in state.evaluations})
        options = StepOptions(
            task.loss_sum, lr, world, config.seed, config.precision, config.optim.max_grad_norm
        )
        if state.step < total_steps:
            log.say(warm_up_and_estimate(state, steps, options, total_steps, save, log))
        stack.enter_context(request.listening(lambda reason: folder.failed(reason, 130, world.rank)))
        pin = world.device.type == "cuda"
        batches = step_batches(
            steps, start=state.step, total=total_steps, workers=config.data.workers, pin=pin
        )
        stack.callback(batches.close)
        verdict = fit(progress, batches, hooks, options)
        place.at("closing", 0)
        log.say(f"{verdict.name.lower()} at step {state.step}" + (f": {state.stop}" if state.stop else ""))
        if deadline:
            log.say(deadline.advice())
        folder.verdict = {
            "status": verdict.name.lower(), "step": state.step, "reason": state.stop,
            "exit_code": verdict.value,
        }  # fmt: skip
    return verdict


def warm_up_and_estimate(
    state: TrainState, steps: Steps, options: StepOptions, total_steps: int, save: SaveCheckpoint, log: Log
) -> str:
    """All ranks. One line: how long the training will take, evaluations and saves apart, and its memory."""
    largest = steps.largest()
    pass_s = warm_up(state, largest, options)
    save.reserve(state)
    estimate_s = pass_s * steps.passes(largest[-1]) * (total_steps - state.step)
    memory_gb = peak_memory_gb(state.device)
    log.record("warm_up", state.step, {"memory_gb": memory_gb, "pass_s": pass_s, "estimate_s": estimate_s})
    return (
        f"training will take about {clock(estimate_s)}, by the {pass_s:.2f} s of a warm-up pass;"
        f" peak memory until here {memory_gb:.2f} GB"
    )


def wrap(model: nn.Module, world: World, *, compile_it: bool, num_shapes: int = 0) -> nn.Module:
    """Compiled if asked for; DDP only when there is somebody to average with."""
    wrapped = compiled(model, num_shapes) if compile_it else model
    if world.size == 1:
        return wrapped
    ids = [world.device.index] if world.device.type == "cuda" else None
    # No buffer of these networks changes; torch 2.13 gave the option not to send them a new name.
    known = inspect.signature(DistributedDataParallel).parameters
    quiet: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }
    return DistributedDataParallel(wrapped, device_ids=ids, gradient_as_bucket_view=True, **quiet)


def layout(model: nn.Module, world: World, config: TrainConfig, tokens: int, total_steps: int) -> str:
    """One line: what runs where, and what is derived from the global batch."""
    parameters = sum(p.numel() for p in model.parameters())
    free = shutil.disk_usage(config.run_dir).free / 1e9
    return (
        f"{parameters / 1e6:.1f} M parameters, {config.precision}, {world.size} x {world.device.type};"
        f" {total_steps} steps of {config.batch_size} rows, at most {tokens} tokens a device at once;"
        f" checkpoints of {checkpoints.checkpoint_bytes(parameters) / 1e9:.2f} GB, {free:.0f} GB free"
    )

"""A run, in reading order: world, data, model, restore, hooks, fit. `loop.py` is next."""

from __future__ import annotations

import dataclasses
import inspect
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from plainloop.data.loader import step_batches
from plainloop.data.types import InputError
from plainloop.trainer import checkpoint as checkpoints
from plainloop.trainer.checkpoint import Checkpoint
from plainloop.trainer.config import TrainConfig, check_train_config, config_differences
from plainloop.trainer.distributed import World, broadcast_json, process_group, world_from_env
from plainloop.trainer.hooks import Evaluate, LogLine, NonFinite, SaveCheckpoint, Stop, Stopwatch
from plainloop.trainer.log import Log
from plainloop.trainer.loop import Hook, Progress, StepOptions, Verdict, fit
from plainloop.trainer.optim import learning_rate, make_optimizer
from plainloop.trainer.options import to_yaml
from plainloop.trainer.precision import check_precision, make_scaler
from plainloop.trainer.signals import StopRequest
from plainloop.trainer.state import TrainState
from plainloop.trainer.tasks import make_task

TOKENS_PER_DEVICE = {"cuda": 8192, "cpu": 4096}


def train(config: TrainConfig) -> Verdict:
    """All ranks. Train from the start or from the run folder's newest checkpoint, to the end or a stop."""
    with ExitStack() as stack:
        # Who and where.
        check_train_config(config)
        world = world_from_env(config.device)
        check_precision(config.precision, world.device)
        run_dir = Path(config.run_dir)
        if world.is_main:
            open_run_folder(run_dir)
        log = Log(run_dir, enabled=world.is_main, tensorboard=config.log.tensorboard)
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
        stack.enter_context(process_group(world, timeout_s=config.timeout_s))
        request = stack.enter_context(StopRequest(run_dir / "stop" if world.is_main else None).listening())

        # Model: own newest good checkpoint > the pretrained one. A new head depends on the seed alone.
        fingerprint = {"data": rows.path.name}
        found = find_checkpoint(run_dir, config, fingerprint, world, log)
        torch.manual_seed(config.seed)
        model = task.load_model(str(found.path) if found else config.model.path, new_head=found is None)
        model.to(world.device).train()
        wrapped = wrap(model, world, compile_it=config.model.compile)
        scaler = make_scaler(config.precision, world.device)
        state = TrainState(model, wrapped, make_optimizer(model, config.optim), scaler, world.device)
        if found:
            checkpoints.restore(state, found, is_main=world.is_main)
            log.say(f"continuing from {found.path} at step {state.step} of {total_steps}")
        log.say(f"train: {steps.describe()}")
        for part, path, data in (("train", config.data.train, rows), ("dev", config.data.dev, dev_rows)):
            name = path if isinstance(path, str) else ", ".join(path or [])
            for line in task.report(part, data, config.precision) if data else []:
                log.say(f"{part}: {name}: {line}")
        log.say(layout(model, world, config, tokens, total_steps))

        # What happens between steps, in this order. A hook of your own goes into this list.
        progress = Progress(state, total_steps, steps.sampler.steps_per_epoch)
        watch, lr = Stopwatch(), learning_rate(config.optim, total_steps)
        stop = Stop(request, config.stop_at_step)

        def evaluate() -> dict[str, float] | None:
            assert dev_rows is not None
            return task.evaluate(
                model, dev_rows, name=f"{run_dir} step {state.step}", config=config.evaluation,
                precision=config.precision, tokens=config.evaluation.tokens_per_device or 2 * tokens,
                folder=run_dir / "evaluation", should_stop=stop.agreed, training=True,
            )  # fmt: skip

        save = SaveCheckpoint(
            run_dir, lambda folder: task.save_model(model, folder), log, watch, world, config.checkpoint,
            metric=config.evaluation.best_metric, saved_step=state.step,
            extra={"config": dataclasses.asdict(config), "fingerprint": fingerprint},
        )  # fmt: skip
        hooks: list[Hook] = [
            stop,
            NonFinite(config.optim.max_nonfinite_steps),
            LogLine(log, config.log.every_steps, watch, lr),
            *([Evaluate(evaluate, log, watch, config.evaluation)] if dev_rows is not None else []),
            save,
        ]

        # The loop.
        log.start(state.step, total_steps)
        pin = world.device.type == "cuda"
        batches = step_batches(
            steps, start=state.step, total=total_steps, workers=config.data.workers, pin=pin
        )
        options = StepOptions(
            task.loss_sum, lr, world, config.seed, config.precision, config.optim.max_grad_norm
        )
        verdict = fit(progress, batches, hooks, options)
        if save.failed:
            raise InputError(
                f"the last checkpoint could not be written: {save.failed}; make room and start again."
            )
        log.say(f"{verdict.name.lower()} at step {state.step}" + (f": {state.stop}" if state.stop else ""))
    return verdict


def open_run_folder(run_dir: Path) -> None:
    """Rank 0 only. Make it, and show now, not hours later, that it can be written to."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".tmp-probe-{os.getpid()}"
        checkpoints.write_atomically(probe, "probe")
        probe.unlink()
        (run_dir / "stop").unlink(missing_ok=True)  # of an earlier life
    except OSError as error:
        raise InputError(
            f"run_dir {run_dir}: {error.strerror or error}; choose a folder that can be written to."
        ) from None


def find_checkpoint(
    run_dir: Path, config: TrainConfig, fingerprint: dict[str, Any], world: World, log: Log
) -> Checkpoint | None:
    """All ranks. Rank 0 looks and everybody follows. Raises InputError when the mathematics would change."""
    answer: dict[str, Any] = {}
    if world.is_main:
        try:
            found = look_for_checkpoint(run_dir, config, fingerprint, log)
            answer = {"path": str(found.path), "state": found.state} if found else {}
        except InputError as error:
            answer = {"error": str(error)}
    answer = broadcast_json(answer)
    if "error" in answer:
        raise InputError(answer["error"])
    return Checkpoint(Path(answer["path"]), answer["state"]) if answer else None


def look_for_checkpoint(
    run_dir: Path, config: TrainConfig, fingerprint: dict[str, Any], log: Log
) -> Checkpoint | None:
    """Rank 0 only. The newest good checkpoint, if its options agree; leaves config.yaml in the run folder."""
    folder = run_dir / "checkpoints"
    checkpoints.sweep(folder)
    found = checkpoints.newest_good(folder, log.say)
    if found is not None:
        changes = config_differences(config, found.state["config"])
        if found.state["fingerprint"] != fingerprint and "data" not in config.checkpoint.allow_changes:
            changes.append("data: the training data, the tokenizer or the code that reads them")
        if changes:
            raise InputError(
                f"{run_dir} was trained with other options: {'; '.join(changes)}."
                " Choose another run_dir, or name the options in --checkpoint.allow_changes."
            )
    checkpoints.write_atomically(run_dir / "config.yaml", to_yaml(config))
    return found


def wrap(model: nn.Module, world: World, *, compile_it: bool) -> nn.Module:
    """Compiled if asked for; DDP only when there is somebody to average with."""
    wrapped = cast(nn.Module, torch.compile(model, dynamic=True)) if compile_it else model
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
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    free = shutil.disk_usage(config.run_dir).free / 1e9
    return (
        f"{millions:.1f} M parameters, {config.precision}, {world.size} x {world.device.type};"
        f" {total_steps} steps of {config.batch_size} rows, at most {tokens} tokens a device at once;"
        f" checkpoints of {checkpoints.checkpoint_bytes(model) / 1e9:.2f} GB, {free:.0f} GB free"
    )

"""A run, in reading order: world, data, process group, model, hooks, loop. `loop.py` is next."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from plainloop.data.loader import Steps, step_batches
from plainloop.models.compiled import compile_training
from plainloop.models.load import overflows_in_fp16
from plainloop.trainer.checkpoint import resume
from plainloop.trainer.checkpoint.folder import checkpoint_bytes, restore
from plainloop.trainer.checkpoint.sharded import SaveShards
from plainloop.trainer.checkpoint.writer import SaveCheckpoint
from plainloop.trainer.config.options import TrainConfig
from plainloop.trainer.config.validate import validate
from plainloop.trainer.distributed.deadline import Deadline, StopTime
from plainloop.trainer.distributed.device import keep_compiled_code, set_up_device
from plainloop.trainer.distributed.parallel import parallelise
from plainloop.trainer.distributed.signals import StopRequest, handlers_restored
from plainloop.trainer.distributed.watchdog import Heartbeat, Watchdog
from plainloop.trainer.distributed.world import World, process_group, world_from_env
from plainloop.trainer.hooks import CompareRanks, Evaluate, LogLine, NonFinite, Stop, warm_up_and_estimate
from plainloop.trainer.loop import Hook, StepOptions, Verdict, fit
from plainloop.trainer.optim import learning_rate, make_optimizer
from plainloop.trainer.precision import make_scaler, resolve_precision, warnings
from plainloop.trainer.run_folder.base_model import describe_base
from plainloop.trainer.run_folder.log import Log
from plainloop.trainer.run_folder.status import hold
from plainloop.trainer.state import Progress, TrainState
from plainloop.trainer.tasks import base as tasks
from plainloop.trainer.tasks.base import Dataset, Task
from plainloop.trainer.tasks.evaluation import EvaluationSettings
from plainloop.trainer.tasks.find import find_hooks, find_task
from plainloop.trainer.tasks.model import load_model, save_model


@dataclass(frozen=True)
class Result:
    """How a run ended. metrics: last evaluation, with its step. best: the best checkpoint so far, if any."""

    verdict: Verdict
    step: int
    metrics: dict[str, float]
    best: Path | None


def train(config: TrainConfig, hooks: Sequence[Hook] = (), *, last: bool = False) -> Result:
    """All ranks. Train from scratch, or resume from the run folder's newest checkpoint, to the end or a stop.

    hooks: your own, called just before the save hook. last: the process ends with this run, so signals are
    ignored once the outcome is saved. Raises InputError and RunError.
    """
    with ExitStack() as stack:
        stack.enter_context(handlers_restored(ignore=last))

        # 1. Who and where. Rank 0 locks the run folder, so that no other run writes there.
        task_type, own_hooks = find_task(config.task), [*find_hooks(config.hooks), *hooks]
        validate(config, uses=task_type.uses, metric_names=task_type.metric_names)
        world, run_dir = world_from_env(config.device), Path(config.run_dir)
        log = Log(run_dir, enabled=world.is_main, tensorboard=config.log.tensorboard)
        folder = stack.enter_context(hold(run_dir, world.rank, log.say))
        stack.callback(log.close)

        # 2. Data, tokenised by rank 0 before there is a process group that could time out.
        max_tokens, task = config.max_tokens(world.device.type), task_type(config)
        data = prepare_data(task, config, world)
        steps = tasks.make_steps(task, data["train"], config, world, max_tokens=max_tokens)
        total_steps = config.total_steps(steps.sampler.steps_per_epoch)

        # 3. Together from here on. A watchdog thread in each rank ends a run that hangs.
        heartbeat, longest_s = Heartbeat(), max(config.start_timeout_s, config.timeout_s)
        prefix = stack.enter_context(process_group(world, timeout_s=longest_s + 60))
        folder.joined = True  # rank 0 has locked it: a rank that fails may leave its reason there
        watchdog = Watchdog(
            world, prefix, heartbeat, run_dir, folder.failed,
            first_s=config.start_timeout_s, then_s=config.timeout_s,
        )  # fmt: skip
        stack.enter_context(watchdog.watching())

        # 4. Model, optimizer, and the checkpoint to resume from.
        set_up_device(world, tf32=config.tf32, deterministic=config.deterministic)
        config, state, metadata = start_or_resume(task, config, world, steps, data["train"], heartbeat, log)
        stop_time = StopTime.from_status(folder.before)
        progress = Progress(state, total_steps, steps.sampler.steps_per_epoch, log, world, stop_time)
        if world.is_main:
            folder.status("running", step=state.step, began_at=state.step, total_steps=total_steps)
        report(config, progress, steps, data)

        # 5. What happens between steps, in this order. Your own hooks run just before the save.
        lr, deadline = learning_rate(config.optim, total_steps), Deadline.from_env(stop_time)
        sharded = config.parallel.mode == "fsdp"
        request = StopRequest(run_dir / "stop" if world.is_main else None)
        stop, batch_tokens = Stop(request, config.stop_at_step), config.evaluation.tokens_per_device
        settings = EvaluationSettings(
            world, config.precision, batch_tokens or 2 * max_tokens, config.evaluation, str(run_dir),
            folder=run_dir / "evaluation", should_stop=stop.agreed, training=True, lockstep=sharded,
        )  # fmt: skip
        evaluate = partial(tasks.evaluate, task, state.model, data.get("dev"), settings)
        save = (SaveShards if sharded else SaveCheckpoint)(
            progress, folder, partial(save_model, task, state.model), config.checkpoint,
            metric=config.evaluation.best_metric, metadata=metadata,
        )  # fmt: skip
        stack.callback(save.close)
        all_hooks: list[Hook] = [
            stop,
            NonFinite(config.optim.max_nonfinite_steps, partial(tasks.record_ids, task, data["train"])),
            CompareRanks(config.compare_every_steps),
            LogLine(config.log.every_steps, lr, deadline),
            *([Evaluate(evaluate, config.evaluation)] if "dev" in data else []),
            *own_hooks,
            save,
        ]

        # 6. The loop. Once `request` is listening, a signal asks for a stop with a checkpoint.
        log.start(state.step, total_steps, {record["step"] for record in state.evaluations})
        max_norm = config.optim.max_grad_norm
        options = StepOptions(task.loss_sum, lr, world, config.seed, config.precision, max_norm)
        if state.step < total_steps:
            warm_up_and_estimate(progress, steps, options, save.reserve)
        stack.enter_context(request.listening(folder.failed))
        workers, pin = config.data.workers, world.device.type == "cuda"
        batches = step_batches(steps, start=state.step, total=total_steps, workers=workers, pin=pin)
        stack.callback(batches.close)
        verdict = fit(progress, batches, all_hooks, options)

        # 7. The verdict.
        heartbeat.at("closing")
        ended = verdict.name.lower()
        log.say(f"{ended} at step {state.step}" + (f": {state.stop}" if state.stop else ""))
        if deadline:
            log.say(deadline.advice())
        folder.ended(ended, step=state.step, reason=state.stop, exit_code=verdict.value)
        metrics = state.evaluations[-1] if state.evaluations else {}
        best = (run_dir / "best").resolve() if (run_dir / "best").exists() else None
        return Result(verdict, state.step, metrics, best)


def prepare_data(task: Task, config: TrainConfig, world: World) -> dict[str, Dataset]:
    """All ranks. The splits "train" and, if there is one, "dev". Raises InputError."""
    limit = config.data.limit
    data = {"train": tasks.load_split(task, "train", config.data.train or "", config, world, limit=limit)}
    if config.data.dev:
        data["dev"] = tasks.load_split(task, "dev", config.data.dev, config, world)
        tasks.require_metric(task, data["dev"], config.evaluation.best_metric)
    return data


def start_or_resume(
    task: Task, config: TrainConfig, world: World, steps: Steps, data: Dataset, heartbeat: Heartbeat, log: Log
) -> tuple[TrainConfig, TrainState, dict[str, Any]]:
    """All ranks. Return the config with its precision resolved, the state (of the newest good checkpoint, or
    a fresh one), and what checkpoints record. A new head depends only on the seed. Raises InputError.
    """
    found = resume.find_checkpoint(Path(config.run_dir), world, log)
    precision, why = resolve_precision(
        config.precision, world.device, overflows_in_fp16=overflows_in_fp16(config.model.path),
        recorded=found.state["config"]["precision"] if found else None,
    )  # fmt: skip
    config = replace(config, precision=cast(Any, precision))
    metadata = resume.run_metadata(config, world, data.store, steps.max_tokens)
    resume.require_same_run(found, config, metadata, steps.sampler, world)
    torch.manual_seed(config.seed)
    heartbeat.at("loading the model")
    path = str(found.path) if found else config.model.path
    model = load_model(
        task, path, config, world, new_head=found is None, sharded=config.parallel.mode == "fsdp"
    ).train()
    if config.peft.rank and world.is_main:
        metadata["base"] = found.state["base"] if found else describe_base(config.model.path)
    keep_compiled_code(config.data.cache_dir, world.device)
    state = new_state(model, config, world, heartbeat, num_shapes=steps.widths.num_shapes)
    if found:
        restore(state, found, is_main=world.is_main)
        log.say(f"resuming from {found.path} at step {state.step}")
        log.say(f"guaranteed: {resume.guarantee(found, config, metadata)}")
    log.say(f"precision {precision}: {why}")
    return config, state, metadata


def new_state(
    model: nn.Module, config: TrainConfig, world: World, heartbeat: Heartbeat | None = None,
    *, num_shapes: int = 0,
) -> TrainState:  # fmt: skip
    """Compile the model if asked for, spread it over the ranks, and make its optimizer and loss scaler."""
    compile_module = partial(compile_training, num_shapes=num_shapes) if config.model.compile else None
    parallel = parallelise(model, world, compile_module)
    optimizer, scaler = make_optimizer(model, config.optim), make_scaler(config.precision, world.device)
    return TrainState(
        model, parallel, optimizer, scaler, world.device, heartbeat or Heartbeat(), config.peft.rank > 0
    )


def report(config: TrainConfig, progress: Progress, steps: Steps, data: dict[str, Dataset]) -> None:
    """Rank 0 logs: warnings, what the data is and what was truncated, and what runs where."""
    state, world, log = progress.state, progress.world, progress.log
    if not world.is_main:
        return
    if state.step >= progress.total_steps:
        log.say(f"nothing is left to do: {progress.total_steps} steps are done")
    if warning := progress.stop_time.too_long(config.checkpoint.grace_s):
        log.say(warning)
    overflows = overflows_in_fp16(config.model.path)
    for warning in warnings(config.precision, world.device, overflows_in_fp16=overflows):
        log.say(warning)
    log.say(f"train: {steps.describe()}")
    for split, dataset in data.items():
        for line in dataset.store.meta["report"]:
            log.say(f"{split}: {', '.join(dataset.files)}: {line}")
    parameters = sum(p.numel() for p in state.model.parameters())
    trained = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    share = "" if trained == parameters else f" of which {trained / 1e6:.2f} M are trained,"
    size = checkpoint_bytes(trained if state.adapted else parameters, config.optim.name) / 1e9
    free = shutil.disk_usage(config.run_dir).free / 1e9
    log.say(
        f"{parameters / 1e6:.1f} M parameters,{share} {config.precision}, {world.size} x {world.device.type};"
        f" {progress.total_steps} steps of {config.batch_size} rows, at most {steps.max_tokens} padded tokens"
        f" per micro-batch; checkpoints of {size:.2f} GB, {free:.0f} GB free"
    )

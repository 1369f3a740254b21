"""`plainloop replay RUN --step N`: the rows that a training step saw, and the loss of each of them.

Which rows: a function of the step. Their losses: the last checkpoint before the step is loaded, and the steps
up to it are trained again, with the micro-batches and dropout masks of every rank of the run, in one process.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from plainloop.data.loader import Steps
from plainloop.data.samplers import subset
from plainloop.data.types import IGNORE_INDEX, MicroBatch
from plainloop.trainer.checkpoint import folder as checkpoints
from plainloop.trainer.checkpoint.folder import PREFIX, Checkpoint
from plainloop.trainer.config.options import TrainConfig
from plainloop.trainer.config.parse import from_dict
from plainloop.trainer.config.report_options import ReplayConfig
from plainloop.trainer.distributed.device import set_up_device
from plainloop.trainer.distributed.world import World, world_from_env
from plainloop.trainer.errors import InputError
from plainloop.trainer.loop import StepOptions, add_gradients, dropout_seed, train_step
from plainloop.trainer.optim import learning_rate
from plainloop.trainer.run import new_state
from plainloop.trainer.tasks import base as tasks
from plainloop.trainer.tasks.base import Dataset, Task
from plainloop.trainer.tasks.find import find_task


@dataclass
class Losses:
    """A loss function for `train_step` that also keeps the loss of each row of one step."""

    task: Task
    rows: list[int] = field(default_factory=list)  # of the micro-batch at hand; [] while nothing is kept
    owner: Tensor = field(default_factory=lambda: torch.zeros(0))  # (K,) the row of each label
    of_row: dict[int, float] = field(default_factory=dict)

    def __call__(self, logits: Tensor, labels: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            for i, row in enumerate(self.rows):  # a label of -100 counts for nothing
                others = self.owner.to(logits.device) != i
                own = {
                    name: label.masked_fill(
                        others.view(-1, *[1] * (label.ndim - 1)).expand_as(label), IGNORE_INDEX
                    )
                    for name, label in labels.items()
                }
                self.of_row[row] = self.task.loss_sum(logits, own).item()
        return self.task.loss_sum(logits, labels)

    def expect(self, rows: np.ndarray, micro_batch: MicroBatch) -> None:
        """Keep the losses of the next micro-batch, which has these rows."""
        self.rows, inputs = rows.tolist(), micro_batch.inputs
        if "scored" in inputs:  # labels are those of the target tokens of all rows
            self.owner = inputs["scored"] // inputs["decoder_input_ids"].shape[1]
        else:
            self.owner = torch.arange(len(rows))


def replay(config: ReplayConfig) -> str:
    """The rows as text or JSON. Raises InputError."""
    if not config.run or config.step is None:
        raise InputError("replay needs a run folder and --step N: plainloop replay RUN --step N; see --help.")
    run_dir = Path(config.run)
    run, saved = read_run(run_dir, config.task)
    world = world_from_env(config.device)
    if world.size > 1:
        raise InputError("replay is one process, also for a run of several ranks: start it without torchrun.")
    task = find_task(run.task)(run)
    data = tasks.load_split(task, "train", run.data.train or "", run, world, limit=run.data.limit)
    known = (saved[-1].state["fingerprint"] or {}).get("data") if saved else None
    if known not in (None, data.store.name):
        raise InputError(f"{run_dir}: its training data, or the tokenizer, have changed since: no replay.")
    environment = saved[-1].state["environment"] if saved else {}
    max_tokens = environment.get("tokens_per_device") or run.max_tokens(world.device.type)
    ranks = int(environment.get("ranks") or 1)
    of_rank = [
        tasks.make_steps(task, data, run, World(rank, ranks, rank, world.device), max_tokens=max_tokens)
        for rank in range(ranks)
    ]
    total = run.total_steps(of_rank[0].sampler.steps_per_epoch)
    if config.step > total:
        raise InputError(f"--step {config.step}: the run has {total} steps.")
    rows, log = of_rank[0].sampler.batch(config.step - 1), read_log(run_dir)
    found: dict[str, Any] = {
        "run": str(run_dir), "step": config.step, "epoch": config.step / of_rank[0].sampler.steps_per_epoch,
        "ranks": ranks, "rows": describe(task, data, rows, config.chars),
    }  # fmt: skip
    if config.losses:
        start = last_good([checkpoint for checkpoint in saved if checkpoint.state["step"] < config.step])
        found |= losses(task, run, data, of_rank, start, config.step, log, world)
        for row, more in zip(found["rows"], found.pop("row_losses"), strict=True):
            row |= more
        found["rows"].sort(key=lambda row: -row["loss"] if math.isfinite(row["loss"]) else -math.inf)
    if config.around:
        near = [line for line in log if abs(line["step"] - config.step) <= config.around]
        found["log"] = near
    return json.dumps(found, indent=1, ensure_ascii=False) if config.json else as_text(found)


def read_run(run_dir: Path, named_task: str | None) -> tuple[TrainConfig, list[Checkpoint]]:
    """The options of a run, and its checkpoints, oldest first, not yet verified. Raises InputError."""
    file = run_dir / "config.yaml"
    try:
        values = dict(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"can't be read: {error}"
        raise InputError(f"{run_dir}: not a run folder: {file}: {reason}.") from None
    if ":" in values["task"] and named_task != values["task"]:
        raise InputError(f"{run_dir}: was trained with a task of your own; name it: --task {values['task']}.")
    run = from_dict(TrainConfig, values)
    saved = []
    for path in sorted((run_dir / "checkpoints").glob(f"{PREFIX}*")):
        with contextlib.suppress(OSError, ValueError):
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            saved.append(Checkpoint(path, checkpoints.upgrade(state)))
    return replace(run, model=replace(run.model, compile=False)), saved


def last_good(saved: list[Checkpoint]) -> Checkpoint | None:
    """The last of these checkpoints that verifies and can be trained on. Damaged ones are reported."""
    for checkpoint in reversed(saved):
        if fault := checkpoints.verify(checkpoint.path):
            print(f"warning: {checkpoint.path}: {fault}; taking an older one", file=sys.stderr)
        elif checkpoints.has_optimizer(checkpoint.path):
            return checkpoint
    return None


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """The train lines of metrics.jsonl. A line truncated by a kill is left out."""
    lines = []
    try:
        for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            lines += [record] if record.get("kind") == "train" else []
    except OSError as error:
        raise InputError(f"{run_dir}/metrics.jsonl: {error.strerror}.") from None
    return lines


def describe(task: Task, data: Dataset, rows: np.ndarray, chars: int) -> list[dict[str, Any]]:
    """What each row is: its record, and the input as the model sees it."""
    examples = list(task.read(data.files))
    kept, owner = subset(len(examples), data.limit), np.asarray(data.store.arrays["example"])
    found = []
    for row in rows.tolist():
        example = examples[kept[owner[row]]]
        siblings = np.flatnonzero(owner == owner[row])
        part = f"{row - siblings[0] + 1} of {len(siblings)}"
        one: dict[str, Any] = {"row": row, "id": example.id, "part": part}
        for name in ("question", "answers", "references", "targets"):
            if (value := getattr(example, name, None)) is not None:
                one[name] = value if isinstance(value, str) else [getattr(v, "text", v) for v in value]
        if "input_ids" in data.store.arrays:
            text = task.tokenizer.decode(data.store.row("input_ids", row).tolist())
            one["input"] = text if not chars or len(text) <= chars else f"{text[:chars]} ..."
        found.append(one)
    return found


def losses(
    task: Task, run: TrainConfig, data: Dataset, of_rank: list[Steps], start: Checkpoint | None, wanted: int,
    log: list[dict[str, Any]], world: World,
) -> dict[str, Any]:  # fmt: skip
    """The loss of each row of step `wanted` (counted from 1). Training goes on to the next line of the log,
    whose loss must come out again: a check of all that was recomputed.
    """
    logged = next((line for line in log if line["step"] >= wanted), None)
    last = logged["step"] if logged else wanted
    set_up_device(world, tf32=run.tf32, deterministic=run.deterministic)
    if start is not None and (threads := start.state["environment"].get("threads")):
        torch.set_num_threads(threads)
    torch.manual_seed(run.seed)
    path = str(start.path) if start else run.model.path
    model = tasks.load_model(task, path, run, world, new_head=start is None).train()
    state = new_state(model, run, world)
    if start:
        checkpoints.restore(state, start, is_main=True)
    began = state.step
    print(
        f"training from {start.path if start else 'the start'}, step {began}, to step {last}"
        + ("" if start else "; no checkpoint before the step is left"),
        file=sys.stderr,
    )
    losses, total = Losses(task), run.total_steps(of_rank[0].sampler.steps_per_epoch)
    options = StepOptions(
        losses, learning_rate(run.optim, total), world, run.seed, run.precision, run.optim.max_grad_norm
    )
    lines = {line["step"] for line in log}
    for step in tqdm(range(began, last), desc="replay", unit="step", delay=2, mininterval=1, leave=False):
        if step in lines:  # the loss of a line is the mean since the line before
            state.loss_sum.zero_()
            state.loss_count = 0
        before = state.loss_sum.item()
        one_step(state, of_rank, step, options, losses if step == wanted - 1 else None)
        if step == wanted - 1:
            step_loss = (state.loss_sum.item() - before) / of_rank[0][step].num_targets
    weights = data.store.num_targets
    rows = of_rank[0].sampler.batch(wanted - 1)
    divisor = int(weights[rows].sum())
    found: dict[str, Any] = {
        "row_losses": [
            {"loss": losses.of_row[row] / int(weights[row]), "weight": int(weights[row]) / divisor}
            for row in rows.tolist()
        ],
        "step_loss": step_loss,
        "weighted_sum": sum(losses.of_row[row] for row in rows.tolist()) / divisor,
        "trained_from_step": began,
    }
    first = max((step for step in lines if step < last), default=0)
    if logged:
        found["logged"] = {
            "first_step": first + 1, "last_step": last, "loss": logged["loss"],
            "recomputed": state.loss_sum.item() / state.loss_count,
        }  # fmt: skip
    return found


def one_step(state: Any, of_rank: list[Steps], step: int, options: StepOptions, keep: Losses | None) -> None:
    """The step of all ranks: their gradients are summed here, all else is done by the loop's own function."""
    shares = of_rank[0].split(of_rank[0].sampler.batch(step))
    batches = [steps[step] for steps in of_rank]
    for rank, batch in enumerate(batches):
        for i, micro_batch in enumerate(batch.micro_batches):
            if keep and shares[rank]:
                keep.expect(shares[rank][i], micro_batch)
            torch.manual_seed(dropout_seed(options.seed, step, rank, i))
            state.loss_sum += add_gradients(state, micro_batch, 1 / batch.num_targets, options)
            if keep:
                keep.rows = []
    train_step(state, batches[0]._replace(micro_batches=[]), options)
    state.step_done(batches[0].rows)


def as_text(found: dict[str, Any]) -> str:
    """For a terminal: with losses, the highest first."""
    lines = [f"{found['run']}: step {found['step']}, epoch {found['epoch']:.3f}: {len(found['rows'])} rows"]
    for line in found.get("log", []):
        mark = ">" if line["step"] == found["step"] else " "
        shown = "  ".join(
            f"{name} {line[name]:.5g}" if isinstance(line[name], float) else f"{name} {line[name]}"
            for name in ("loss", "lr", "grad_norm", "skipped")
            if name in line
        )
        lines.append(f"{mark} step {line['step']}  {shown}")
    for row in found["rows"]:
        loss = f"  loss {row['loss']:.6f}  weight {row['weight']:.6f}" if "loss" in row else ""
        lines += ["", f"row {row['row']}  id {row['id']}  part {row['part']}{loss}"]
        for name in ("question", "answers", "references", "targets", "input"):
            if name in row:
                value = (
                    row[name] if isinstance(row[name], str) else " | ".join(map(str, row[name])) or "(none)"
                )
                lines.append(f"  {name}: {value}")
    if "step_loss" in found:
        lines += [
            "",
            f"loss of step {found['step']}: {found['step_loss']:.8f}; weighted sum of its rows:"
            f" {found['weighted_sum']:.8f}",
        ]
        if logged := found.get("logged"):
            lines.append(
                f"log, steps {logged['first_step']} to {logged['last_step']}: loss {logged['loss']:.8f};"
                f" recomputed: {logged['recomputed']:.8f}"
            )
    return "\n".join(lines)

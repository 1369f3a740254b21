"""`plainloop replay RUN --step N`: the rows that a training step saw, which are a function of the step; and,
with replay_losses, the loss of each.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from plainloop.data.samplers import Sampler, subset
from plainloop.trainer.checkpoint import folder as checkpoints
from plainloop.trainer.checkpoint.folder import PREFIX, Checkpoint
from plainloop.trainer.checkpoint.resume import require_order
from plainloop.trainer.commands.replay_losses import losses
from plainloop.trainer.config.options import TrainConfig
from plainloop.trainer.config.parse import from_dict, parse
from plainloop.trainer.config.report_options import ReplayConfig
from plainloop.trainer.distributed.world import World, world_from_env
from plainloop.trainer.errors import InputError
from plainloop.trainer.run_folder.base_model import require_base
from plainloop.trainer.tasks import base as tasks
from plainloop.trainer.tasks.base import Dataset, Task
from plainloop.trainer.tasks.find import find_task


def replay(config: ReplayConfig) -> str:
    """The rows as text or JSON. Raises InputError."""
    if not config.run or config.step is None:
        raise InputError("replay needs a run folder and --step N: plainloop replay RUN --step N; see --help.")
    run_dir, step = Path(config.run), config.step
    world = world_from_env(config.device)
    if world.size > 1:
        raise InputError("replay is one process, also for a run of several ranks: start it without torchrun.")
    saved, log = read_checkpoints(run_dir), read_log(run_dir)
    told = next((one for one in saved if one.state["step"] >= step), saved[-1] if saved else None)
    run = read_config(run_dir, told, config)
    environment = told.state["environment"] if told else {}
    task = find_task(run.task)(run)
    data = tasks.load_split(task, "train", run.data.train or "", run, world, limit=run.data.limit)
    known = (told.state["fingerprint"] or {}).get("data") if told else None
    if known not in (None, data.store.name):
        raise InputError(f"{run_dir}: its training data, or the tokenizer, have changed since: no replay.")
    max_tokens = environment.get("tokens_per_device") or run.max_tokens(world.device.type)
    ranks = int(environment.get("ranks") or 1)
    of_rank = [
        tasks.make_steps(task, data, run, World(rank, ranks, rank, world.device), max_tokens=max_tokens)
        for rank in range(ranks)
    ]
    sampler = of_rank[0].sampler
    if step > (total := run.total_steps(sampler.steps_per_epoch)):
        raise InputError(f"--step {step}: the run has {total} steps.")
    if told:
        require_known_rows(told, step, sampler)
    done = max([0, *(one.state["step"] for one in saved), *(line["step"] for line in log)])
    found: dict[str, Any] = {
        "run": str(run_dir), "step": step, "epoch": step / sampler.steps_per_epoch, "ranks": ranks,
        "trained": step <= done, "rows": describe(task, data, sampler.batch(step - 1), config.chars),
    }  # fmt: skip
    if config.losses:
        if step > done:
            raise InputError(f"--step {step}: the run has been trained up to step {done}; no losses yet.")
        if told and "base" in told.state:
            require_base(told.state["base"], run.model.path)
        start = next((one for one in reversed(saved) if one.state["step"] < step), None)
        if start and start.state["environment"].get("ranks", ranks) != ranks:
            print("warning: the run changed its number of ranks near this step", file=sys.stderr)
        found |= losses(task, run, data, of_rank, start, step, log, world)
        for row, more in zip(found["rows"], found.pop("row_losses"), strict=True):
            row |= more
        found["rows"].sort(key=lambda row: row["loss"] if math.isfinite(row["loss"]) else math.inf)
        found["rows"].reverse()
    if config.around:
        found["log"] = [line for line in log if abs(line["step"] - step) <= config.around]
    return json.dumps(jsonable(found), indent=1, ensure_ascii=False) if config.json else as_text(found)


def jsonable(value: Any) -> Any:
    """NaN and Inf as text, which JSON does not have."""
    if isinstance(value, dict):
        return {key: jsonable(of) for key, of in value.items()}
    if isinstance(value, list):
        return [jsonable(of) for of in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """The good checkpoints that a run can be resumed from, oldest first. Damaged ones are reported."""
    saved = []
    for path in sorted((run_dir / "checkpoints").glob(f"{PREFIX}*")):
        if fault := checkpoints.verify(path):
            print(f"warning: {path}: {fault}; not used", file=sys.stderr)
        elif checkpoints.has_optimizer(path):
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            saved.append(Checkpoint(path, checkpoints.upgrade(state)))
    return saved


def read_config(run_dir: Path, told: Checkpoint | None, config: ReplayConfig) -> TrainConfig:
    """The options of the run at the step: of this checkpoint, else of config.yaml. Raises InputError."""
    if told:
        run = from_dict(TrainConfig, told.state["config"])
    elif (run_dir / "config.yaml").is_file():
        run = parse(TrainConfig, ["--config", str(run_dir / "config.yaml")], program="plainloop replay")
    else:
        raise InputError(f"{run_dir}: not a run folder: it has neither checkpoints nor a config.yaml.")
    if ":" in run.task and config.task != run.task:
        raise InputError(f"{run_dir}: was trained with a task of your own; name it: --task {run.task}.")
    if config.base and not run.peft.rank:
        raise InputError(f"--base: no effect, since {run_dir} was trained without adapters.")
    return replace(run, model=replace(run.model, path=config.base or run.model.path, compile=False))


def require_known_rows(told: Checkpoint, step: int, sampler: Sampler) -> None:
    """Raise InputError if the checkpoint shows that the sampler gives other rows now than were trained on,
    or if the options changed after the step, so that it does not tell.
    """
    if step <= told.state["order_since"]:
        raise InputError(
            f"--step {step}: the run was resumed with other options at step {told.state['order_since']},"
            " and no checkpoint is left from before: its rows are not known."
        )
    require_order(told, sampler)


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """The train lines of metrics.jsonl, if it is there. A line truncated by a kill is left out."""
    lines = []
    file = run_dir / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and record.get("kind") == "train" and isinstance(record["step"], int):
                lines.append(record)
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


def as_text(found: dict[str, Any]) -> str:
    """For a terminal: with losses, the highest first."""
    when = "" if found["trained"] else ", not trained yet"
    lines = [
        f"{found['run']}: step {found['step']}{when}, epoch {found['epoch']:.3f}: {len(found['rows'])} rows"
    ]
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
                f" recomputed: {logged['recomputed']:.8f}; {logged['verdict']}"
            )
    return "\n".join(lines)

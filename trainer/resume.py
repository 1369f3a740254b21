"""From which checkpoint a run continues, whether it may, and what is guaranteed of the result."""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from plainloop.data.samplers import Sampler, order_digest
from plainloop.data.types import InputError
from plainloop.trainer import checkpoint as checkpoints
from plainloop.trainer.checkpoint import Checkpoint
from plainloop.trainer.checks import config_differences
from plainloop.trainer.config import TrainConfig
from plainloop.trainer.distributed import World, broadcast_json
from plainloop.trainer.log import Log
from plainloop.trainer.options import to_yaml
from plainloop.trainer.saving import too_slow


def find_checkpoint(
    run_dir: Path, config: TrainConfig, identity: dict[str, Any], sampler: Sampler, world: World, log: Log
) -> Checkpoint | None:
    """All ranks. Rank 0 looks and everybody follows. Raises InputError when the mathematics would change.

    identity: what `record` gives.
    """
    answer: dict[str, Any] = {}
    if world.is_main:
        try:
            found = _look(run_dir, config, identity, sampler, log)
            answer = {"path": str(found.path), "state": found.state} if found else {}
        except InputError as error:
            answer = {"error": str(error)}
        except OSError as error:
            answer = {"error": f"{error.filename or run_dir}: {error.strerror or error}."}
    answer = broadcast_json(answer)
    if "error" in answer:
        raise InputError(answer["error"])
    return Checkpoint(Path(answer["path"]), answer["state"]) if answer else None


def record(config: TrainConfig, world: World, data: str, tokens: int) -> dict[str, Any]:
    """What a checkpoint tells of the run: its options, its data, and what decides about rounding."""
    return {
        "config": asdict(config),
        "fingerprint": {"data": data},
        "surroundings": surroundings(world, tokens),
    }


def surroundings(world: World, tokens: int) -> dict[str, Any]:
    """Where these are the same, a step gives the same bits."""
    gpu = world.device.type == "cuda"
    return {
        "ranks": world.size,
        "device": torch.cuda.get_device_name(world.device) if gpu else _cpu_name(),
        "threads": None if gpu else torch.get_num_threads(),
        "tokens_per_device": tokens,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }


def guarantee(found: Checkpoint, config: TrainConfig, identity: dict[str, Any]) -> str:
    """One line: what holds of a run that continues from this checkpoint."""
    allowed = _changes(found, config, identity, but_allowed=False)
    if allowed:
        return f"weights and optimizer state only, as allowed: {'; '.join(allowed)}"
    before, now = found.state["surroundings"], identity["surroundings"]
    changed = [f"{name} {before.get(name)} -> {now[name]}" for name in now if now[name] != before.get(name)]
    changed += [
        f"model.{n}"
        for n in ("compile", "activation_checkpointing")
        if _option(found, n) != getattr(config.model, n)
    ]
    if changed:
        return f"the same data and schedule, other rounding: {'; '.join(changed)}"
    if now["threads"] is None and not torch.are_deterministic_algorithms_enabled():
        return "the same data and schedule; the same bits where the GPU's kernels are deterministic"
    return "the same bits as a run that never stopped"


def _option(found: Checkpoint, name: str) -> Any:
    return found.state["config"]["model"].get(name)


def _changes(
    found: Checkpoint, config: TrainConfig, identity: dict[str, Any], *, but_allowed: bool = True
) -> list[str]:
    """What changes the mathematics; but_allowed: but for what allow_changes names."""
    names = set(config.checkpoint.allow_changes) if but_allowed else set()
    changes = config_differences(config, found.state["config"], names)
    if found.state["fingerprint"] != identity["fingerprint"] and "data" not in names:
        changes.append("data: the training data, the tokenizer or the code that reads them")
    return changes


def _look(
    run_dir: Path, config: TrainConfig, identity: dict[str, Any], sampler: Sampler, log: Log
) -> Checkpoint | None:
    """Rank 0 only. The newest good checkpoint, if its options agree; leaves config.yaml in the run folder."""
    folder = run_dir / "checkpoints"
    checkpoints.sweep(folder)
    found = checkpoints.newest_good(folder, log.say)
    if found is not None:
        if changes := _changes(found, config, identity):
            raise InputError(
                f"{run_dir} was trained with other options: {'; '.join(changes)}."
                " Choose another run_dir, or name the options in --checkpoint.allow_changes."
            )
        if _changes(found, config, identity, but_allowed=False):
            found.state.update(order="", order_since=found.state["step"])  # of another run from here on
        else:
            _require_order(found, sampler)
    checkpoints.write_atomically(run_dir / "config.yaml", to_yaml(config))
    return found


def _require_order(found: Checkpoint, sampler: Sampler) -> None:
    """Does this program deal out the steps that are done as they were dealt out? O(steps), 3 us a step."""
    order = ""
    for step in range(found.state["order_since"], found.state["step"]):
        order = order_digest(order, sampler.batch(step))
    if order != found.state["order"]:
        before, now = found.state["surroundings"]["numpy"], np.__version__
        raise InputError(
            f"{found.path}: its {found.state['step']} steps were trained on other rows than now come of"
            f" the same seed (numpy {before} -> {now}, or a changed sampler): go back to that version,"
            " or choose another run_dir."
        )


def warn_of_slow_saves(before: dict[str, Any], config: TrainConfig, log: Log) -> None:
    """Rank 0 only. before: status.json of the last life."""
    if (seconds := before.get("save_s") or 0) > config.checkpoint.grace_s:
        log.say(too_slow(seconds, config.checkpoint.grace_s))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()

"""From which checkpoint a run continues, whether it may, and what is guaranteed of the result."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from plainloop.data.samplers import Sampler, order_digest
from plainloop.data.types import InputError
from plainloop.trainer import checkpoint as checkpoints
from plainloop.trainer.checkpoint import Checkpoint
from plainloop.trainer.checks import config_differences
from plainloop.trainer.config import TrainConfig
from plainloop.trainer.device import what_affects_rounding
from plainloop.trainer.distributed import World, broadcast_json
from plainloop.trainer.log import Log
from plainloop.trainer.options import flatten, to_yaml


def find_checkpoint(run_dir: Path, world: World, log: Log) -> Checkpoint | None:
    """All ranks. The newest good one of this run; rank 0 looks and everybody follows. Raises InputError."""
    answer: dict[str, Any] = {}
    if world.is_main:
        try:
            folder = run_dir / "checkpoints"
            checkpoints.sweep(folder)
            found = checkpoints.newest_good(folder, log.say)
            answer = {"path": str(found.path), "state": found.state} if found else {}
        except InputError as error:
            answer = {"error": str(error)}
        except OSError as error:
            answer = {"error": f"{error.filename or run_dir}: {error.strerror or error}."}
    answer = broadcast_json(answer)
    if "error" in answer:
        raise InputError(answer["error"])
    return Checkpoint(Path(answer["path"]), answer["state"]) if answer else None


def require_same_run(
    found: Checkpoint | None, config: TrainConfig, identity: dict[str, Any], sampler: Sampler, world: World
) -> None:
    """All ranks. Raises InputError when continuing from this checkpoint would change the mathematics; else
    rank 0 leaves config.yaml in the run folder. identity: what `record` gives.
    """
    fault = None
    if world.is_main:
        try:
            if found is not None:
                _accept(found, config, identity, sampler)
            checkpoints.write_atomically(Path(config.run_dir) / "config.yaml", to_yaml(config))
        except InputError as error:
            fault = str(error)
        except OSError as error:
            fault = f"{error.filename or config.run_dir}: {error.strerror or error}."
    if fault := broadcast_json(fault):
        raise InputError(fault)
    if found is not None and _changes(found, config, identity, but_allowed=False):
        found.state.update(order="", order_since=found.state["step"])  # of another run from here on


def record(config: TrainConfig, world: World, data: str, tokens: int) -> dict[str, Any]:
    """All ranks. What a checkpoint tells of the run: its options, its data, and what affects rounding."""
    return {
        "config": asdict(config),
        "fingerprint": {"data": data},
        "surroundings": {
            "tokens_per_device": tokens,
            **what_affects_rounding(world, tf32=config.tf32, deterministic=config.deterministic),
        },
    }


def guarantee(found: Checkpoint, config: TrainConfig, identity: dict[str, Any]) -> str:
    """One line: what holds of a run that continues from this checkpoint."""
    allowed = _changes(found, config, identity, but_allowed=False)
    if allowed:
        return f"weights and optimizer state only, as allowed: {'; '.join(allowed)}"
    before, now = found.state["surroundings"], identity["surroundings"]
    # What an older version did not record is not known to differ.
    changed = [
        f"{name} {before[name]} -> {now[name]}" for name in now if now[name] != before.get(name, now[name])
    ]
    old, new = (flatten(c) for c in (found.state["config"], asdict(config)))
    options = ("model.compile", "model.activation_checkpointing", "data.num_widths")
    changed += [name for name in options if old.get(name, new[name]) != new[name]]
    if changed:
        return f"the same data and schedule, other rounding: {'; '.join(changed)}"
    if now["threads"] is None and not now["deterministic"]:
        return "the same data and schedule; --deterministic would give the same bits on a GPU too"
    return "the same bits as a run that never stopped"


def _changes(
    found: Checkpoint, config: TrainConfig, identity: dict[str, Any], *, but_allowed: bool = True
) -> list[str]:
    """What changes the mathematics; but_allowed: but for what allow_changes names."""
    names = set(config.checkpoint.allow_changes) if but_allowed else set()
    changes = config_differences(config, found.state["config"], names)
    if found.state["fingerprint"] != identity["fingerprint"] and "data" not in names:
        changes.append("data: the training data, the tokenizer or the code that reads them")
    return changes


def _accept(found: Checkpoint, config: TrainConfig, identity: dict[str, Any], sampler: Sampler) -> None:
    """Rank 0 only. Raises InputError when options, data or order are not those of the checkpoint."""
    if changes := _changes(found, config, identity):
        raise InputError(
            f"{config.run_dir} was trained with other options: {'; '.join(changes)}."
            " Choose another run_dir, or name the options in --checkpoint.allow_changes."
        )
    if not _changes(found, config, identity, but_allowed=False):
        _require_order(found, sampler)


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

"""Choose and validate the checkpoint to resume from, and state what the resumed run guarantees."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from plainloop.data.samplers import Sampler, order_digest
from plainloop.data.store import Store
from plainloop.trainer.checkpoint import folder as checkpoints
from plainloop.trainer.checkpoint.folder import Checkpoint
from plainloop.trainer.config.options import TrainConfig
from plainloop.trainer.config.parse import flatten, to_yaml
from plainloop.trainer.config.validate import config_differences
from plainloop.trainer.distributed.device import what_affects_rounding
from plainloop.trainer.distributed.world import World, broadcast_json
from plainloop.trainer.errors import InputError
from plainloop.trainer.run_folder.base_model import require_base
from plainloop.trainer.run_folder.files import sweep, write_atomically
from plainloop.trainer.run_folder.log import Log

PARALLEL = ("parallel.mode", "parallel.shard_size", "parallel.gather_dtype")


def find_checkpoint(run_dir: Path, world: World, log: Log) -> Checkpoint | None:
    """All ranks. Rank 0 finds the newest good checkpoint of this run and broadcasts it. Raises InputError."""
    answer: dict[str, Any] = {}
    if world.is_main:
        try:
            folder = run_dir / "checkpoints"
            sweep(folder)
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
    found: Checkpoint | None, config: TrainConfig, metadata: dict[str, Any], sampler: Sampler, world: World
) -> None:
    """All ranks. Raise InputError if resuming from this checkpoint would change the mathematics. Otherwise
    rank 0 writes config.yaml to the run folder. metadata: the result of `run_metadata`.
    """
    fault = None
    if world.is_main:
        try:
            if found is not None:
                _accept(found, config, metadata, sampler)
            write_atomically(Path(config.run_dir) / "config.yaml", to_yaml(config))
        except InputError as error:
            fault = str(error)
        except OSError as error:
            fault = f"{error.filename or config.run_dir}: {error.strerror or error}."
    if fault := broadcast_json(fault):
        raise InputError(fault)
    if found is not None and _changes(found, config, metadata):
        found.state.update(order="", order_since=found.state["step"])  # a different run from here on


def run_metadata(config: TrainConfig, world: World, data: Store, max_tokens: int) -> dict[str, Any]:
    """All ranks. What checkpoints record of the run: options, data, and what affects rounding."""
    return {
        "config": asdict(config),
        "fingerprint": {"data": data.name},
        "counts": dict(data.meta["counts"]),
        "environment": {
            "tokens_per_device": max_tokens,
            **what_affects_rounding(world, tf32=config.tf32, deterministic=config.deterministic),
        },
    }


def guarantee(found: Checkpoint, config: TrainConfig, metadata: dict[str, Any]) -> str:
    """Return one line: what is guaranteed for a run resumed from this checkpoint."""
    allowed = _changes(found, config, metadata)
    if allowed:
        return f"weights and optimizer state only; allowed changes: {'; '.join(allowed)}"
    before, now = found.state["environment"], metadata["environment"]
    # Values that an older version did not record count as unchanged.
    changed = [
        f"{name} {before[name]} -> {now[name]}" for name in now if now[name] != before.get(name, now[name])
    ]
    old, new = (flatten(c) for c in (found.state["config"], asdict(config)))
    options = ("model.compile", "model.activation_checkpointing", "data.num_widths", *PARALLEL)
    changed += [name for name in options if old.get(name, new[name]) != new[name]]
    if found.state["fingerprint"] is None:
        return (
            "the same rows in the same order; an earlier version wrote this, so their content is not compared"
        )
    if changed:
        return f"the same data and schedule, different rounding: {'; '.join(changed)}"
    if now["threads"] is None and not now["deterministic"]:
        return "the same data and schedule; on a GPU, --deterministic true gives the same bits"
    hooks = "; hooks of your own are created anew" if config.hooks else ""
    return f"the same bits as a run that never stopped{hooks}"


def _changes(
    found: Checkpoint, config: TrainConfig, metadata: dict[str, Any], allowed: Collection[str] = ()
) -> list[str]:
    """List the changes that affect the mathematics, except those that are allowed."""
    changes = config_differences(config, found.state["config"], set(allowed))
    unknown = found.state["fingerprint"] is None  # an older format; the data order is still compared
    if found.state["fingerprint"] != metadata["fingerprint"] and not unknown and "data" not in allowed:
        changes.append("data: the training data, the tokenizer, or the code that reads them changed")
    return changes


def _accept(found: Checkpoint, config: TrainConfig, metadata: dict[str, Any], sampler: Sampler) -> None:
    """Rank 0 only. Raise InputError if options, data or data order differ from the checkpoint."""
    if changes := _changes(found, config, metadata, config.checkpoint.allow_changes):
        raise InputError(
            f"{config.run_dir} was trained with different options: {'; '.join(changes)}."
            " Choose another run_dir, or list the options in --checkpoint.allow_changes."
        )
    if (before := flatten(found.state["config"]).get("optim.name", "adamw")) != config.optim.name:
        raise InputError(
            f"{found.path}: has the state of {before}, with which {config.optim.name} can't go on; choose"
            " another run_dir."
        )
    if bool(config.peft.rank) != ("base" in found.state):
        raise InputError(
            f"{found.path}: a run with adapters can't go on without them, nor the other way round; choose"
            " another run_dir."
        )
    if config.peft.rank:
        require_base(found.state["base"], config.model.path)
    if not _changes(found, config, metadata):
        require_order(found, sampler)


def require_order(found: Checkpoint, sampler: Sampler) -> None:
    """Check that the sampler still gives the same rows for the completed steps. O(steps), 3 us per step."""
    order = ""
    for step in range(found.state["order_since"], found.state["step"]):
        order = order_digest(order, sampler.batch(step))
    if order != found.state["order"]:
        before, now = found.state["environment"]["numpy"], np.__version__
        raise InputError(
            f"{found.path}: its {found.state['step']} steps were trained on different rows than the same"
            f" seed gives now (numpy {before} -> {now}, or a changed sampler): go back to that version,"
            " or choose another run_dir."
        )

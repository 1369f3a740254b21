"""Find a trained model's folder, and the config to use it with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from plainloop.trainer.config.options import TextConfig, TrainConfig
from plainloop.trainer.config.parse import from_dict
from plainloop.trainer.config.trained_options import ScoreConfig, ScoreTextConfig
from plainloop.trainer.errors import InputError
from plainloop.trainer.trained.calibration_file import Calibration, read_calibration

# Options of evaluate that only some tasks use, and what train calls them.
TASK_OPTION_OF = {
    "columns": "data.columns",
    "ambiguous": "data.ambiguous",
    "metric": "evaluation.metric",
    "language": "evaluation.language",
    "max_length": "data.max_length",
    "stride": "data.stride",
    "text": "text",
    "rouge_bootstrap": "text",
    "max_answer_length": "evaluation.max_answer_length",
    "null_threshold": "evaluation.null_threshold",
    "num_best": "evaluation.num_best",
}


def checkpoint_path(path: str) -> str:
    """Resolve a run folder to its best, or else newest good, checkpoint. Return any other path unchanged."""
    from plainloop.trainer.checkpoint.folder import PREFIX, verify

    folder = Path(path)
    if (folder / "best").exists():
        for _ in range(3):
            best = (folder / "best").resolve()
            if not (fault := verify(best)):
                return str(best)
            if (folder / "best").resolve() == best:  # else a running job has replaced it meanwhile
                break
        raise InputError(f"{best}: this checkpoint is damaged: {fault}; choose another one with --model.")
    if not (folder / "checkpoints").is_dir():
        return path
    for candidate in sorted((folder / "checkpoints").glob(f"{PREFIX}*"), reverse=True):
        if verify(candidate) is None:
            return str(candidate)
    raise InputError(f"{path}: this run folder has no good checkpoint.")


def trained_with(path: str) -> dict[str, Any]:
    """Return the training config of a plainloop checkpoint; {} for other folders."""
    try:
        state = json.loads((Path(path) / "state.json").read_text(encoding="utf-8"))
        return dict(state["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def as_trained(path: str, config: ScoreConfig) -> tuple[TrainConfig, Calibration | None]:
    """The config to evaluate the model with: as it was trained, unless `config` says otherwise. And what
    `plainloop calibrate` fitted, if --null_threshold asks for it.

    Raises InputError for a task outside this package that the user has not named: its code would be run, and
    anybody may have written the checkpoint.
    """
    from plainloop.models.load import load_config
    from plainloop.trainer.tasks.find import find_task

    trained = trained_with(path)
    recorded = trained.get("task") or ("text" if load_config(path).is_encoder_decoder else "span")
    if ":" in recorded and config.task is None:
        raise InputError(f"{path}: was trained with a task of your own; name it: --task {recorded}.")
    base = from_dict(TrainConfig, trained)
    chosen = {"max_length": config.max_length, "stride": config.stride}
    calibrated = config.null_threshold == "calibrated"
    run = replace(
        base,
        task=config.task or recorded,
        model=replace(
            base.model, path=path, compile=False, activation_checkpointing=False, attention=None
        ),
        data=replace(
            base.data, train=None, dev=None, limit=None, cache_dir=config.cache_dir,
            columns=config.columns, ambiguous=config.ambiguous,
            **{name: value for name, value in chosen.items() if value is not None},
        ),
        text=merged(trained.get("text", {}), config.text),
        evaluation=replace(
            base.evaluation, max_answer_length=config.max_answer_length,
            null_threshold=0.0 if calibrated else float(config.null_threshold), num_best=config.num_best,
            metric=config.metric, language=config.language,
        ),
    )  # fmt: skip
    if not calibrated or "evaluation.null_threshold" not in find_task(run.task).uses:
        return run, None
    fitted = read_calibration(path, run)
    return replace(run, evaluation=replace(run.evaluation, null_threshold=fitted.null_threshold)), fitted


def check_options(task: str, uses: Collection[str], config: ScoreConfig) -> None:
    """Raise InputError for options that this task would silently ignore."""
    default = ScoreConfig()
    given = [
        f"--{name}"
        for name, option in TASK_OPTION_OF.items()
        if option not in uses and getattr(config, name) != getattr(default, name)
    ]
    if given:
        raise InputError(f"{', '.join(given)}: no effect with task {task}; leave it out.")


def merged(trained: dict[str, Any], given: ScoreTextConfig) -> TextConfig:
    """Return the text options that a run was trained with, overridden by those given."""
    known = {field.name for field in dataclasses.fields(TextConfig)}
    chosen = {name: value for name, value in dataclasses.asdict(given).items() if value is not None}
    return TextConfig(**{name: value for name, value in trained.items() if name in known} | chosen)

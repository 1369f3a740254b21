"""`plainloop evaluate`: the official figures of a checkpoint, or of a predictions file, and no training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plainloop.data.squad import read_json, read_squad
from plainloop.data.types import InputError
from plainloop.trainer.config import DataConfig, EvaluationConfig, ModelConfig, ScoreConfig
from plainloop.trainer.metrics import squad_scores


def score(config: ScoreConfig) -> dict[str, float] | None:
    """All ranks. Metrics on rank 0, None elsewhere. Raises InputError."""
    if not config.data or bool(config.model) == bool(config.predictions):
        raise InputError("evaluate wants --data FILE, and either --model FOLDER or --predictions FILE.")
    if config.predictions:
        return score_predictions(config)
    if config.null_odds or config.strict:
        raise InputError("--null_odds and --strict go with --predictions; with --model they have no effect.")
    return score_model(config)


def score_predictions(config: ScoreConfig) -> dict[str, float]:
    """A file {id: text} against the data; a missing id counts as an empty prediction, with a warning."""
    if config.out_dir:
        raise InputError("--out_dir goes with --model; the figures of --predictions are printed.")
    examples = read_squad(str(config.data))
    predictions = _read_map(str(config.predictions), str, "text")
    ids = {example.id for example in examples}
    missing, unknown = ids - set(predictions), set(predictions) - ids
    if missing and config.strict:
        raise InputError(
            f"{config.predictions}: {len(missing)} ids have no prediction, first {sorted(missing)[0]}."
        )
    if missing:
        _warn(f"{len(missing)} of {len(ids)} questions have no prediction; they count as unanswerable")
    if unknown:
        _warn(f"{len(unknown)} predictions belong to no question of {config.data}; they are left out")
    odds = _read_map(config.null_odds, (int, float), "number") if config.null_odds else None
    return squad_scores(examples, predictions, score_diff=odds)


def score_model(config: ScoreConfig) -> dict[str, float] | None:
    """All ranks."""
    from plainloop.trainer.checkpoint import write_atomically
    from plainloop.trainer.distributed import process_group, world_from_env
    from plainloop.trainer.precision import check_precision
    from plainloop.trainer.tasks import SpanTask

    world = world_from_env(config.device)
    check_precision(config.precision, world.device)
    path = checkpoint_path(str(config.model))
    trained = trained_with(path)
    data = DataConfig(
        max_length=config.max_length or trained.get("max_length", 384),
        stride=trained.get("stride", 128) if config.stride is None else config.stride,
        cache_dir=config.cache_dir,
    )
    if config.out_dir and world.is_main:
        try:  # found now, not after the evaluation
            Path(config.out_dir).mkdir(parents=True, exist_ok=True)
            write_atomically(Path(config.out_dir) / ".tmp-probe", "")
            (Path(config.out_dir) / ".tmp-probe").unlink()
        except OSError as error:
            raise InputError(f"--out_dir {config.out_dir}: {error.strerror or error}.") from None
    task = SpanTask(ModelConfig(path=path), data, world)
    windows = task.prepare(str(config.data))
    model = task.load_model(path, new_head=False).to(world.device)
    evaluation = EvaluationConfig(
        max_answer_length=config.max_answer_length,
        null_threshold=config.null_threshold,
        num_best=config.num_best,
    )
    with process_group(world, timeout_s=config.timeout_s):
        metrics = task.evaluate(
            model, windows, str(config.data),
            precision=config.precision, tokens=config.tokens_per_device, config=evaluation,
            folder=Path(config.out_dir) if config.out_dir else None,
        )  # fmt: skip
    return metrics if world.is_main else None


def checkpoint_path(path: str) -> str:
    """A run folder stands for its best checkpoint, or the newest good one; anything else for itself."""
    from plainloop.trainer.checkpoint import PREFIX, verify

    folder = Path(path)
    if (folder / "best").exists():
        best = (folder / "best").resolve()
        if fault := verify(best):
            raise InputError(f"{best}: this checkpoint is damaged: {fault}; name another one with --model.")
        return str(best)
    if not (folder / "checkpoints").is_dir():
        return path
    for candidate in sorted((folder / "checkpoints").glob(f"{PREFIX}*"), reverse=True):
        if verify(candidate) is None:
            return str(candidate)
    raise InputError(f"{path}: this run folder has no good checkpoint.")


def trained_with(path: str) -> dict[str, Any]:
    """The data options of one of our checkpoints; {} for other folders."""
    try:
        state = json.loads((Path(path) / "state.json").read_text(encoding="utf-8"))
        return dict(state["config"]["data"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _read_map(path: str, kind: Any, what: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file.")
    content = read_json(Path(path))
    if not isinstance(content, dict) or not all(isinstance(value, kind) for value in content.values()):
        raise InputError(f"{path}: must be a JSON object {{id: {what}}}.")
    return content


def _warn(text: str) -> None:
    import sys

    print(f"warning: {text}", file=sys.stderr)


def print_metrics(metrics: dict[str, float]) -> None:
    """As the official script does: JSON on standard output."""
    print(json.dumps(metrics, indent=2))

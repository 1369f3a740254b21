"""`plainloop evaluate`: the official figures of a checkpoint, or of a predictions file, and no training."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from plainloop.data.causalqa import TextOptions, data_files, is_squad, read_text
from plainloop.data.squad import read_json, read_squad
from plainloop.data.types import InputError
from plainloop.trainer.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ScoreConfig,
    ScoreTextConfig,
    TextConfig,
)
from plainloop.trainer.metrics import causalqa_scores, squad_scores


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
    """A file against the data. SQuAD: {id: text}; a missing id counts as empty, with a warning."""
    if config.out_dir:
        raise InputError("--out_dir goes with --model; the figures of --predictions are printed.")
    files = data_files(config.data or "", "valid", text_options(config.text))
    if not is_squad(files[0]):
        return score_text_predictions(config, files)
    if len(files) > 1 or config.rouge_bootstrap:
        raise InputError("SQuAD wants one --data file, and --rouge_bootstrap is for CausalQA.")
    examples = read_squad(files[0])
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


def score_text_predictions(config: ScoreConfig, files: list[str]) -> dict[str, float]:
    """CausalQA: a list of texts in row order, an object that holds one as `predictions`, or {id: text}."""
    if config.null_odds:
        raise InputError("--null_odds is for SQuAD; CausalQA has no unanswerable questions.")
    examples = read_text(files, text_options(config.text))
    path = Path(str(config.predictions))
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    content = read_json(path)
    if isinstance(content, dict) and isinstance(content.get("predictions"), list):
        content = content["predictions"]
    if isinstance(content, dict):
        missing = [e.id for e in examples if e.id not in content]
        if missing:
            raise InputError(f"{path}: {len(missing)} ids have no prediction, first {missing[0]!r}.")
        content = [content[e.id] for e in examples]
    if not isinstance(content, list) or not all(isinstance(text, str) for text in content):
        raise InputError(f"{path}: must be a JSON list of texts, or an object {{id: text}}.")
    if len(content) != len(examples):
        raise InputError(f"{path}: has {len(content)} predictions, {', '.join(files)} {len(examples)} rows.")
    return causalqa_scores(content, [e.references for e in examples], bootstrap=config.rouge_bootstrap)


def text_options(given: ScoreTextConfig) -> TextOptions:
    """What of the config the readers are told."""
    text = merged({}, given)
    return TextOptions(**{f.name: getattr(text, f.name) for f in dataclasses.fields(TextOptions)})


def score_model(config: ScoreConfig) -> dict[str, float] | None:
    """All ranks."""
    from plainloop.models.load import load_config, overflows_in_fp16
    from plainloop.trainer.checkpoint import write_atomically
    from plainloop.trainer.device import set_up_device
    from plainloop.trainer.distributed import process_group, world_from_env
    from plainloop.trainer.precision import resolve_precision, slow_precision
    from plainloop.trainer.tasks import make_task

    world = world_from_env(config.device)
    path = checkpoint_path(str(config.model))
    trained = trained_with(path)
    kind = trained.get("task") or ("text" if load_config(path).is_encoder_decoder else "span")
    windows = trained.get("data", {})
    data = DataConfig(
        max_length=config.max_length or windows.get("max_length", 384),
        stride=windows.get("stride", 128) if config.stride is None else config.stride,
        cache_dir=config.cache_dir,
    )
    text = merged(trained.get("text", {}), config.text)
    check_options(kind, config)
    if config.out_dir and world.is_main:
        try:  # found now, not after the evaluation
            Path(config.out_dir).mkdir(parents=True, exist_ok=True)
            write_atomically(Path(config.out_dir) / ".tmp-probe", "")
            (Path(config.out_dir) / ".tmp-probe").unlink()
        except OSError as error:
            raise InputError(f"--out_dir {config.out_dir}: {error.strerror or error}.") from None
    task = make_task(kind, ModelConfig(path=path), data, text, world)
    rows = task.prepare("dev", config.data or "")
    if config.rouge_bootstrap and "rougeL_f1" not in task.metric_names():
        raise InputError("--rouge_bootstrap is for CausalQA; this data is SQuAD's.")
    evaluation = EvaluationConfig(
        max_answer_length=config.max_answer_length,
        null_threshold=config.null_threshold,
        num_best=config.num_best,
    )
    with process_group(world, timeout_s=config.timeout_s):
        set_up_device(world, tf32=config.tf32, deterministic=False)
        precision, why = resolve_precision(
            config.precision, world.device, overflows_in_fp16=overflows_in_fp16(path)
        )
        if world.is_main:
            lines = [f"precision {precision}: {why}", slow_precision(precision, world.device)]
            for line in filter(None, [*lines, *task.report("dev", rows, precision)]):
                print(line, file=sys.stderr)
        model = task.load_model(path, new_head=False).to(world.device)
        metrics = task.evaluate(
            model, rows, name=path, precision=precision, tokens=config.tokens_per_device,
            config=evaluation, folder=Path(config.out_dir) if config.out_dir else None,
            should_stop=lambda: False, training=False, bootstrap=config.rouge_bootstrap,
        )  # fmt: skip
    return metrics if world.is_main else None


def checkpoint_path(path: str) -> str:
    """A run folder stands for its best checkpoint, or the newest good one; anything else for itself."""
    from plainloop.trainer.checkpoint import PREFIX, verify

    folder = Path(path)
    if (folder / "best").exists():
        for _ in range(3):
            best = (folder / "best").resolve()
            if not (fault := verify(best)):
                return str(best)
            if (folder / "best").resolve() == best:  # else a run in progress has found a better one meanwhile
                break
        raise InputError(f"{best}: this checkpoint is damaged: {fault}; name another one with --model.")
    if not (folder / "checkpoints").is_dir():
        return path
    for candidate in sorted((folder / "checkpoints").glob(f"{PREFIX}*"), reverse=True):
        if verify(candidate) is None:
            return str(candidate)
    raise InputError(f"{path}: this run folder has no good checkpoint.")


def trained_with(path: str) -> dict[str, Any]:
    """The config of one of our checkpoints; {} for other folders."""
    try:
        state = json.loads((Path(path) / "state.json").read_text(encoding="utf-8"))
        return dict(state["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def check_options(kind: str, config: ScoreConfig) -> None:
    """Raises InputError for options that this kind of model would ignore in silence."""
    default = ScoreConfig()
    span_only = ("max_length", "stride", "max_answer_length", "null_threshold", "num_best")
    names = span_only if kind == "text" else ("text", "rouge_bootstrap")
    given = [f"--{name}" for name in names if getattr(config, name) != getattr(default, name)]
    if given:
        raise InputError(f"{', '.join(given)}: without effect on a {kind} model; leave it out.")


def merged(trained: dict[str, Any], given: ScoreTextConfig) -> TextConfig:
    """The text options that a run was trained with, unless others are given."""
    known = {field.name for field in dataclasses.fields(TextConfig)}
    chosen = {name: value for name, value in dataclasses.asdict(given).items() if value is not None}
    return TextConfig(**{name: value for name, value in trained.items() if name in known} | chosen)


def _read_map(path: str, kind: Any, what: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file.")
    content = read_json(Path(path))
    if not isinstance(content, dict) or not all(isinstance(value, kind) for value in content.values()):
        raise InputError(f"{path}: must be a JSON object {{id: {what}}}.")
    return content


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def print_metrics(metrics: dict[str, float]) -> None:
    """As the official script does: JSON on standard output."""
    print(json.dumps(metrics, indent=2))

"""`plainloop evaluate`: score a checkpoint or a predictions file with the official metrics."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from plainloop.data.readers.causalqa import TextOptions, data_files, is_causalqa, read_text
from plainloop.data.readers.examples import Examples, ReadOptions, require_use
from plainloop.data.readers.files import read_json
from plainloop.trainer.config.command_options import ScoreConfig, ScoreTextConfig
from plainloop.trainer.config.options import TextConfig, TrainConfig
from plainloop.trainer.config.parse import flatten, from_dict
from plainloop.trainer.errors import InputError
from plainloop.trainer.run_folder.files import write_atomically
from plainloop.trainer.tasks.metrics import causalqa_scores, squad_scores
from plainloop.trainer.tasks.normalize import metric_rules

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
# Options that have an effect on the scores of a predictions file.
USED_FOR_SQUAD = {"columns", "null_odds", "na_prob_thresh", "strict", "metric", "language"}
USED_FOR_CAUSALQA = {"text.dataset", "text.split", "rouge_bootstrap"}


def score(config: ScoreConfig) -> dict[str, float] | None:
    """All ranks. Metrics on rank 0, None elsewhere. Raises InputError."""
    if not config.data or bool(config.model) == bool(config.predictions):
        raise InputError("evaluate needs --data FILE, and either --model FOLDER or --predictions FILE.")
    if config.language != "en" and config.metric == "squad":
        raise InputError("--language: no effect with --metric squad; leave it out, or choose --metric mlqa.")
    if config.na_prob_thresh != 1.0 and not config.null_odds:
        raise InputError("--na_prob_thresh: no effect without --null_odds FILE.")
    if config.predictions:
        return score_predictions(config)
    if config.null_odds or config.strict:
        raise InputError("--null_odds and --strict need --predictions; they have no effect with --model.")
    return score_model(config)


def refuse_unused(config: ScoreConfig, used: Collection[str], why: str) -> None:
    """Raise InputError for options that are set but have no effect."""
    values, default = (flatten(dataclasses.asdict(c)) for c in (config, ScoreConfig()))
    if given := [f"--{name}" for name in values if name not in used and values[name] != default[name]]:
        raise InputError(f"{', '.join(given)}: no effect with {why}; leave it out.")


def score_predictions(config: ScoreConfig) -> dict[str, float]:
    """Score a predictions file. SQuAD: {id: text}; a missing id counts as empty, with a warning."""
    files = data_files(config.data or "", "valid", text_options(config.text))
    causalqa = is_causalqa(files[0])
    used = USED_FOR_CAUSALQA if causalqa else USED_FOR_SQUAD
    kind = "--predictions for CausalQA" if causalqa else "--predictions"
    refuse_unused(config, {"data", "predictions", *used}, kind)
    if causalqa:
        return score_text_predictions(config, files)
    require_use(config.columns, files, "--columns")
    read = Examples(files, ReadOptions(config.columns, locate=False))
    examples = list(read)
    for note in read.notes:
        print(note, file=sys.stderr)
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
        _warn(f"{len(unknown)} predictions match no question in {config.data}; they are ignored")
    odds = _read_map(config.null_odds, (int, float), "number") if config.null_odds else None
    if odds is not None and (without := ids - set(odds)):
        raise InputError(f"{config.null_odds}: {len(without)} ids have no score, first {sorted(without)[0]}.")
    rules = metric_rules(config.metric, config.language)
    threshold = config.na_prob_thresh
    return squad_scores(examples, predictions, score_diff=odds, threshold=threshold, rules=rules)


def score_text_predictions(config: ScoreConfig, files: list[str]) -> dict[str, float]:
    """Score CausalQA predictions: a list in row order, an object with one as `predictions`, or {id: text}."""
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
        raise InputError(
            f"{path}: has {len(content)} predictions, but {', '.join(files)} has {len(examples)} rows."
        )
    return causalqa_scores(content, [e.references for e in examples], bootstrap=config.rouge_bootstrap)


def text_options(given: ScoreTextConfig) -> TextOptions:
    """Return the text options that the data readers need."""
    text = merged({}, given)
    return TextOptions(**{f.name: getattr(text, f.name) for f in dataclasses.fields(TextOptions)})


def score_model(config: ScoreConfig) -> dict[str, float] | None:
    """All ranks. Evaluate a model. Metrics on rank 0, None elsewhere."""
    from plainloop.models.load import overflows_in_fp16
    from plainloop.trainer.distributed.device import set_up_device
    from plainloop.trainer.distributed.world import process_group, world_from_env
    from plainloop.trainer.precision import resolve_precision, warnings
    from plainloop.trainer.tasks import base as tasks
    from plainloop.trainer.tasks.evaluation import EvaluationSettings
    from plainloop.trainer.tasks.find import find_task

    world, path = world_from_env(config.device), checkpoint_path(str(config.model))
    run = as_trained(path, config)
    task_type = find_task(run.task)
    check_options(run.task, task_type.uses, config)
    if config.out_dir and world.is_main:
        require_writable(Path(config.out_dir))
    task = task_type(run)
    if config.columns:
        require_use(config.columns, task.files(config.data or "", "dev"), "--columns")
    data = tasks.load_split(task, "dev", config.data or "", run, world)
    if config.rouge_bootstrap and "rougeL_f1" not in task.metrics(data.store):
        raise InputError("--rouge_bootstrap is for CausalQA; this is SQuAD data.")
    with process_group(world, timeout_s=config.timeout_s):
        set_up_device(world, tf32=config.tf32, deterministic=False)
        overflows = overflows_in_fp16(path)
        precision, why = resolve_precision(config.precision, world.device, overflows_in_fp16=overflows)
        if world.is_main:
            notes = warnings(precision, world.device, overflows_in_fp16=overflows)
            for line in (f"precision {precision}: {why}", *notes, *data.store.meta["report"]):
                print(line, file=sys.stderr)
        settings = EvaluationSettings(
            world,
            precision,
            config.tokens_per_device,
            run.evaluation,
            name=path,
            folder=Path(config.out_dir) if config.out_dir else None,
            bootstrap=config.rouge_bootstrap,
        )
        model = tasks.load_model(task, path, run, world, new_head=False)
        metrics = tasks.evaluate(task, model, data, settings)
    return metrics if world.is_main else None


def as_trained(path: str, config: ScoreConfig) -> TrainConfig:
    """The config to evaluate the model with: as it was trained, unless `config` says otherwise.

    Raises InputError for a task outside this package that the user has not named: its code would be run, and
    anybody may have written the checkpoint.
    """
    from plainloop.models.load import load_config

    trained = trained_with(path)
    recorded = trained.get("task") or ("text" if load_config(path).is_encoder_decoder else "span")
    if ":" in recorded and config.task is None:
        raise InputError(f"{path}: was trained with a task of your own; name it: --task {recorded}.")
    base = from_dict(TrainConfig, trained)
    chosen = {"max_length": config.max_length, "stride": config.stride}
    return replace(
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
            null_threshold=config.null_threshold, num_best=config.num_best,
            metric=config.metric, language=config.language,
        ),
    )  # fmt: skip


def require_writable(folder: Path) -> None:
    """Raise InputError now, not after the evaluation."""
    probe = folder / ".tmp-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(probe, "")
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out_dir {folder}: {error.strerror or error}.") from None


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
    """Print JSON on standard output, like the official script."""
    print(json.dumps(metrics, indent=2))

"""`plainloop evaluate`: score a checkpoint or a predictions file with the official metrics."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from plainloop.data.errors import InputError
from plainloop.data.readers.causalqa import TextOptions, data_files, is_causalqa, read_text
from plainloop.data.readers.examples import Examples, ReadOptions, require_use
from plainloop.data.readers.files import read_json
from plainloop.trainer.config.parse import flatten
from plainloop.trainer.config.trained_options import ScoreConfig, ScoreTextConfig
from plainloop.trainer.run_folder.files import write_atomically
from plainloop.trainer.tasks.metrics import causalqa_scores, squad_scores
from plainloop.trainer.tasks.normalize import metric_rules
from plainloop.trainer.trained.calibration_file import context_digests
from plainloop.trainer.trained.model_folder import (
    as_trained,
    check_options,
    checkpoint_path,
    forward_precision,
    load_model,
    merged,
    trained_with,
)
from plainloop.trainer.trained.provenance import provenance

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
    scores = squad_scores(examples, predictions, score_diff=odds, threshold=threshold, rules=rules)
    if tuned := tuned_figures(scores):
        _note(tuned)
    return scores


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
    from plainloop.trainer.distributed.device import set_up_device
    from plainloop.trainer.distributed.world import process_group, world_from_env
    from plainloop.trainer.tasks import base as tasks
    from plainloop.trainer.tasks.evaluation import EvaluationSettings
    from plainloop.trainer.tasks.find import find_task

    world, path = world_from_env(config.device), checkpoint_path(str(config.model))
    run, fitted = as_trained(path, config)
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
        precision, why = forward_precision(path, config.precision, world.device)
        if world.is_main:
            for line in (*why, *data.store.meta["report"]):
                print(line, file=sys.stderr)
        settings = EvaluationSettings(
            world,
            precision,
            config.tokens_per_device,
            run.evaluation,
            name=path,
            folder=Path(config.out_dir) if config.out_dir else None,
            bootstrap=config.rouge_bootstrap,
            temperature=fitted.temperature if fitted else None,
            lockstep=config.parallel == "fsdp",
        )
        model = load_model(task, path, run, world)
        metrics = tasks.evaluate(task, model, data, settings)
    if not world.is_main:
        return None
    assert metrics is not None  # nobody interrupts this evaluation
    origin = {
        **provenance("evaluate", config, path, data.files),
        "null_threshold": run.evaluation.null_threshold,
        "options": flatten(trained_with(path)),
    }
    here = set(context_digests(e.context for e in data.examples)) if fitted else set()
    if tuned := tuned_figures(metrics, len(here & fitted.contexts) if fitted else 0, len(here)):
        _note(tuned)
    if config.out_dir:
        write_provenance(Path(config.out_dir), {**origin, "tuned_on_this_data": tuned})
    return metrics


def tuned_figures(metrics: Collection[str], used: int = 0, contexts: int = 0) -> str:
    """Which of the figures were tuned on the data that they are measured on; "" for none. used: how many of
    its contexts the calibration was fitted on.
    """
    if used:
        return f"all figures: {used} of the {contexts} contexts were used to fit the threshold"
    return ", ".join(name for name in metrics if name.startswith("best_"))


def _note(tuned: str) -> None:
    print(f"note: tuned on this data, so too good for other data: {tuned}", file=sys.stderr)


def write_provenance(folder: Path, content: dict[str, Any]) -> None:
    """An I/O error is only a warning, since the scores are known."""
    try:
        write_atomically(folder / "provenance.json", json.dumps(content, indent=1, ensure_ascii=False))
    except OSError as error:
        _warn(f"{folder}: provenance.json not written: {error.strerror}")


def require_writable(folder: Path) -> None:
    """Raise InputError now, not after the evaluation."""
    probe = folder / ".tmp-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(probe, "")
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out_dir {folder}: {error.strerror or error}.") from None


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

"""Find a trained model's folder, and the config to use it with."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from plainloop.data.errors import InputError
from plainloop.trainer.config.options import ParallelConfig, TextConfig, TrainConfig
from plainloop.trainer.config.parse import from_dict
from plainloop.trainer.config.trained_options import ScoreConfig, ScoreTextConfig
from plainloop.trainer.run_folder.base_model import require_base
from plainloop.trainer.run_folder.files import fault_of
from plainloop.trainer.trained.calibration_file import Calibration, read_calibration

OPTIONS_FILE = "plainloop.json"  # in an exported folder
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
    """Resolve a run folder to its best, or else newest good, checkpoint. Return any other path unchanged.

    Raises InputError if the checkpoint or the exported folder is damaged.
    """
    from plainloop.trainer.checkpoint.folder import PREFIX, verify

    path = from_hub(path)
    folder = Path(path)
    if (folder / OPTIONS_FILE).is_file() and (fault := _fault_of_export(folder)):
        raise InputError(f"{path}: {fault}; export it again.")
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


def _fault_of_export(folder: Path) -> str | None:
    try:
        return fault_of(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json can't be read ({type(error).__name__})"


def from_hub(path: str) -> str:
    """The folder of an export that was pushed under this Hub name. Return any other name unchanged."""
    if Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        return path
    from huggingface_hub import hf_hub_download, snapshot_download

    from plainloop.models.load import is_local

    local = is_local(path)
    try:
        hf_hub_download(path, OPTIONS_FILE, local_files_only=local)
        return str(snapshot_download(path, local_files_only=local))
    except Exception:  # no such file, no network: then it is for transformers to load it, or to say why not
        return path


def forward_precision(path: str, wanted: str, device: Any) -> tuple[str, list[str]]:
    """The precision of the forward pass on this device, and lines that say why. Raises InputError."""
    from plainloop.models.load import overflows_in_fp16
    from plainloop.trainer.precision import resolve_precision, warnings

    if is_onnx(path):
        if wanted not in ("auto", "fp32"):
            raise InputError(f"--precision {wanted}: {path} is an ONNX model, which runs in fp32.")
        return "fp32", [f"precision fp32: {path} is an ONNX model"]
    overflows = overflows_in_fp16(path)
    precision, why = resolve_precision(wanted, device, overflows_in_fp16=overflows)
    return precision, [
        f"precision {precision}: {why}",
        *warnings(precision, device, overflows_in_fp16=overflows),
    ]


def is_onnx(path: str) -> bool:
    from plainloop.models.onnx_spans import ONNX_FILE

    return (Path(path) / ONNX_FILE).is_file()


def load_model(task: Any, path: str, run: TrainConfig, world: Any) -> Any:
    """The trained model on this rank's device, whole or its share of it. Raises InputError."""
    from plainloop.models.onnx_spans import OnnxSpanModel
    from plainloop.trainer.tasks import model as loading

    sharded = run.parallel.mode == "fsdp"
    if is_onnx(path):
        if sharded:
            raise InputError(f"--parallel fsdp: {path} is an ONNX model, which can't be sharded.")
        return OnnxSpanModel(path, world.device)
    return loading.load_model(task, path, run, world, new_head=False, sharded=sharded)


def trained_with(path: str) -> dict[str, Any]:
    """Return the training config of a checkpoint or an exported folder; {} for other folders."""
    return dict(recorded_in(path).get("config") or {})


def recorded_in(path: str) -> dict[str, Any]:
    """What a checkpoint (state.json) or an exported folder says about its run; {} for other folders."""
    for name in ("state.json", OPTIONS_FILE):
        with contextlib.suppress(OSError, ValueError, TypeError):
            return dict(json.loads((Path(path) / name).read_text(encoding="utf-8")))
    return {}


def trained_on_causalqa(path: str) -> bool:
    """Whether a text model was trained on CausalQA. Older checkpoints say so only by text.dataset."""
    recorded = recorded_in(path)
    counts = recorded.get("counts")
    if counts is not None:
        return not counts.get("squad")
    return ((recorded.get("config") or {}).get("text") or {}).get("dataset") is not None


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
    own_path = path
    if base.peft.rank:
        own_path = config.base or base.model.path
        require_base(recorded_in(path)["base"], own_path)
    elif config.base:
        raise InputError(f"--base: {path} has no adapters; leave it out.")
    chosen = {"max_length": config.max_length, "stride": config.stride}
    calibrated = config.null_threshold == "calibrated"
    run = replace(
        base,
        task=config.task or recorded,
        model=replace(
            base.model, path=own_path, compile=False, activation_checkpointing=False, attention=None,
        ),
        parallel=ParallelConfig(mode=config.parallel),
        peft=replace(base.peft, base_dtype="fp32"),
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

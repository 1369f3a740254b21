"""The model card of an export: what is known from the run. The rest is left to the user, and said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from plainloop.models.adapters import CONFIG_FILE
from plainloop.trainer.config.options import TrainConfig
from plainloop.trainer.config.parse import flatten, from_dict, plain
from plainloop.trainer.config.trained_options import ExportConfig
from plainloop.trainer.errors import InputError
from plainloop.trainer.run_folder.files import read_source, sha256
from plainloop.trainer.trained import calibration_file
from plainloop.trainer.trained.provenance import weights_of

TO_COMPLETE = "**To be completed by the author.**"
TUNED = ("best_exact", "best_f1")


def model_card(
    folder: Path, source: Path, trained: dict[str, Any], config: ExportConfig, verified: str
) -> str:
    """Markdown with a YAML header. folder: of the export; source: the checkpoint. Raises InputError for
    --scores of other weights.
    """
    run = from_dict(TrainConfig, trained)
    state = json.loads((source / "state.json").read_text(encoding="utf-8"))
    fetched = read_source(Path(run.model.path)) or {}
    on_hub = fetched.get("name") or (run.model.path if not Path(run.model.path).exists() else None)
    base = on_hub or Path(run.model.path).name
    adapted = (folder / CONFIG_FILE).is_file()
    use = 'plainloop predict --model FOLDER --question "..." --context page.txt'
    if adapted:
        use = f"# These are adapters: BASE is a folder with {base}\n{use} --base BASE"
    header = {
        "library_name": "onnx" if config.onnx else "peft" if adapted else "transformers",
        "pipeline_tag": "question-answering" if run.task == "span" else "text2text-generation",
        **({"base_model": on_hub} if on_hub else {}),
        "tags": ["plainloop", f"plainloop-{run.task}"],
    }
    sections = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}"
        "# license: to be chosen by the author; mind those of the base model and of the data\n---",
        f"# {folder_title(config)}\n\n{_what(run.task)}, fine-tuned from `{base}` with plainloop.",
        f"## Licence and intended use\n\n{TO_COMPLETE} Licence, languages, intended use, known limits.",
        f"## Use\n\n```bash\n{use}\n```",
        "## Training data\n\n" + _data(run, state),
        "## Recipe\n\nThe options that differ from the defaults; all are in `plainloop.json`.\n\n```yaml\n"
        + yaml.safe_dump(_recipe(trained), sort_keys=False, allow_unicode=True)
        + "```\n\n"
        + _environment(state),
        "## Figures\n\n" + "\n\n".join(_figures(source, run, state, config)),
    ]
    if verified:
        sections.append(f"## Check of this export\n\n{verified} (`--verify {config.verify}`).")
    return "\n\n".join(sections) + "\n"


def folder_title(config: ExportConfig) -> str:
    return Path(str(config.out)).name


def _what(task: str) -> str:
    if task == "span":
        return "A model for extractive question answering, which may also say that there is no answer"
    return "A question-answering model that writes its answer"


def _data(run: TrainConfig, state: dict[str, Any]) -> str:
    lines = []
    for split, paths in (("train", run.data.train), ("dev", run.data.dev)):
        for path in [paths] if isinstance(paths, str) else paths or ():
            if Path(path).is_file():
                digest = f"SHA-256 `{sha256(Path(path))}`, of the file as it was at the export"
            else:
                digest = "not a file of this machine any more, so without a digest"
            lines.append(f"- {split}: `{Path(path).name}`; {digest}")
    prepared = (state.get("fingerprint") or {}).get("data")
    lines.append(f"- the training data as tokenised (files, tokenizer, options): `{prepared}`")
    return "\n".join(lines)


def _recipe(trained: dict[str, Any]) -> dict[str, Any]:
    default = flatten(dataclasses.asdict(TrainConfig()))
    left_out = ("run_dir", "data.cache_dir", "data.train", "data.dev", "model.path")  # said above, or private
    values = flatten(trained)
    return {n: plain(v) for n, v in values.items() if n not in left_out and v != default.get(n, v)}


def _environment(state: dict[str, Any]) -> str:
    about = {name: value for name, value in state["environment"].items() if value not in (None, "", False)}
    return f"Step {state['step']}. " + ", ".join(f"{name} {value}" for name, value in about.items()) + "."


def _figures(source: Path, run: TrainConfig, state: dict[str, Any], config: ExportConfig) -> list[str]:
    found = []
    mine = [record for record in state["evaluations"] if record["step"] == state["step"]]
    if mine:
        name = Path(run.data.dev).name if isinstance(run.data.dev, str) else "data.dev"
        count, metric = len(state["evaluations"]), run.evaluation.best_metric
        chosen = f"The best of {count} evaluations by {metric} on this data"
        found.append(f"During training, on `{name}`. {chosen}.\n\n" + _table(mine[-1]))
    for scores in config.scores:
        found.append(_scores(Path(scores), weights_of(source)))
    if (source / calibration_file.NAME).is_file():
        content = json.loads((source / calibration_file.NAME).read_text(encoding="utf-8"))
        found.append(
            f"`{content['command']}`: threshold {content['null_threshold']:.4f}, temperature"
            f" {content['temperature']:.4f}, fitted on the other half of the data.\n\n"
            + _table(content["untouched_half"]["after"])
        )
    return found or [
        "None were measured. See `plainloop evaluate --out_dir` and `plainloop export --scores`."
    ]


def _scores(folder: Path, weights: dict[str, str]) -> str:
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        origin = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        data = ", ".join(
            f"`{Path(path).name}` (SHA-256 `{digest}`)" for path, digest in origin["data"].items()
        )
        command, used, tuned = origin["command"], origin["weights"], origin["tuned_on_this_data"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"--scores {folder}: not a folder of plainloop evaluate --model ... --out_dir ({error})."
        ) from None
    if used != weights:
        raise InputError(f"--scores {folder}: are of other weights than this checkpoint; evaluate it again.")
    all_tuned = tuned.startswith("all figures")
    note = f"\n\nTuned on this data: {tuned}." if all_tuned else ""
    return f"`{command}`, on {data}.{note}\n\n" + _table(metrics)


def _table(metrics: dict[str, Any]) -> str:
    rows = [
        f"| {name}{_mark(name)} | {value:.6g} |" for name, value in metrics.items() if _is_figure(name, value)
    ]
    return "\n".join(["| figure | value |", "| --- | --- |", *rows])


def _mark(name: str) -> str:
    return " (tuned on this data)" if name.startswith(TUNED) else ""


def _is_figure(name: str, value: Any) -> bool:
    return isinstance(value, (int, float)) and name not in ("step", "seconds")

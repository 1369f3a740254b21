"""What a run folder says of its training: options, curves, and how it went."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from plainloop.data.errors import InputError
from plainloop.trainer.config.parse import flatten
from plainloop.trainer.report.svg import PALETTE, pyplot, style_of
from plainloop.trainer.trained.summary import labels, read_options

TRAINING = {
    "loss": "training loss", "lr": "learning rate", "grad_norm": "gradient norm before clipping",
    "tokens_per_s": "tokens per second", "padding": "share of padding",
    "waiting": "share of time spent waiting for data",
}  # fmt: skip
# Not curves of quality: counts, times, and thresholds.
NOT_PLOTTED = ("total", "thresh", "seconds", "step", "kind")


@dataclass(frozen=True)
class Run:
    """A run folder. records: the lines of metrics.jsonl. label: what sets its group of seeds apart."""

    name: str
    folder: Path
    options: dict[str, Any]
    records: list[dict[str, Any]]
    status: dict[str, Any]
    state: dict[str, Any]
    label: str = ""

    def series(self, kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values; NaN and Inf, which are written as text, are gaps."""
        pairs = [(r["step"], _number(r[name])) for r in self.records if r["kind"] == kind and name in r]
        steps, values = np.array(pairs, float).reshape(-1, 2).T
        return steps, np.where(np.isfinite(values), values, np.nan)

    def marks(self) -> dict[str, list[int]]:
        """Steps at which the run was resumed, saved a checkpoint, or had skipped steps just before."""
        starts = [r["step"] for r in self.records if r["kind"] == "warm_up"]
        return {
            "resumed": [step for step in starts if step > 0],
            "saved": [r["step"] for r in self.records if r["kind"] == "save"],
            "skipped": [r["step"] for r in self.records if r["kind"] == "train" and r.get("skipped")],
        }


def read_runs(paths: Sequence[str], names: Sequence[str]) -> list[Run]:
    """Those of the paths that are run folders, each once; folders of evaluate --out_dir have no curves.
    names: what to call them. Raises InputError.
    """
    folders: dict[str, str] = {}
    for path, name in zip(paths, names, strict=True):
        if (Path(path) / "metrics.jsonl").is_file():
            folders.setdefault(path, name)
    options = {path: read_options(Path(path)) for path in folders}
    label_of = labels(options) if options else {}
    return [
        Run(
            name, Path(path), options[path], _records(Path(path) / "metrics.jsonl"),
            _json(Path(path) / "status.json"), _newest_state(Path(path)), label_of[path],
        )
        for path, name in folders.items()
    ]  # fmt: skip


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _records(file: Path) -> list[dict[str, Any]]:
    found = []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["kind"], record["step"] = str(record["kind"]), int(record["step"])
        except (ValueError, KeyError, TypeError):
            if number < len(lines):  # the last one may be cut off by a kill
                raise InputError(f"{file}: line {number} is not a record of a run.") from None
            continue
        found.append(record)
    return found


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _newest_state(folder: Path) -> dict[str, Any]:
    """state.json of the newest checkpoint: where the run was trained, and with what."""
    found = sorted((folder / "checkpoints").glob("step-*/state.json"))
    return _json(found[-1]) if found else {}


def training_figure(runs: Sequence[Run]) -> Any:
    """Six panels over the steps. One run: with resumes, saves and skipped steps marked."""
    plt = pyplot()
    figure, axes = plt.subplots(3, 2, figsize=(10, 8), layout="constrained")
    for axis, (name, title) in zip(axes.flat, TRAINING.items(), strict=True):
        _overlay(axis, runs, "train", name)
        axis.set_title(title)
        if len(runs) == 1:
            _mark(axis, runs[0])
        if name in ("padding", "waiting"):
            axis.set_ylim(bottom=0)
    axes[2][0].set_xlabel("step")
    axes[2][1].set_xlabel("step")
    _legend(figure)
    return figure


def _legend(figure: Any) -> None:
    """One for all panels: each name once."""
    found: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    if found:
        figure.legend(found.values(), found, loc="outside lower center", ncols=3)


def evaluation_figure(runs: Sequence[Run]) -> Any | None:
    """A panel for each figure of the evaluations; None if there was none."""
    names = dict.fromkeys(
        name
        for run in runs
        for record in run.records
        if record["kind"] == "evaluation"
        for name in record
        if not name.endswith(NOT_PLOTTED) and not name.startswith(("best_", "pr_"))
    )
    if not names:
        return None
    plt = pyplot()
    rows = (len(names) + 2) // 3
    figure, axes = plt.subplots(rows, 3, figsize=(10, 2.5 * rows), layout="constrained", squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        _overlay(axis, runs, "evaluation", name, marker="o")
        axis.set_title(name)
        axis.set_xlabel("step")
    for axis in axes.flat[len(names) :]:
        axis.remove()
    _legend(figure)
    return figure


def _overlay(axis: Any, runs: Sequence[Run], kind: str, name: str, **style: Any) -> None:
    """A line for each run; for groups of several seeds, their mean, and one standard deviation around it."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    style = {"markersize": 3, **style}
    for number, (label, group) in enumerate(groups.items()):
        colour, line = style_of(number)
        series = [run.series(kind, name) for run in group]
        common = sorted(set.intersection(*(set(steps) for steps, _ in series)))
        if len(group) == 1 or len(common) < 2:  # one run, or seeds that were logged at other steps
            for run, (steps, values) in zip(group, series, strict=True):
                title = run.name if len(runs) > 1 else None
                axis.plot(steps, values, color=colour, linestyle=line, label=title, **style)
            continue
        for steps, values in series:
            axis.plot(steps, values, color=colour, alpha=0.35, linewidth=0.7)
        every = np.array([[values[list(steps).index(s)] for s in common] for steps, values in series])
        mean, spread = every.mean(axis=0), every.std(axis=0, ddof=1)
        title = f"mean of {len(group)} seeds, one standard deviation" + f": {label}" * bool(label)
        axis.plot(common, mean, color=colour, linestyle=line, label=title, **style)
        axis.fill_between(common, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)


def _mark(axis: Any, run: Run) -> None:
    marks = run.marks()
    for name, colour, style in (("resumed", PALETTE[1], "--"), ("skipped", PALETTE[3], ":")):
        for i, step in enumerate(marks[name]):
            axis.axvline(step, color=colour, linestyle=style, linewidth=1, label=None if i else name)
    if marks["saved"]:
        low = axis.get_xaxis_transform()
        axis.plot(
            marks["saved"], [0.02] * len(marks["saved"]), "^", color=PALETTE[2], markersize=4, transform=low,
            label="saved", linestyle="none",
        )  # fmt: skip


PUBLISHED = re.compile(r"^# published: (?P<figures>.*); source: (?P<source>.*)$", re.MULTILINE)


def published(options: Mapping[str, Any]) -> tuple[dict[str, float], str] | None:
    """The published figures of the recipe that a run was trained by, and their source; None if it is none.

    A recipe of launch/recipes is recognised by its options: all that it sets are those of the run; of a model
    folder, its name.
    """
    for file in sorted((Path(__file__).parents[2] / "launch/recipes").glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        wanted = flatten(yaml.safe_load(text))
        if (found := PUBLISHED.search(text)) and all(_same(n, v, options.get(n)) for n, v in wanted.items()):
            pairs = (part.split() for part in found["figures"].split(","))
            return {name: float(value) for name, value in pairs}, f"{found['source']} (recipe {file.stem})"
    return None


def _same(name: str, wanted: Any, given: Any) -> bool:
    if name == "model.path":
        return Path(str(wanted)).name == Path(str(given)).name
    return name == "seed" or bool(wanted == given)

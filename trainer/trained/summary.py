"""`plainloop evaluate --summary RUN ...`: several runs side by side, with mean and standard deviation.

Runs that differ in more than the seed are grouped by what differs, the best group first.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import yaml

from plainloop.data.errors import InputError
from plainloop.trainer.config.options import TrainConfig
from plainloop.trainer.config.parse import flatten
from plainloop.trainer.config.validate import FREE_ON_RESUME
from plainloop.trainer.run_folder.status import read_status

NOT_METRICS = ("total", "thresh", "step")  # name suffixes: a mean of sizes or thresholds makes no sense
NOT_COMPARED = (FREE_ON_RESUME | {"seed", "precision"}) - {"evaluation", "data.train", "data.dev"}
Figures = dict[str, float]


def summary(paths: list[str]) -> str:
    """Return a table: one line per run, then mean and sample standard deviation (n - 1), for each group.

    Raises InputError for a path without metrics, and for runs with different sets of metrics.
    """
    if not paths:
        raise InputError("--summary needs run folders, or folders written by evaluate --out_dir.")
    found = {path: read_run_metrics(Path(path)) for path in paths}
    names = [name for name in next(iter(found.values())) if not name.endswith(NOT_METRICS)]
    for path, figures in found.items():
        if differing := set(names) ^ {name for name in figures if not name.endswith(NOT_METRICS)}:
            raise InputError(f"{path}: has other metrics than {paths[0]}: {', '.join(sorted(differing))}.")
    options = {path: read_options(Path(path)) for path in paths}
    groups: dict[str, list[str]] = {}
    for path, label in labels(options).items():
        groups.setdefault(label, []).append(path)
    metric = next(iter(options.values())).get("evaluation.best_metric", "f1")
    metric = metric if metric in names else names[0]

    def rank(label: str) -> float:
        mean = statistics.fmean(found[path][metric] for path in groups[label])
        return mean if metric.endswith("loss") else -mean

    titles = {path: path + note_on(Path(path)) for path in paths}
    width = max(map(len, [*titles.values(), "standard deviation"]))
    headers = [f"{name}*" if name.startswith("best_") else name for name in names]
    lines = [" " * width + "  " + "  ".join(f"{name:>12}" for name in headers)]
    for label in sorted(groups, key=rank):
        lines += [f"{label}:"] if len(groups) > 1 else []
        lines += table({titles[path]: found[path] for path in groups[label]}, names, width)
    if headers != names:
        lines.append("* the threshold is the best one for the data that the figure is measured on")
    return "\n".join(lines)


def note_on(path: Path) -> str:
    """What to mind about a run, for its line."""
    origin = _read(path / "provenance.json") if (path / "provenance.json").is_file() else {}
    if str(origin.get("tuned_on_this_data")).startswith("all figures"):
        return " (tuned on this data)"
    status = read_status(path).get("status", "completed")
    return "" if status == "completed" else f" ({status})"


def table(found: dict[str, Figures], names: list[str], width: int) -> list[str]:
    """The lines of one group."""

    def line(title: str, values: list[float]) -> str:
        return f"{title:<{width}}  " + "  ".join(
            f"{v:>{max(12, len(n))}.4f}" for n, v in zip(names, values, strict=True)
        )

    lines = [line(path, [figures[name] for name in names]) for path, figures in found.items()]
    columns = [[figures[name] for figures in found.values()] for name in names]
    lines.append(line(f"mean of {len(found)}", [statistics.fmean(column) for column in columns]))
    spread = [statistics.stdev(column) if len(column) > 1 else math.nan for column in columns]
    return [*lines, line("standard deviation", spread)]


def labels(options: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Path -> the options in which the runs differ, but for the seed, with this run's values."""
    if not all(options.values()):  # of some, nothing is known
        return dict.fromkeys(options, "")
    default = flatten(dataclasses.asdict(TrainConfig()))
    every = [default | values for values in options.values()]
    options = dict(zip(options, every, strict=True))
    names = [n for n in dict.fromkeys(itertools.chain(*every)) if not {n, n.partition(".")[0]} & NOT_COMPARED]
    differ = [n for n in names if any(values.get(n) != every[0].get(n) for values in every)]
    return {path: ", ".join(f"{n} {values.get(n)}" for n in differ) for path, values in options.items()}


def read_options(path: Path) -> dict[str, Any]:
    """The options of a run, or of the run that was scored, by dotted name; {} if they are not known."""
    file = path / "config.yaml"
    if not file.is_file():
        origin = _read(path / "provenance.json") if (path / "provenance.json").is_file() else {}
        return dict(origin.get("options") or {})
    try:
        return flatten(dict(yaml.safe_load(file.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"{file}: can't be read: {error}.") from None


def read_run_metrics(path: Path) -> dict[str, float]:
    """Read metrics.json of `evaluate --out_dir`, or else the metrics of a run's best checkpoint."""
    if (path / "metrics.json").is_file():
        return _numbers(_read(path / "metrics.json"))
    state = path / "best/state.json"
    if not state.is_file():
        raise InputError(
            f"{path}: neither a run folder with a best checkpoint nor a folder with a metrics.json."
        )
    content = _read(state)
    step = int((path / "best").resolve().name.rpartition("-")[2])
    evaluations = [record for record in content.get("evaluations", []) if record.get("step") == step]
    if not evaluations:
        raise InputError(f"{state}: has no evaluation of step {step}.")
    return _numbers(evaluations[-1])


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read: {error}.") from None


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in record.items() if isinstance(value, (int, float))}

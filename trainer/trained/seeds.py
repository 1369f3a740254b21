"""`plainloop evaluate --summary RUN ...`: several runs side by side, with mean and standard deviation."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from plainloop.trainer.errors import InputError

NOT_METRICS = ("total", "thresh", "step")  # name suffixes: a mean of sizes or thresholds makes no sense


def summary(paths: list[str]) -> str:
    """Return a table: one line per run, then mean and sample standard deviation (n - 1).

    Raises InputError for a path without metrics, and for runs with different sets of metrics.
    """
    if not paths:
        raise InputError("--summary needs run folders, or folders written by evaluate --out_dir.")
    found = {path: read_run_metrics(Path(path)) for path in paths}
    names = [name for name in next(iter(found.values())) if not name.endswith(NOT_METRICS)]
    for path, figures in found.items():
        if differing := set(names) ^ {name for name in figures if not name.endswith(NOT_METRICS)}:
            raise InputError(f"{path}: has other metrics than {paths[0]}: {', '.join(sorted(differing))}.")
    width = max(map(len, [*found, "standard deviation"]))
    lines = [" " * width + "  " + "  ".join(f"{name:>12}" for name in names)]

    def line(title: str, values: list[float]) -> str:
        return f"{title:<{width}}  " + "  ".join(
            f"{v:>{max(12, len(n))}.4f}" for n, v in zip(names, values, strict=True)
        )

    lines += [line(path, [figures[name] for name in names]) for path, figures in found.items()]
    columns = [[figures[name] for figures in found.values()] for name in names]
    lines.append(line(f"mean of {len(found)}", [statistics.fmean(column) for column in columns]))
    spread = [statistics.stdev(column) if len(column) > 1 else math.nan for column in columns]
    lines.append(line("standard deviation", spread))
    return "\n".join(lines)


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

"""evaluate --summary."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from plainloop.trainer.cli import main


def test_mean_and_spread(
    train: Any, options: Any, metrics: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On real runs: summarize the metrics of each run's best checkpoint."""
    runs = [tmp_path / f"seed {seed}" for seed in (1, 2, 3)]
    for seed, run_dir in enumerate(runs, start=1):
        train(
            **{
                "run_dir": str(run_dir), "seed": seed, "max_steps": 6, "data.dev": options["data.train"],
                "evaluation.every_steps": 3,
            }
        )  # fmt: skip
    capsys.readouterr()
    assert main(["evaluate", "--summary", *map(str, runs)]) == 0
    header, *lines, note = capsys.readouterr().out.splitlines()
    at = header.split().index("f1")
    best = [max(record["f1"] for record in metrics(run_dir, "evaluation")) for run_dir in runs]
    shown = [float(line.rsplit(maxsplit=len(header.split()))[1 + at]) for line in lines]
    assert shown == pytest.approx([*best, statistics.fmean(best), statistics.stdev(best)], abs=1e-4)
    assert "best_f1*" in header and note.startswith("* the threshold")
    assert "total" not in header and lines[3].startswith("mean of 3")


def test_scored_folders_and_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, record in (("a", {"f1": 0.5, "em": 0.25}), ("b", {"f1": 0.7, "em": 0.25}), ("c", {"f1": 1.0})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(record))
    a, b, c, empty = (str(tmp_path / name) for name in ("a", "b", "c", "empty"))
    assert main(["evaluate", "--summary", a, b]) == 0
    mean, spread = capsys.readouterr().out.splitlines()[-2:]
    assert mean.split()[-2:] == ["0.6000", "0.2500"] and spread.split()[-2:] == ["0.1414", "0.0000"]
    assert main(["evaluate", "--summary", a]) == 0 and "nan" in capsys.readouterr().out
    assert main(["evaluate", "--summary", a, c]) == 2 and "other metrics" in capsys.readouterr().err
    assert main(["evaluate", "--summary", empty]) == 2 and "neither a run folder" in capsys.readouterr().err
    assert main(["evaluate", "--summary"]) == 2 and "needs run folders" in capsys.readouterr().err

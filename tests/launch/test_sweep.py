"""A sweep as a job array on a real Slurm."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow


def test_array_task_k_trains_combination_k(submit: Any, options: Any, tmp_path: Path) -> None:
    file = tmp_path / "a sweep.yaml"
    file.write_text("optim.lr: [1e-3, 1e-4]\nmax_steps: 2\nseed: [7]\n")
    given = {name: value for name, value in options.items() if name not in ("run_dir", "optim.lr", "epochs")}
    arguments = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    job = submit(
        "train", "--cpu-workers=1", "--sweep", str(file), "--run_dir", "runs here", *arguments,
        sbatch=["--gpus-per-node=0", "--array=1-2"],
    )  # fmt: skip
    folders = [job.folder / f"runs here/lr-{lr}_seed-7" for lr in ("1e-3", "1e-4")]

    def status(folder: Path) -> str:
        file = folder / "status.json"
        return str(json.loads(file.read_text())["status"]) if file.exists() else ""

    job.wait_until(lambda: [status(folder) for folder in folders] == ["completed"] * 2, 300)
    rates = [yaml.safe_load((folder / "config.yaml").read_text())["optim"]["lr"] for folder in folders]
    assert rates == [1e-3, 1e-4], job.output()
    alone = submit(
        "train", "--cpu-workers=1", "--sweep", str(file), "--run_dir=x", sbatch=["--gpus-per-node=0"]
    )
    alone.end()
    assert "--sweep needs a job array" in alone.output()

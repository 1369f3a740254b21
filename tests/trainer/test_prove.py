"""`plainloop doctor --prove` on real runs, deterministic and with injected randomness."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# sitecustomize.py, imported by every Python with its folder in PYTHONPATH: makes dropout seeds random.
PLANTED = "import torch\ntorch.manual_seed = lambda seed: torch.seed()\n"


@pytest.fixture
def doctor(options: dict[str, Any], tmp_path: Path) -> Any:
    def run(task_options: dict[str, Any] = options, **environment: str) -> subprocess.CompletedProcess[str]:
        given = [f"--{name}={value}" for name, value in task_options.items()]
        return subprocess.run(
            [sys.executable, "-m", "plainloop.trainer", "doctor", "--prove", *given], cwd=tmp_path,
            capture_output=True, text=True, timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip

    return run


def test_all_guarantees_hold(doctor: Any, options: dict[str, Any]) -> None:
    result = doctor(options | {"data.dev": options["data.train"]})
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("stopped at step 1 and resumed: bitwise identical after step 3") == 2
    assert "ok    gradients on 1 and 2 ranks: relative difference" in result.stdout
    assert "fp32, 200 tokens: " in result.stdout and "Fastest: --precision" in result.stdout


@pytest.mark.slow
def test_a_sharded_run(doctor: Any, options: dict[str, Any]) -> None:
    """On one rank it is not sharded."""
    result = doctor(options | {"data.dev": options["data.train"], "parallel": "fsdp"})
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("stopped at step 1 and resumed: bitwise identical after step 3") == 2
    assert "ok    gradients on 1 and 2 ranks: relative difference" in result.stdout
    assert "that is for ddp" in result.stdout


@pytest.mark.slow
def test_the_text_task(doctor: Any, text_options: dict[str, Any]) -> None:
    dev = {"data.dev": text_options["data.train"], "evaluation.best_metric": "f1"}
    result = doctor(text_options | dev)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("bitwise identical") == 2 and "relative difference" in result.stdout


@pytest.mark.slow
def test_nondeterminism_is_detected(doctor: Any, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    result = doctor(PYTHONPATH=str(tmp_path))
    assert result.returncode == 1, result.stdout + result.stderr
    assert "FAIL  resume on 1 rank(s): not bitwise identical" in result.stdout
    assert "two uninterrupted runs differ too" in result.stdout and "is not seeded" in result.stdout


def test_user_error_is_reported_once(doctor: Any, options: dict[str, Any]) -> None:
    result = doctor(options | {"optim.lr": -1})
    assert result.returncode == 1 and "FAIL  options: optim.lr is -1.0" in result.stdout
    assert "Traceback" not in result.stderr and "resume" not in result.stdout

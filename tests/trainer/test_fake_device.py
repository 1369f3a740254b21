"""CUDA code paths without a GPU: tensor placement, and every copy and read of a step (tests/helpers)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUN = Path(__file__).parents[1] / "helpers/on_fake_device.py"


@pytest.fixture
def on_fake_device(tiny_model: Path, tiny_t5: Path, tmp_path: Path) -> Any:
    def run(task: str, *more: str) -> subprocess.CompletedProcess[str]:
        model = tiny_model if task == "span" else tiny_t5
        precision, optimizer, *fault = more
        line = [sys.executable, str(RUN), task, precision, optimizer, str(model), str(tmp_path), *fault]
        return subprocess.run(
            line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    return run


# Copies to the device: inputs and labels of four micro-batches; nothing waits for the device.
SENT = {"span": 4 * 4, "text": 4 * 5}


@pytest.mark.parametrize(
    ("task", "precision", "optimizer"),
    [
        ("span", "fp32", "adamw"),
        ("text", "bf16", "adafactor"),
        pytest.param("span", "bf16", "adafactor", marks=pytest.mark.slow),
        pytest.param("text", "fp32", "adamw", marks=pytest.mark.slow),
    ],
)
def test_each_phase_of_a_run(task: str, precision: str, optimizer: str, on_fake_device: Any) -> None:
    result = on_fake_device(task, precision, optimizer)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    expected = [f"to the device loop.py:add_gradients x{SENT[task]}"]
    assert found["two steps"] == expected and found["two steps after a resume"] == expected
    assert found["warm-up"] == [
        "read hooks.py:warm_up x1",
        f"to the device loop.py:add_gradients x{SENT[task] // 2}",
    ]
    assert found["devices"] == ["fakegpu:0"] and found["digest"]
    assert found["loss"][0] == pytest.approx(found["loss"][1], rel=1e-4 if precision == "fp32" else 2e-2)
    assert found["norm"][0] == pytest.approx(found["norm"][1], rel=1e-3 if precision == "fp32" else 5e-2)
    assert found["peak"] <= 1.05 * found["warm-up peak"]
    if precision == "fp32":
        assert found["used"][0] == found["used on the CPU"][0]


@pytest.mark.parametrize(
    ("fault", "seen"),
    [("item", "read"), ("blocking", "to the device waits"), ("resume", "mixes fakegpu and cpu")],
)
def test_injected_faults_are_detected(fault: str, seen: str, on_fake_device: Any) -> None:
    result = on_fake_device("span", "fp32", "adamw", fault)
    if fault == "resume":
        assert result.returncode and seen in result.stderr
    else:
        found = json.loads(result.stdout.splitlines()[-1])
        assert any(line.startswith(seen) for line in found["two steps"])

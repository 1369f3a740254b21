"""Smoke test of each benchmark: one tiny round; the measured values don't matter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# What each benchmark prints last.
LAST = {
    "speed.py": r"ours / c = \d",
    "text.py": r"ours / b\+ = \d",
    "text_exact.py": r"largest relative difference \d.*e-0[4-9]",
    "scaling.py": r"together [\d.]+ times as fast",
    "decode.py": r"ratio \d",
    "saving.py": r"medians of 1: synchronous [\d.]+ s",
    "hf_faults.py": r"exit \d",
    "tokenise.py": r"plainloop / datasets.map = \d",
    "report.py": r"ready: ",
    "sharding.py": r"rank 0 of 2: .*resume [\d.]+ GB",
    "answers.py": r"ours auto / loop = \d",
    "paper.py": r"lora \| 8 \| [\d.]+ GB",
}


def test_every_benchmark_is_listed() -> None:
    assert {path.name for path in HERE.glob("*.py")} - {Path(__file__).name, "common.py"} == set(LAST)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAST)
def test_tiny_round(name: str, real_data: Path, minilm: str) -> None:
    environment = os.environ | {"TINY": "1", "OMP_NUM_THREADS": "2"}
    line = [sys.executable, str(HERE / name)]
    result = subprocess.run(line, capture_output=True, text=True, timeout=900, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(LAST[name], result.stdout), result.stdout

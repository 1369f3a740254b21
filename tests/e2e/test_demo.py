"""The quick start's promise, on the real encoder with two processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from plainloop.data.demo import write_demo
from plainloop.data.squad import read_squad


def test_the_demo_corpus_is_valid_and_its_parts_share_no_fact(tmp_path: Path) -> None:
    train, dev = map(read_squad, write_demo(tmp_path))
    assert len({e.context for e in train}) == 600 and len({e.context for e in dev}) == 150
    for part in (train, dev):
        assert 0.2 < sum(not e.answers for e in part) / len(part) < 0.45
    names = [
        {word for e in part for word in e.context.replace(".", "").replace(",", "").split() if word.istitle()}
        - {"In", "The", "A", "Older", "Few", "Visitors"}
        for part in (train, dev)
    ]
    people_and_places = {name for name in names[0] & names[1] if len(name) > 6}
    assert not people_and_places, "a surname or a place occurs in both parts"


@pytest.mark.slow
def test_the_demo_reaches_its_f1(tmp_path: Path, minilm: str) -> None:
    line = [sys.executable, "-m", "plainloop.trainer", "demo", "--run_dir", str(tmp_path / "run")]
    result = subprocess.run(line, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-2000:]
    metrics = json.loads((tmp_path / "run/evaluation/metrics.json").read_text())
    assert metrics["f1"] > 90
    assert f"f1 {metrics['f1']:.2f}" in result.stdout and "synthetic" in result.stdout


@pytest.mark.slow
def test_the_text_demo_learns_its_task(tmp_path: Path) -> None:
    line = [
        sys.executable,
        "-m",
        "plainloop.trainer",
        "demo",
        "--task",
        "text",
        "--run_dir",
        str(tmp_path / "run"),
    ]
    result = subprocess.run(line, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads((tmp_path / "run/evaluation/results.json").read_text())
    print(result.stdout[-300:])
    assert found["metrics"]["em"] >= 0.8 and len(found["predictions"]) == 500

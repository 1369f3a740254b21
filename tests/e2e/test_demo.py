"""The quick-start demo, on the real encoder with two processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from plainloop.data.demo import write_demo
from plainloop.data.readers.examples import read_examples


def test_demo_corpus_is_valid_and_its_parts_share_no_facts(tmp_path: Path) -> None:
    train, dev = map(read_examples, write_demo(tmp_path))
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


def wait_until(happened: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    until = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < until, f"timed out after {timeout_s} s: {what}"
        time.sleep(0.05)


def processes_with(text: str) -> list[int]:
    """Pids of live processes whose command line contains `text`."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            alive = (folder / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            if alive and text.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except (OSError, ValueError, IndexError):
            continue
    return found


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 75),
        pytest.param(signal.SIGINT, 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_signalled_demo_leaves_no_processes_and_a_second_demo_does_no_harm(
    number: int, code: int, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    log = run_dir / "metrics.jsonl"
    line = [sys.executable, "-m", "plainloop.trainer", "demo", "--task", "text", "--run_dir", str(run_dir)]
    first = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        # The first steps are over, so both ranks handle signals; before that, a signal ends them at once.
        wait_until(lambda: log.exists() and '"kind": "train"' in log.read_text(), "training")
        ranks = [pid for pid in processes_with(str(run_dir)) if pid != first.pid]
        for pid in ranks:  # else the first demo may end before the second has started
            os.kill(pid, signal.SIGSTOP)
        second = subprocess.run(line, capture_output=True, text=True)
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
        assert second.returncode == 2 and "is being written to by another run" in second.stderr
        assert first.poll() is None
        assert len(processes_with(str(run_dir))) >= 4  # the demo, torchrun and two ranks
        os.kill(first.pid, number)
        told = first.communicate(timeout=120)[0]
    finally:
        first.kill()
    assert first.returncode == code, told
    wait_until(lambda: not processes_with(str(run_dir)), "all processes have ended", 60)
    if code == 75:
        assert "the same command starts a new demo" in told and not (run_dir / "demo.lock").exists()
        assert json.loads((run_dir / "status.json").read_text())["status"] == "stopped"


def test_folder_not_created_by_a_demo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("three years")
    line = [sys.executable, "-m", "plainloop.trainer", "demo", "--run_dir", str(tmp_path)]
    result = subprocess.run(line, capture_output=True, text=True)
    assert result.returncode == 2 and "contains files not made by a demo" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


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

"""A run that is stopped at any step and resumed is bitwise identical to one that never stopped: weights,
optimizer state and logged losses.

Dropout is on, batches are bucketed, and a log line averages over steps before and after the stop.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plainloop.trainer.loop import Verdict

STEPS = 30  # two epochs of the fixture's data
EVERY_STEP = {"checkpoint.every_steps": 1, "checkpoint.keep_last": 100}


def losses(metrics: Callable[..., Any], run_dir: Any) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in metrics(run_dir, "train")]


def test_one_process_stopped_after_every_step(
    options: Any, train: Any, metrics: Any, tensors: Any, assert_same_bits: Any, tmp_path: Path
) -> None:
    lines = {"log.every_steps": 4}
    assert train(**lines, **EVERY_STEP) == Verdict.COMPLETED
    for step in range(1, STEPS):
        assert train(run_dir=tmp_path / "stopped", stop_at_step=step, **lines) == Verdict.STOPPED
        assert_same_bits(tensors(tmp_path / "stopped", step), tensors(options["run_dir"], step))
    assert train(run_dir=tmp_path / "stopped", **lines) == Verdict.COMPLETED
    assert_same_bits(tensors(tmp_path / "stopped", STEPS), tensors(options["run_dir"], STEPS))
    assert losses(metrics, tmp_path / "stopped") == losses(metrics, options["run_dir"])
    assert [line[0] for line in losses(metrics, options["run_dir"])] == [4, 8, 12, 16, 20, 24, 28, 30]


@pytest.mark.slow
def test_two_processes_with_loader_workers(
    options: Any, launch: Any, metrics: Any, tensors: Any,
    assert_same_bits: Any, tmp_path: Path,
) -> None:  # fmt: skip
    changes = {"data.workers": 2, "log.every_steps": 3, "max_steps": 6}  # epochs have 15 steps
    launch(2, "train", options | changes | {"data.workers": 0} | EVERY_STEP)
    stopped = options | changes | {"run_dir": tmp_path / "stopped"}
    launch(2, "train", stopped | {"stop_at_step": 4}, expect=1)  # torchrun's code for 75
    launch(2, "train", stopped)
    for step in (4, 6):
        assert_same_bits(tensors(tmp_path / "stopped", step), tensors(options["run_dir"], step))
    assert losses(metrics, tmp_path / "stopped") == losses(metrics, options["run_dir"])


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_another_world_size_sees_the_same_batches(
    before: int, after: int, options: Any, metrics: Any, tmp_path: Path
) -> None:
    changes = {"model.dropout": 0.0, "model.attention_dropout": 0.0, "max_steps": 12}

    def run(processes: int, name: str, **more: Any) -> None:
        arguments = options | changes | {"run_dir": tmp_path / name} | more
        line = [sys.executable]
        if processes > 1:
            line += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        line += [str(Path(__file__).parents[1] / "helpers/recording_train.py")]
        line += [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
        environment = {**os.environ, "RECORD": str(tmp_path / f"{name}-rows-"), "OMP_NUM_THREADS": "1"}
        subprocess.run(line, env=environment, timeout=200, capture_output=True)
        assert (tmp_path / name / "checkpoints").exists()

    run(before, "whole")
    run(before, "changed", stop_at_step=7)
    run(after, "changed")

    def rows_of_steps(name: str) -> dict[int, list[int]]:
        rows: dict[int, list[int]] = defaultdict(list)
        for file in tmp_path.glob(f"{name}-rows-*"):
            for step, ids in map(json.loads, file.read_text().splitlines()):
                rows[step] += ids
        return {step: sorted(ids) for step, ids in rows.items()}

    assert rows_of_steps("changed") == rows_of_steps("whole") and len(rows_of_steps("whole")) == 12
    whole, changed = (losses(metrics, tmp_path / name) for name in ("whole", "changed"))
    assert [line[0] for line in changed] == [line[0] for line in whole] == list(range(1, 13))
    worst = max(abs(a[1] - b[1]) / abs(b[1]) for a, b in zip(changed, whole, strict=True))
    print(f"{before} -> {after} processes: losses differ by at most {worst:.1e}")
    assert worst < 1e-5


@pytest.mark.slow
def test_resume_after_a_signal_to_torchrun_is_bitwise_identical(
    options: Any, launch: Any, metrics: Any, tensors: Any, assert_same_bits: Any, tmp_path: Path
) -> None:
    changes = {"epochs": 8, "data.workers": 1}
    launch(2, "train", options | changes)
    arguments = [text for k, v in (options | changes).items() for text in (f"--{k}", str(v))]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    line += ["plainloop.trainer", "train", *arguments, "--run_dir", str(tmp_path / "killed")]
    with subprocess.Popen(
        line, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        file = tmp_path / "killed/metrics.jsonl"
        while not file.exists() or file.read_text().count("\n") < 5:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    (saved,) = (tmp_path / "killed/checkpoints").glob("step-*")
    assert 5 <= int(saved.name[5:]) < 120
    launch(2, "train", options | changes | {"run_dir": tmp_path / "killed"})
    assert_same_bits(tensors(tmp_path / "killed", 120), tensors(options["run_dir"], 120))
    assert losses(metrics, tmp_path / "killed") == losses(metrics, options["run_dir"])


@pytest.mark.slow
def test_evaluation_is_the_same_on_any_number_of_ranks(
    options: Any, launch: Any, metrics: Any, tmp_path: Path
) -> None:
    launch(0, "train", options | {"max_steps": 3})
    model = Path(options["run_dir"]) / "checkpoints/step-00000003"
    scoring = {
        "model": model,
        "data": options["data.train"],
        "max_length": 96,
        "stride": 24,
        "cache_dir": tmp_path / "c",
        "tokens_per_device": 500,
        "precision": "fp32",
    }
    outputs = []
    for processes in (0, 2, 3):
        out = tmp_path / f"out{processes}"
        launch(processes, "evaluate", scoring | {"out_dir": out})
        outputs.append({f.name: json.loads(f.read_text()) for f in out.iterdir()})
    weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    for out in outputs:
        assert out.pop("provenance.json")["weights"] == {"model.safetensors": weights}
    assert set(outputs[0]) == {"predictions.json", "null_odds.json", "nbest_predictions.json", "metrics.json"}
    assert len(outputs[0]["predictions.json"]) == 120
    for other in outputs[1:]:  # the losses are summed in another order
        assert other["metrics.json"].pop("loss") == pytest.approx(
            outputs[0]["metrics.json"]["loss"], rel=1e-12
        )
    outputs[0]["metrics.json"].pop("loss")
    assert outputs[0] == outputs[1] == outputs[2]

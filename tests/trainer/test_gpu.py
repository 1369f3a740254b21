"""Tests that need a GPU: tests/run.sh -m gpu. With two GPUs, also two ranks over NCCL."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from plainloop.trainer import loop

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
STILL = {"model.dropout": 0.0, "max_steps": 8}


@pytest.fixture(params=["span", "text"])
def given(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of a run on the GPU, for each task."""
    name = "options" if request.param == "span" else "text_options"
    options: dict[str, Any] = request.getfixturevalue(name) | {"device": "cuda"}
    return options


@pytest.fixture
def run(given: dict[str, Any]) -> Any:
    def train(**changes: Any) -> Any:
        from plainloop.trainer.config.options import TrainConfig
        from plainloop.trainer.config.parse import parse

        options = given | changes
        lines = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        from plainloop.trainer.run import train as run_train

        return run_train(parse(TrainConfig, lines, program="test"))

    return train


def test_loss_curve_matches_the_cpu(given: Any, run: Any, metrics: Any, tmp_path: Path) -> None:
    still = STILL | ({} if given.get("task") == "text" else {"model.attention_dropout": 0.0})
    run(**still, tf32="false")
    run(**still, device="cpu", run_dir=tmp_path / "cpu")
    gpu, cpu = ([r["loss"] for r in metrics(d, "train")] for d in (given["run_dir"], tmp_path / "cpu"))
    assert gpu == pytest.approx(cpu, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_deterministic_resume_is_bitwise_identical(
    precision: str, given: Any, run: Any, tensors: Any, assert_same_bits: Any, tmp_path: Path
) -> None:
    if given.get("task") == "text" and precision == "fp16":
        pytest.skip("T5 overflows in fp16")
    same = {"precision": precision, "deterministic": "true", "max_steps": 8}
    run(**same)
    run(**same, run_dir=tmp_path / "stopped", stop_at_step=3)
    run(**same, run_dir=tmp_path / "stopped")
    assert_same_bits(tensors(tmp_path / "stopped", 8), tensors(given["run_dir"], 8))


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_step_never_waits_for_the_gpu(optimizer: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train_step, steps = loop.train_step, []

    def strict(*arguments: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            train_step(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        steps.append(1)

    monkeypatch.setattr(loop, "train_step", strict)
    run(max_steps=4, **{"optim.name": optimizer})
    assert len(steps) == 4


def test_memory_stays_within_the_peak_of_the_warm_up(given: Any, run: Any, metrics: Any) -> None:
    torch.cuda.reset_peak_memory_stats()
    run(precision="auto")
    (warm_up,) = metrics(given["run_dir"], "warm_up")
    assert metrics(given["run_dir"], "train")[-1]["memory_gb"] <= 1.05 * warm_up["memory_gb"]


@pytest.mark.slow
def test_compiled_loss_curve_matches_eager(given: Any, run: Any, metrics: Any, tmp_path: Path) -> None:
    still = STILL | ({} if given.get("task") == "text" else {"model.attention_dropout": 0.0})
    run(**still, tf32="false")
    more = {"model.compile": "true", "data.num_widths": 2, "run_dir": tmp_path / "compiled"}
    run(**still, tf32="false", **more)
    losses = [[r["loss"] for r in metrics(d, "train")] for d in (given["run_dir"], tmp_path / "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def train_on_one_gpu(ranks: int, options: dict[str, Any], *, expect: int = 0) -> str:
    """Run ranks that share a GPU; returns what they printed."""
    helper = str(Path(__file__).parents[1] / "helpers/shared_gpu_train.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [*torchrun, helper, *arguments], capture_output=True, text=True, timeout=200,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "0"},
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_sharded_loss_curve_matches_one_process(
    given: Any, run: Any, metrics: Any, tensors: Any, assert_same_bits: Any, tmp_path: Path
) -> None:
    """FSDP, and stopped and resumed: the same bits."""
    dropout = {} if given.get("task") == "text" else {"model.attention_dropout": 0.0}
    still = STILL | dropout | {"tf32": "false", "deterministic": "true"}
    run(**still)
    sharded = given | still | {"parallel.mode": "fsdp", "run_dir": tmp_path / "two"}
    train_on_one_gpu(2, sharded)
    losses = [[r["loss"] for r in metrics(d, "train")] for d in (given["run_dir"], tmp_path / "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    stopped = sharded | {"run_dir": tmp_path / "stopped"}
    train_on_one_gpu(2, stopped | {"stop_at_step": 3}, expect=1)
    assert "guaranteed: the same bits" in train_on_one_gpu(2, stopped)
    assert_same_bits(tensors(tmp_path / "stopped", 8), tensors(tmp_path / "two", 8))


def test_sharded_in_bf16(given: Any, run: Any, metrics: Any, tmp_path: Path) -> None:
    """Weights gathered in bf16; an evaluation, with generation, while the weights are sharded."""
    dropout = {} if given.get("task") == "text" else {"model.attention_dropout": 0.0}
    still = STILL | dropout | {"precision": "bf16"}
    run(**still)
    more = {"parallel.mode": "fsdp", "parallel.gather_dtype": "bf16", "run_dir": tmp_path / "two"}
    train_on_one_gpu(2, given | still | more | {"data.dev": given["data.train"]})
    losses = [[r["loss"] for r in metrics(d, "train")] for d in (given["run_dir"], tmp_path / "two")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert len(metrics(tmp_path / "two", "evaluation")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("num_widths", [0, 2])
def test_sharded_and_compiled(num_widths: int, given: Any, run: Any, metrics: Any, tmp_path: Path) -> None:
    still = STILL | ({} if given.get("task") == "text" else {"model.attention_dropout": 0.0})
    still |= {"tf32": "false", "data.num_widths": num_widths}
    run(**still)
    more = {"parallel.mode": "fsdp", "model.compile": "true", "run_dir": tmp_path / "two"}
    train_on_one_gpu(2, given | still | more)
    losses = [[r["loss"] for r in metrics(d, "train")] for d in (given["run_dir"], tmp_path / "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_resume_bitwise_identical(
    method: str, given: Any, run: Any, assert_same_bits: Any, tmp_path: Path
) -> None:
    """LoRA: with the base in bf16, which gives the same bits as one in fp32."""
    from safetensors.torch import load_file

    targets = "[q, k, v]" if given.get("task") == "text" else "[query, key, value]"
    same = {"peft.rank": 4, "peft.targets": targets, "peft.method": method, "deterministic": "true"}
    same |= {"precision": "bf16", "max_steps": 8}
    half = {"peft.base_dtype": "bf16" if method == "lora" else "fp32", "run_dir": tmp_path / "half"}
    run(**same)
    run(**same, **half, stop_at_step=3)
    run(**same, **half)
    found = [
        load_file(Path(folder) / "checkpoints/step-00000008/adapter_model.safetensors")
        for folder in (given["run_dir"], tmp_path / "half")
    ]
    assert_same_bits(*found)


@two_gpus
def test_loss_curve_of_two_ranks_matches_one(
    given: Any, run: Any, launch: Any, metrics: Any, tmp_path: Path
) -> None:
    still = STILL | ({} if given.get("task") == "text" else {"model.attention_dropout": 0.0})
    run(**still, tf32="false")
    launch(2, "train", given | still | {"tf32": "false", "run_dir": tmp_path / "two"})
    losses = [[r["loss"] for r in metrics(d, "train")] for d in (given["run_dir"], tmp_path / "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@two_gpus
def test_two_ranks_resume_bitwise_identical_after_a_stop_and_a_kill(
    given: Any, launch: Any, tensors: Any, assert_same_bits: Any, tmp_path: Path
) -> None:
    same = given | {"deterministic": "true", "max_steps": 8, "checkpoint.every_steps": 2}
    launch(2, "train", same)
    halves = same | {"run_dir": tmp_path / "halves"}
    launch(2, "train", halves | {"stop_at_step": 3}, expect=None)
    newest = max((tmp_path / "halves/checkpoints").glob("step-*"))
    (newest / "optimizer.safetensors").write_bytes(b"")  # as after a kill: the previous one is used
    launch(2, "train", halves)
    assert_same_bits(tensors(tmp_path / "halves", 8), tensors(given["run_dir"], 8))


def test_demo_stops_on_a_signal(tmp_path: Path) -> None:
    """With its ranks on the GPU."""
    import time

    line = [sys.executable, "-m", "plainloop.trainer", "demo", "--task", "text", "--processes", "1"]
    demo = subprocess.Popen([*line, "--run_dir", str(tmp_path / "run")])
    until = time.monotonic() + 120
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert time.monotonic() < until and demo.poll() is None
        time.sleep(0.05)
    os.kill(demo.pid, signal.SIGTERM)
    assert demo.wait(60) in (0, 75)  # 0: it finished first

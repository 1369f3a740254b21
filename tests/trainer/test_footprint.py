"""The memory of a step by the config of a model alone, and doctor's estimate for other machines."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from plainloop.trainer.cli import main
from plainloop.trainer.config.options import ModelConfig, ParallelConfig, TrainConfig
from plainloop.trainer.distributed.world import World
from plainloop.trainer.tasks.find import find_task
from plainloop.trainer.tasks.footprint import RESERVE, Meter, footprint, largest, made_up_data
from plainloop.trainer.tasks.model import load_model


def test_meter_counts_what_is_alive_at_the_peak() -> None:
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(64, 256, bias=False), nn.ReLU(), nn.Linear(256, 64, bias=False))
        inputs = torch.empty(10, 64)
        with Meter(list(model.parameters())) as meter, torch.no_grad():
            hidden = model[0](inputs)  # 10 x 256 x 4 bytes
            hidden = model[1](hidden)  # a second one, then the first is freed
            assert meter.now == 10 * 256 * 4 and meter.peak == 2 * 10 * 256 * 4
            result = model[2](hidden)
            del hidden
            assert meter.now == result.numel() * 4 and meter.casts == 0
        with Meter(list(model.parameters())) as meter, torch.autocast("cpu", torch.bfloat16):
            result = model(inputs)
        assert meter.casts == 2 * 2 * 64 * 256


@pytest.fixture
def without_weights(tiny_model: Path, tmp_path: Path) -> str:
    """A model folder that has everything but weights."""
    folder = tmp_path / "config-only"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return str(folder)


def test_footprint_needs_no_weights(without_weights: str, tmp_path: Path) -> None:
    config = TrainConfig(model=ModelConfig(path=without_weights), precision="bf16", batch_size=64)
    config = replace(config, data=replace(config.data, max_length=96, stride=24, cache_dir=str(tmp_path)))
    task = find_task("span")(config)
    data = made_up_data(task, config, tmp_path)
    assert (data.store.row_lengths == 96).any()
    found = footprint(task, data, config, 960)
    assert found.tokens == 960 and found.trained == found.parameters
    assert found.weights == 4 * found.parameters and found.moments == 8 * found.parameters
    assert found.memory(960) - RESERVE == 16 * found.parameters + found.passing
    # Twice the tokens need twice the activations, which is nearly all of it.
    assert found.memory(1920) - found.memory(960) == pytest.approx(960 * found.per_token, abs=2)
    fits = found.fitting(RESERVE + 10e6)
    assert fits % 256 == 0 and found.memory(fits) <= RESERVE + 10e6 < found.memory(fits + 256)
    less = replace(config, model=replace(config.model, activation_checkpointing=True))
    assert footprint(task, data, less, 960).passing < 0.8 * found.passing
    four = [found.memory(960, shards=4, gather_dtype=dtype) for dtype in ("fp32", "bf16")]
    assert four[1] < four[0] < found.memory(960)


def test_attention_of_a_cpu_is_that_of_a_real_pass(tiny_model: Path, tmp_path: Path) -> None:
    """With dropout it keeps the scores of all heads: rows x heads x length x length, several times."""
    config = TrainConfig(model=ModelConfig(path=str(tiny_model)), precision="fp32", batch_size=8)
    config = replace(config, data=replace(config.data, max_length=96, stride=24, cache_dir=str(tmp_path)))
    task = find_task("span")(config)
    data = made_up_data(task, config, tmp_path)
    cpu, gpu = (footprint(task, data, config, 768, device=device) for device in ("cpu", "cuda"))
    world = World(0, 1, 0, torch.device("cpu"))
    model = load_model(task, str(tiny_model), config, world, new_head=True).train()
    inputs, labels = largest(task, data, config, 768)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Meter(list(model.parameters())) as meter:
        task.loss_sum(model(**inputs), labels).backward()
    assert cpu.passing == pytest.approx(meter.peak, rel=1e-3)
    shape = model.network.config
    scores = 4 * 8 * shape.num_attention_heads * 96 * 96 * shape.num_hidden_layers
    assert cpu.passing - gpu.passing > 2 * scores


@pytest.mark.parametrize("task", [pytest.param("span", marks=pytest.mark.slow), "text"])
def test_doctor_estimates_from_the_config_alone(
    task: str, without_weights: str, tiny_t5: Path, tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("peft")
    small = ["--data.max_length", "96", "--data.stride", "24", "--tokens_per_device", "960"]
    model = without_weights
    if task == "text":
        model = str(tmp_path / "t5")
        shutil.copytree(tiny_t5, model, ignore=shutil.ignore_patterns("*.safetensors"))
        small = ["--text.max_source_length", "120", "--tokens_per_device", "960"]
    line = ["doctor", "--task", task, "--model.path", model, *small, "--gpus", "4", "--gpu_gb"]
    assert main([*line, "40"]) == 0
    said = capsys.readouterr().out
    assert "M parameters, adamw, bf16, micro-batches of 960 tokens, the longest rows" in said
    for layout in ("ddp:", "fsdp:", "fsdp, model.activation_checkpointing true:", "ddp, peft.rank 16"):
        assert f"ok    {layout}" in said
    assert "a save needs as much host memory as the checkpoint" in said
    assert main([*line, "0.5"]) == 1
    said = capsys.readouterr().out
    assert "FAIL  ddp:" in said and "no    fsdp:" in said and "the longest row does not fit" in said
    few = [w if w != "960" else "16" for w in line]  # less than a row, which is never cut
    assert main([*few, "40"]) == 0
    said = capsys.readouterr().out
    assert int(said.partition("micro-batches of ")[2].split()[0]) >= (96 if task == "span" else 120)
    assert main([*line[:-3], "--gpu_gb", "40", "--parallel", "fsdp"]) == 2
    assert "needs several GPUs; say how many with --gpus" in capsys.readouterr().err


def test_estimate_with_the_users_data(options: Any, capsys: Any) -> None:
    given = [w for n, v in options.items() for w in (f"--{n}", str(v))]
    assert main(["doctor", *given, "--gpu_gb", "10", "--optim.name", "adafactor"]) == 0
    said = capsys.readouterr().out
    assert "adafactor, fp32, micro-batches of 200 tokens, the longest rows of this data" in said
    assert "fsdp" not in said
    assert main(["doctor", *given, "--gpu_gb", "-1"]) == 2
    assert "gpu_gb is -1" in capsys.readouterr().err


def test_a_loss_that_looks_at_values_is_an_error(options: Any, capsys: Any, monkeypatch: Any) -> None:
    from plainloop.trainer.tasks.span import SpanTask

    monkeypatch.setattr(SpanTask, "loss_sum", lambda self, logits, labels: logits.sum() * logits.sum().item())
    given = [w for n, v in options.items() for w in (f"--{n}", str(v))]
    assert main(["doctor", *given, "--gpu_gb", "10"]) == 2
    assert "can't be estimated: " in capsys.readouterr().err


def test_shards_are_those_of_the_options() -> None:
    from plainloop.trainer.commands.memory import layout_shards

    config = TrainConfig(parallel=ParallelConfig(mode="fsdp", shard_size=2))
    assert layout_shards(config, 8) == 2
    assert layout_shards(replace(config, parallel=ParallelConfig(mode="fsdp")), 8) == 8
    assert layout_shards(TrainConfig(), 8) == 1

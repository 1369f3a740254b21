"""Adapters on several ranks, whole and in shards."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from plainloop.trainer.cli import main

pytest.importorskip("peft")
pytestmark = pytest.mark.slow
STILL = {"model.dropout": 0, "model.attention_dropout": 0}
FSDP = {"parallel.mode": "fsdp"}


@pytest.mark.parametrize(("task", "method"), [("span", "dora"), ("text", "lora")])
def test_ranks_and_shards_follow_the_curve_of_one_process(
    task: str, method: str, request: Any, launch: Any, metrics: Any, tmp_path: Path
) -> None:
    options = request.getfixturevalue("options" if task == "span" else "text_options")
    targets = "[query, value]" if task == "span" else "[q, v]"
    options |= {"peft.rank": 4, "peft.targets": targets, "peft.method": method, "max_steps": 30}
    options |= STILL if task == "span" else {"model.dropout": 0}
    runs = {"one": (0, {}), "ddp": (2, {}), "fsdp": (3, FSDP)}
    curves = {}
    for name, (ranks, more) in runs.items():
        launch(ranks, "train", options | more | {"run_dir": tmp_path / name})
        curves[name] = [record["loss"] for record in metrics(tmp_path / name, "train")]
    for name in runs:
        largest = max(abs(a - b) / b for a, b in zip(curves[name], curves["one"], strict=True))
        print(f"{task}, {method}, {name}: {len(curves[name])} losses within {largest:.1e}")
        assert largest < 1e-5


def test_sharded_adapters_resume_with_the_same_bits_and_are_exported(
    options: Any, launch: Any, tensors: Any, assert_same_bits: Any, tmp_path: Path, capfd: Any
) -> None:
    """With dropout, a base in bf16, and a checkpoint that has only shards."""
    options |= {"peft.rank": 4, "peft.targets": "[query, key, value]", "peft.base_dtype": "bf16"}
    options |= FSDP | {
        "precision": "bf16",
        "max_steps": 6,
        "checkpoint.every_steps": 2,
        "checkpoint.keep_last": 9,
    }
    launch(2, "train", options)
    stopped = options | {"run_dir": tmp_path / "stopped"}
    launch(2, "train", stopped | {"stop_at_step": 3}, expect=1)
    launch(2, "train", stopped)
    assert_same_bits(tensors(tmp_path / "stopped", 6), tensors(options["run_dir"], 6))
    checkpoints = Path(options["run_dir"]) / "checkpoints"
    assert not (checkpoints / "step-00000004/adapter_model.safetensors").exists()
    for step in ("4", "6"):
        source, out = checkpoints / f"step-0000000{step}", tmp_path / step
        line = ["export", str(source), "--out", str(out), "--verify", options["data.train"]]
        assert main(line) == 0
        assert "the same answers as the checkpoint, the same scores" in capfd.readouterr().err
        assert not list(out.glob("shard*"))
    one, other = (
        load_file(checkpoints / "step-00000006" / f"shard-0000{i}-of-00002.safetensors") for i in (0, 1)
    )
    plain = load_file(tmp_path / "6/adapter_model.safetensors")
    rows = sum(part["weights/network.qa_outputs.weight"].shape[0] for part in (one, other))
    assert plain["base_model.model.qa_outputs.weight"].shape[0] == rows == 2
    assert all(name.startswith(("weights/", "optimizer/")) and "word_embeddings" not in name for name in one)
    given = {"model": checkpoints / "step-00000004", "data": options["data.train"], "precision": "fp32"}
    whole = launch(0, "evaluate", given).stdout
    shared = launch(2, "evaluate", given | {"parallel": "fsdp"}).stdout
    assert json.loads(shared[shared.index("{") :]) == pytest.approx(json.loads(whole), rel=1e-4)
    # The same run goes on with ddp.
    launch(
        0,
        "train",
        options | {"parallel.mode": "ddp", "max_steps": 8, "checkpoint.allow_changes": "[max_steps]"},
    )
    assert (checkpoints / "step-00000008/adapter_model.safetensors").exists()

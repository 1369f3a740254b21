"""Model families that are unlike BERT and T5, on several ranks: parameters without a gradient or with three
dimensions, nested lists of layers, experts that are separate layers.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.matrix import Case

from plainloop.trainer.cli import main
from plainloop.trainer.distributed.parallel import blocks, parallelise
from plainloop.trainer.distributed.world import World
from plainloop.trainer.errors import InputError

ADAFACTOR = {"parallel.mode": "fsdp", "optim.name": "adafactor"}


def options_of(case: Case) -> dict[str, Any]:
    """The case, without dropout."""
    case.write()
    file = case.model_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({name: 0.0 if "dropout" in name else value for name, value in config.items()}))
    data = case.folder / "data.json"
    options = {
        "run_dir": case.folder / "run", "model.path": case.model_path, "data.train": data, "max_steps": 4,
        "batch_size": 8, "tokens_per_device": 200, "precision": "fp32", "device": "cpu",
        "data.cache_dir": case.folder / "cache", "data.processes": 1, "log.tensorboard": "false",
        "log.every_steps": 1, "checkpoint.every_steps": 2, "optim.lr": 1e-3, "compare_every_steps": 2,
    }  # fmt: skip
    if case.text:
        limits = {"text.max_source_length": 48, "text.max_target_length": 8, "text.max_new_tokens": 4}
        return options | {"task": "text", "text.null_target": "it"} | limits
    return options | {"data.max_length": 48, "data.stride": 8}


def curve(metrics: Any, run_dir: Path) -> list[float]:
    return [record["loss"] for record in metrics(run_dir, "train")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "text"), [("xlnet", False), ("luke", False), ("marian", True)])
def test_parameters_without_a_gradient(
    kind: str, text: bool, launch: Any, metrics: Any, tmp_path: Path
) -> None:
    options = options_of(Case(kind, text, tmp_path / "case"))
    for name, ranks, more in (("one", 0, {}), ("ddp", 2, {}), ("fsdp", 2, {"parallel.mode": "fsdp"})):
        launch(ranks, "train", options | more | {"run_dir": tmp_path / name})
    one = curve(metrics, tmp_path / "one")
    assert len(one) == 4
    for name in ("ddp", "fsdp"):
        assert curve(metrics, tmp_path / name) == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_adafactor_on_shards_of_three_dimensions(
    launch: Any, metrics: Any, tensors: Any, assert_same_bits: Any, tmp_path: Path
) -> None:
    """XLNet's projections have a dimension for the heads. Each rank has its own moments per column there."""
    options = options_of(Case("xlnet", False, tmp_path / "case"))
    launch(0, "train", options | {"optim.name": "adafactor", "run_dir": tmp_path / "one"})
    launch(2, "train", options | ADAFACTOR | {"run_dir": tmp_path / "two"})
    launch(2, "train", options | ADAFACTOR | {"stop_at_step": 2}, expect=1)
    launch(2, "train", options | ADAFACTOR)
    assert_same_bits(tensors(options["run_dir"], 4), tensors(tmp_path / "two", 4))
    launch(3, "train", options | ADAFACTOR | {"run_dir": tmp_path / "three", "stop_at_step": 2}, expect=1)
    launch(0, "train", options | {"optim.name": "adafactor", "run_dir": tmp_path / "three"})
    for name in ("two", "three"):
        assert curve(metrics, tmp_path / name) == pytest.approx(curve(metrics, tmp_path / "one"), rel=1e-5)


def test_layers_in_nested_lists(tmp_path: Path) -> None:
    case = Case("funnel", False, tmp_path / "case")
    case.write()
    found = blocks(case.loaded()[2])
    assert len(found) > 2 and not any(isinstance(block, torch.nn.ModuleList) for block in found)


def test_a_family_that_cannot_recompute_or_be_estimated_is_one_line(tmp_path: Path, capfd: Any) -> None:
    for kind, given, message in (
        ("xlnet", ["--model.activation_checkpointing", "true"], "does not support activation checkpointing."),
        ("mixtral", [], "can't be estimated: Expected inputs of BF16 type"),
    ):
        case = Case(kind, False, tmp_path / kind)
        case.write()
        capfd.readouterr()
        line = ["--model.path", case.path, "--data.max_length", "48", "--data.stride", "8", "--gpu_gb", "10"]
        assert main(["doctor", *line, "--precision", "bf16", *given]) == 2
        said = capfd.readouterr().err
        assert message in said and said.count("\n") == 1


def test_separate_experts_are_for_one_process(tmp_path: Path) -> None:
    case = Case("switch_transformers", True, tmp_path / "case")
    case.write()
    model = case.loaded()[2]
    with pytest.raises(InputError, match="can only be trained by one process"):
        parallelise(model, World(0, 2, 0, torch.device("cpu")))
    parallelise(model, World(0, 1, 0, torch.device("cpu")))


OWN_MODEL = """
import sys
import torch
from plainloop.trainer.distributed.parallel import parallelise
from plainloop.trainer.distributed.world import process_group, world_from_env
from plainloop.trainer.errors import explain


class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.network, self.never = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.network(x)


world = world_from_env("cpu")
with process_group(world, timeout_s=60):
    model = Own()
    model.unused_parameters = sys.argv[1] == "named"
    module = parallelise(model, world).module
    try:
        for _ in range(2):
            module(torch.ones(1, 2)).sum().backward()
        print("trained", model.never.weight.grad)
    except RuntimeError as error:
        print(*explain(error))
"""


@pytest.mark.slow
def test_a_model_of_the_user_with_unused_parameters(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_MODEL)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for given, expected in (
        ("unnamed", "If they are never used, freeze them, or give the model the attribute unused_parameters"),
        ("named", "trained None"),
    ):
        result = subprocess.run(
            [*line, str(tmp_path / "own.py"), given], capture_output=True, text=True, timeout=120
        )
        assert result.stdout.count(expected) == 2, result.stdout + result.stderr

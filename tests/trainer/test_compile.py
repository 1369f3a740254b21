"""torch.compile: same loss curve as eager, one graph per width, compiled code cached for the next start."""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from plainloop.models.compiled import compile_training
from plainloop.trainer.distributed.device import keep_compiled_code
from plainloop.trainer.distributed.parallel import blocks

STILL = {"model.dropout": 0.0, "max_steps": 4}


def compare(train: Any, metrics: Any, options: dict[str, Any], tmp_path: Path, **changes: Any) -> None:
    train(**STILL, **changes)
    train(**STILL, **{"run_dir": tmp_path / "compiled", "model.compile": "true", **changes})
    losses = [[r["loss"] for r in metrics(d, "train")] for d in (options["run_dir"], tmp_path / "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def one_layer(path: str, folder: Path) -> Path:
    """A T5 like the one at `path`, with one layer per stack and random weights: half as much to compile."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    shutil.copytree(path, folder)
    config = AutoConfig.from_pretrained(folder, num_layers=1, num_decoder_layers=1)
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_spans(options: dict[str, Any], train: Any, metrics: Any, tmp_path: Path, capsys: Any) -> None:
    compare(train, metrics, options, tmp_path, **{"model.attention_dropout": 0.0, "data.num_widths": 2})
    assert "padded to 2 widths: " in capsys.readouterr().err


@pytest.mark.slow
def test_texts(text_options: dict[str, Any], train: Any, metrics: Any, tmp_path: Path) -> None:
    small = one_layer(text_options["model.path"], tmp_path / "small")
    compare(train, metrics, text_options, tmp_path, **{"data.num_widths": 1, "model.path": str(small)})


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_with_activation_checkpointing_resume_bitwise_identical(
    mode: str, options: dict[str, Any], launch: Any, tensors: Any, assert_same_bits: Any, tmp_path: Path
) -> None:
    options |= {"model.compile": "true", "data.num_widths": 2, "model.activation_checkpointing": "true"}
    options |= {"parallel.mode": mode}
    if mode == "fsdp":  # our dropout on CPUs splits the graphs, one per layer, into many
        options |= {"model.dropout": 0.0, "model.attention_dropout": 0.0}
    cache = str(tmp_path / "compiled")
    for folder, stops in (("whole", [4]), ("halves", [2, 4])):
        for stop in stops:
            given = options | {"run_dir": tmp_path / folder, "max_steps": 4, "stop_at_step": stop}
            launch(2, "train", given, expect=None, TORCHINDUCTOR_CACHE_DIR=cache)
    assert list(Path(cache).rglob("*.so"))
    assert_same_bits(tensors(tmp_path / "whole", 4), tensors(tmp_path / "halves", 4))


@pytest.mark.slow
@pytest.mark.parametrize(("task", "num_widths"), [("span", 2), ("text", 0)])
def test_sharded_and_compiled_the_curve_and_the_scores_are_those_of_one_process(
    task: str, num_widths: int, request: Any, launch: Any, metrics: Any, tmp_path: Path
) -> None:
    options = request.getfixturevalue("options" if task == "span" else "text_options") | STILL
    options |= {"data.num_widths": num_widths, "evaluation.every_steps": 4}
    if task == "span":
        options |= {"data.dev": options["data.train"], "model.attention_dropout": 0.0}
    else:
        small = one_layer(options["model.path"], tmp_path / "small")
        options |= {"data.dev": str(request.getfixturevalue("text_files")[1]), "model.path": str(small)}
    launch(0, "train", options)
    more = {"run_dir": tmp_path / "sharded", "model.compile": "true", "parallel.mode": "fsdp"}
    cache = tmp_path / "compiled"
    launch(2, "train", options | more, TORCHINDUCTOR_CACHE_DIR=str(cache))
    assert list(cache.rglob("*.so"))
    runs = (options["run_dir"], tmp_path / "sharded")
    losses = [[r["loss"] for r in metrics(run, "train")] for run in runs]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    scores = [json.loads((Path(run) / "evaluation" / "metrics.json").read_text()) for run in runs]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that torch.compile makes, which then run as they are."""
    found: list[Any] = []
    torch_compile = torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda *args, **more: torch_compile(*args, **more, backend=backend))
    torch._dynamo.reset()
    return found


def test_one_graph_per_width_for_any_number_of_rows(graphs: list[Any]) -> None:
    class Twice(torch.nn.Module):
        def forward(self, *, x: torch.Tensor) -> torch.Tensor:
            return x * 2 + x.shape[1]

    module = Twice()
    compile_training(module, num_shapes=12)
    for width in range(8, 8 + 12):  # more than torch's default recompile limit
        for rows in (2, 3, 7):
            x = torch.ones(rows, width)
            assert torch.equal(module(x=x), x * 2 + width)
    assert len(graphs) == 12
    assert torch.equal(module.eval()(x=torch.ones(2, 99)), torch.full((2, 99), 101.0))
    assert len(graphs) == 12


@pytest.mark.slow
def test_layers_share_their_graphs_whatever_comes_first(graphs: list[Any], tiny_t5: Path) -> None:
    """Eight: first and other layers of two stacks, one row or more. Equal sizes get no graph of their own."""
    from transformers import AutoModelForSeq2SeqLM

    eager = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5).train()
    network = copy.deepcopy(eager)
    for block in blocks(network):
        compile_training(block)
    for rows, width, length in [(16, 16, 8), (2, 24, 16), (1, 32, 8), (8, 8, 8), (1, 16, 16), (3, 40, 24)]:
        ids, labels = torch.full((rows, width), 5), torch.full((rows, length), 6)
        losses = []
        for one in (network, eager):
            torch.manual_seed(0)  # dropout
            losses.append(one(input_ids=ids, labels=labels, use_cache=False).loss)
        assert torch.equal(*losses)
    assert len(graphs) == 8


def test_a_copy_runs_its_own_weights(graphs: list[Any]) -> None:
    module = torch.nn.Linear(3, 3)
    compile_training(module)
    averaged = copy.deepcopy(module)
    torch.nn.init.zeros_(averaged.weight)
    x = torch.ones(2, 3)
    assert torch.equal(averaged(x), averaged.bias.expand(2, 3)) and not torch.equal(module(x), averaged(x))


def test_compiled_code_is_kept_in_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    keep_compiled_code(str(tmp_path), torch.device("cpu"))
    first = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    assert first.startswith(str(tmp_path / "compiled-"))
    keep_compiled_code("elsewhere", torch.device("cpu"))  # already set by the user or by an earlier run
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == first
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compiled_code(str(tmp_path), torch.device("cuda", 0))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")

"""torch.compile: same loss curve as eager, one graph per width, compiled code cached for the next start."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from plainloop.models.compiled import compiled
from plainloop.trainer.distributed.device import keep_compiled_code

STILL = {"model.dropout": 0.0, "max_steps": 4}


def compare(train: Any, metrics: Any, options: dict[str, Any], tmp_path: Path, **changes: Any) -> None:
    train(**STILL, **changes)
    more = {"run_dir": tmp_path / "compiled", "model.compile": "true", "data.num_widths": 2}
    train(**STILL, **changes, **more)
    losses = [[r["loss"] for r in metrics(d, "train")] for d in (options["run_dir"], tmp_path / "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_spans(options: dict[str, Any], train: Any, metrics: Any, tmp_path: Path, capsys: Any) -> None:
    compare(train, metrics, options, tmp_path, **{"model.attention_dropout": 0.0})
    assert "padded to 2 widths: " in capsys.readouterr().err


@pytest.mark.slow
def test_texts(text_options: dict[str, Any], train: Any, metrics: Any, tmp_path: Path) -> None:
    compare(train, metrics, text_options, tmp_path)


@pytest.mark.slow
def test_two_ranks_with_activation_checkpointing_resume_bitwise_identical(
    options: dict[str, Any], launch: Any, tensors: Any, assert_same_bits: Any, tmp_path: Path
) -> None:
    options |= {"model.compile": "true", "data.num_widths": 2, "model.activation_checkpointing": "true"}
    cache = str(tmp_path / "compiled")
    for folder, stops in (("whole", [4]), ("halves", [2, 4])):
        for stop in stops:
            given = options | {"run_dir": tmp_path / folder, "max_steps": 4, "stop_at_step": stop}
            launch(2, "train", given, expect=None, TORCHINDUCTOR_CACHE_DIR=cache)
    assert_same_bits(tensors(tmp_path / "whole", 4), tensors(tmp_path / "halves", 4))


def test_one_graph_per_width_for_any_number_of_rows() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    class Twice(torch.nn.Module):
        def forward(self, *, x: torch.Tensor) -> torch.Tensor:
            return x * 2 + x.shape[1]

    torch._dynamo.reset()
    by_width = compiled(Twice(), num_shapes=12)
    by_width.compiled = torch.compile(Twice(), backend=backend)  # type: ignore[assignment]
    for width in range(8, 8 + 12):  # more than torch's default recompile limit
        for rows in (2, 3, 7):
            x = torch.ones(rows, width)
            assert torch.equal(by_width(x=x), x * 2 + width)
    assert len(graphs) == 12


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

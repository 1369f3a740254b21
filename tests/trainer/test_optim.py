"""Adafactor: same numbers as torch's, and steps can be skipped on the device. AdamW in 8 bits."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from plainloop.trainer.config.options import OptimConfig
from plainloop.trainer.errors import InputError
from plainloop.trainer.optim import Adafactor, make_optimizer


def parameters() -> list[torch.nn.Parameter]:
    random = torch.Generator().manual_seed(1)
    return [
        torch.nn.Parameter(torch.randn(*shape, generator=random)) for shape in ((64, 32), (32,), (3, 8, 8))
    ]


def test_adafactor_matches_torch_and_skipped_steps_change_nothing() -> None:
    theirs, ours = parameters(), parameters()
    reference = torch.optim.Adafactor([{"params": theirs, "weight_decay": 0.01}], lr=1e-2)
    optimizer = Adafactor([{"params": ours, "weight_decay": 0.01}], lr=1e-2)
    for step in range(30):
        torch.manual_seed(step)
        for left, right in zip(theirs, ours, strict=True):
            left.grad = torch.randn_like(left) * (1 + step % 3)
            right.grad = left.grad.clone()
        reference.step()
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
        before = [p.detach().clone() for p in ours]
        state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in ours]
        for right in ours:
            right.grad = torch.full_like(right, torch.nan)
        optimizer.found_inf = torch.tensor(1.0)
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, ours, strict=True))
        for kept, parameter in zip(state, ours, strict=True):
            assert all(torch.equal(kept[k], v) for k, v in optimizer.state[parameter].items())
    for left, right in zip(theirs, ours, strict=True):
        assert torch.allclose(left, right, rtol=1e-5, atol=1e-6)
        assert reference.state[left].keys() == optimizer.state[right].keys()
        for name, value in reference.state[left].items():
            assert torch.allclose(value, optimizer.state[right][name], rtol=1e-5), name


def test_optimizers_can_skip_steps_on_the_device() -> None:
    for name in ("adamw", "adafactor"):
        optimizer = make_optimizer(torch.nn.Linear(2, 2), OptimConfig(name=name))  # type: ignore[arg-type]
        assert optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]


def test_adamw_in_8_bits_follows_adamw_and_skips() -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    start = nn.Linear(128, 64)
    models = [copy.deepcopy(start) for _ in range(2)]
    eight, whole = (
        make_optimizer(model, OptimConfig(name=name, lr=1e-2))
        for model, name in zip(models, ("adamw8bit", "adamw"), strict=True)
    )
    for step in range(30):
        for model, optimizer in zip(models, (eight, whole), strict=True):
            model(torch.full((4, 128), float(step % 3))).square().sum().backward()
            optimizer.found_inf = torch.tensor(float(step == 20))  # type: ignore[attr-defined]
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step()
            same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert same == (step == 20)
            optimizer.zero_grad()
    state = eight.state[models[0].weight]
    assert state["state1"].dtype == torch.uint8 and state["step"].item() == 29
    moved = (models[1].weight - start.weight).norm()
    assert 0 < (models[0].weight - models[1].weight).norm() < 0.1 * moved


def test_adamw_in_8_bits_resumes_with_the_same_bits(
    options: Any, train: Any, tensors: Any, assert_same_bits: Any, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    same = {"optim.name": "adamw8bit", "max_steps": 6}
    train(**same)
    train(**same, run_dir=tmp_path / "stopped", stop_at_step=3)
    train(**same, run_dir=tmp_path / "stopped")
    found = tensors(options["run_dir"], 6)
    assert_same_bits(tensors(tmp_path / "stopped", 6), found)
    assert any(tensor.dtype == torch.uint8 for tensor in found.values())


def test_adamw_in_8_bits_needs_its_package_and_whole_tensors(train: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"adamw8bit needs bitsandbytes: pip install 'plainloop\[8bit\]'"):
        train(**{"optim.name": "adamw8bit"})
    with pytest.raises(InputError, match="optim.name adamw8bit works on whole tensors"):
        train(**{"optim.name": "adamw8bit", "parallel.mode": "fsdp"})

"""Adafactor: same numbers as torch's, and steps can be skipped on the device."""

import torch

from plainloop.trainer.config.options import OptimConfig
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

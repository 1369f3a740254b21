"""cpu_dropout is a correct dropout: rate, scale, expectation and gradient."""

import pytest
import torch
from torch.nn import functional

from plainloop.models.cpu_dropout import attention, cpu_dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_rate_scale_and_gradient(dtype: torch.dtype, p: float) -> None:
    torch.manual_seed(1)
    x = torch.ones(1_000_003, dtype=dtype, requires_grad=True)
    y = cpu_dropout(x, p)
    dropped = (y == 0).float().mean().item()
    assert abs(dropped - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5
    kept = y[y != 0]
    assert (kept == kept[0]).all() and kept[0].item() == pytest.approx(1 / (1 - p), rel=4e-3)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y.detach())  # input of ones: the gradient is the mask


def test_neighboring_elements_are_dropped_independently() -> None:
    torch.manual_seed(2)
    dropped = (cpu_dropout(torch.ones(1_000_000), 0.5) == 0).float() - 0.5
    for distance in (1, 2, 3, 4, 8):
        assert abs((dropped[distance:] * dropped[:-distance]).mean().item()) < 5 * 0.25 / 1000


def test_mask_depends_on_the_seed() -> None:
    x = torch.ones(1000)
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(cpu_dropout(x, 0.1))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_attention_matches_torch_except_for_the_dropout_mask() -> None:
    torch.manual_seed(5)
    query, key, value = (torch.randn(2, 3, 7, 4) for _ in range(3))
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    mask[1, :, :, 5:] = False
    expected = functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)
    module = torch.nn.Identity()
    torch.testing.assert_close(attention(module, query, key, value, mask)[0], expected)
    almost_none = attention(module, query, key, value, mask, dropout=1e-9)[
        0
    ]  # the branch with dropout, but nothing is dropped
    torch.testing.assert_close(almost_none, expected, atol=1e-5, rtol=1e-4)
    mean = torch.stack(
        [attention(module, query, key, value, mask, dropout=0.3)[0] for _ in range(4000)]
    ).mean(0)
    torch.testing.assert_close(mean, expected, atol=0.06, rtol=0)

"""Fast dropout on a CPU, where torch draws a mask one number at a time: 40 % of a step's time.

`speed_up_dropout` replaces a network's dropout modules and its attention with versions that draw 16 random
bits per element from the same generator (torch's, seeded as usual). Nothing is replaced on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plainloop.models.position_bias import SHARED_BIAS
from plainloop.models.position_bias import attention as plain_attention

ATTENTION = "plainloop_cpu"
MASK_TAKEN_AS_IT_IS = ("sdpa", ATTENTION, SHARED_BIAS)  # attentions that take a mask in its final form
SCALE_BITS = 15


def cpu_dropout(x: Tensor, p: float) -> Tensor:
    """Zero elements with probability p (to within 1 / 2**15), divide the rest by 1 - p. x: any shape, CPU.

    The mask is computed in place with vectorised integer operations: the sign of 15 random bits minus the
    threshold selects the bits of 0 or of the scale.
    """
    threshold = round(p * 2**SCALE_BITS)
    scale = torch.tensor(2**SCALE_BITS / (2**SCALE_BITS - threshold), dtype=torch.bfloat16)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    mask = words.view(torch.int16)[: x.numel()].view(x.shape)
    mask.bitwise_and_(2**SCALE_BITS - 1).sub_(threshold).bitwise_right_shift_(15)  # -1: drop, 0: keep
    mask.bitwise_not_()
    if x.dtype == torch.bfloat16:
        return x * mask.bitwise_and_(scale.view(torch.int16)).view(torch.bfloat16)
    return x * (mask * -(2**SCALE_BITS / (2**SCALE_BITS - threshold))).to(x.dtype)


class CpuDropout(nn.Module):
    """nn.Dropout implemented with `cpu_dropout`."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return cpu_dropout(x, self.p) if self.training and self.p > 0 else x


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention with fast dropout. (B, heads, L, d) -> (B, L, heads, d).

    attention_mask: bool, (B, 1, L or 1, S), True where a position is visible. None: all positions,
    or in decoder self-attention, all that are not later. position_bias (1, heads, L, S): added to the scores
    (T5).
    """
    if dropout == 0.0:
        return plain_attention(
            module, query, key, value, attention_mask, position_bias, scaling=scaling, **kwargs
        )
    if key.shape[1] != query.shape[1]:  # several query heads share a key head
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.matmul(
        query * (query.shape[-1] ** -0.5 if scaling is None else scaling), key.transpose(-1, -2)
    )
    if position_bias is not None:
        scores = scores + position_bias.to(scores.dtype)
    if attention_mask is None and query.shape[2] > 1 and getattr(module, "is_causal", False):
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attention_mask is not None:
        lowest = torch.finfo(scores.dtype).min  # added, not masked_fill: a sum saves nothing for backward
        scores = scores + torch.where(attention_mask, 0.0, lowest).to(scores.dtype)
    output = torch.matmul(cpu_dropout(torch.softmax(scores, dim=-1), dropout), value)
    return output.transpose(1, 2).contiguous(), None


def speed_up_dropout(network: Any) -> None:
    """Replace dropout in place, and SDPA attention with `attention`; neither has parameters."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, CpuDropout(child.p).train(child.training))
    if network.config._attn_implementation == "sdpa":
        AttentionInterface.register(ATTENTION, attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        network.set_attn_implementation(ATTENTION)

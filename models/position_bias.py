"""T5 attention that builds its mask once per stack, not once per layer.

T5 adds a learned bias to the attention scores, shared by all layers of a stack. transformers (5.23) combines
it with the padding mask again in each layer, in fp32, (B, heads, L, S), and then casts it: 1.2 GB per layer
at 2,048 tokens. Here this is done once per stack.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SHARED_BIAS = "plainloop_shared_bias"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention of transformers, (B, heads, L, d) -> (B, L, heads, d)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if position_bias is not None:
        attention_mask = biased_mask(position_bias, attention_mask, query, key, module)
    output: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0]
    return output, None


def biased_mask(
    position_bias: Tensor, attention_mask: Tensor | None, query: Tensor, key: Tensor, module: nn.Module
) -> Tensor:
    """Combine bias (1, heads, L, S) and mask (B, 1, 1 or L, S) into one additive mask, in the query's dtype.

    Cached on the bias tensor, which a stack passes from layer to layer and then drops.
    """
    from transformers.integrations.sdpa_attention import create_position_bias_mask

    kept = getattr(position_bias, "_plainloop_mask", None)
    shared = getattr(module, "shares_mask", True)
    if shared and kept is not None and kept[0] is attention_mask and kept[1].dtype == query.dtype:
        return kept[1]
    causal = attention_mask is None and query.shape[2] > 1 and getattr(module, "is_causal", False)
    mask: Tensor = create_position_bias_mask(
        position_bias.to(query.dtype), attention_mask, causal, query, key
    )
    # No cache when compiling: the compiler merges equal computations. None on a leaf with a gradient (T5's
    # cross-attention when activations are recomputed): it would hold its own graph, a cycle never freed.
    leaf = position_bias.is_leaf and position_bias.requires_grad
    if shared and not leaf and not torch.compiler.is_compiling():
        position_bias._plainloop_mask = (attention_mask, mask)  # type: ignore[attr-defined]
    return mask


def mask_in_each_layer(network: Any) -> None:
    """Let each layer make its own mask. For activation checkpointing of a sharded network: in its forward
    pass FSDP hands each layer new tensors, but not when the layer is recomputed, and what it finds must be
    the same.
    """
    for module in network.modules():
        module.shares_mask = False


def share_position_bias(network: Any) -> None:
    """Make a T5-like network with torch's SDPA use `attention`; other networks are unchanged."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    biased = any(getattr(module, "has_relative_attention_bias", False) for module in network.modules())
    if biased and network.config._attn_implementation == "sdpa":
        AttentionInterface.register(SHARED_BIAS, attention)
        AttentionMaskInterface.register(SHARED_BIAS, sdpa_mask)
        network.set_attn_implementation(SHARED_BIAS)

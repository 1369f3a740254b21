"""T5's attention without a mask of its own in each layer.

T5 adds a learned bias to the attention's scores, the same in all layers of a stack. transformers (5.23) joins
it with the padding mask anew in each layer, in fp32, (B, heads, L, S), and then casts it: at 2,048 tokens
1.2 GB a layer. Here that happens once a stack.
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
    """Bias (1, heads, L, S) and mask (B, 1, 1 or L, S) as one summand of the scores, in the query's format.

    Kept at the bias, which a stack hands from layer to layer and then forgets.
    """
    from transformers.integrations.sdpa_attention import create_position_bias_mask

    kept = getattr(position_bias, "_plainloop_mask", None)
    if kept is not None and kept[0] is attention_mask and kept[1].dtype == query.dtype:
        return kept[1]
    causal = attention_mask is None and query.shape[2] > 1 and getattr(module, "is_causal", False)
    mask: Tensor = create_position_bias_mask(
        position_bias.to(query.dtype), attention_mask, causal, query, key
    )
    # The compiler joins equal computations by itself. And a bias that is a leaf with a gradient, as of T5's
    # cross-attention when activations are recomputed, would hold its own graph: a circle that nothing breaks.
    leaf = position_bias.is_leaf and position_bias.requires_grad
    if not leaf and not torch.compiler.is_compiling():
        position_bias._plainloop_mask = (attention_mask, mask)  # type: ignore[attr-defined]
    return mask


def share_position_bias(network: Any) -> None:
    """Make a T5-like network with torch's attention use `attention`; others stay as they are."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    biased = any(getattr(module, "has_relative_attention_bias", False) for module in network.modules())
    if biased and network.config._attn_implementation == "sdpa":
        AttentionInterface.register(SHARED_BIAS, attention)
        AttentionMaskInterface.register(SHARED_BIAS, sdpa_mask)
        network.set_attn_implementation(SHARED_BIAS)

"""Extractive question answering: any encoder with a start/end head. Returns logits; the loss is separate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from plainloop.data.errors import InputError
from plainloop.data.types import IGNORE_INDEX
from plainloop.models.cpu_dropout import MASK_TAKEN_AS_IT_IS
from plainloop.models.load import load_network

HEAD = "qa_outputs"  # what transformers calls the start/end head in its *ForQuestionAnswering classes


# Encoders that use the padding mask only in attention. They get its final form, bool (B, 1, L, L): for a
# (B, L) mask, transformers checks whether anything is masked, which is a host sync.
PLAIN_ATTENTION = {"bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta"}


class SpanModel(nn.Module):
    """A transformers *ForQuestionAnswering network (encoder without pooler) that returns only logits.

    The parameters and their names are the same, so our checkpoints load in transformers and vice versa.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, **inputs: Tensor) -> Tensor:
        """inputs: (B, L) int64 -> start and end logits (B, L, 2), fp32; the lowest number at padding."""
        visible = inputs["attention_mask"] != 0
        config = self.network.config
        if config.model_type in PLAIN_ATTENTION and config._attn_implementation in MASK_TAKEN_AS_IT_IS:
            length = visible.shape[1]
            inputs = {**inputs, "attention_mask": visible[:, None, None, :].expand(-1, 1, length, -1)}
        output = self.network(**inputs, return_dict=True)
        logits = torch.stack([output.start_logits, output.end_logits], dim=-1).float()
        return logits.masked_fill(~visible.unsqueeze(-1), torch.finfo(torch.float32).min)


def load_span_model(
    path: str, *, new_head: bool, dropout: float | None = None, attention_dropout: float | None = None
) -> SpanModel:
    """Load from a folder or hub name. new_head: the head may be missing. Dropouts override the config."""
    from transformers import AutoModelForQuestionAnswering

    overrides = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": attention_dropout}
    overrides = {key: value for key, value in overrides.items() if value is not None}
    network = load_network(AutoModelForQuestionAnswering, path, head=HEAD if new_head else (), **overrides)
    if not hasattr(network, HEAD) or getattr(network, HEAD).out_features != 2:
        raise InputError(
            f"model.path {path}: {type(network).__name__} has no two-column start/end head ({HEAD}); "
            "use an encoder such as BERT, RoBERTa, ELECTRA or DeBERTa."
        )
    return SpanModel(network)


def position_limit(config: Any) -> int:
    """Maximum input length in tokens. The RoBERTa family numbers its positions from pad_token_id + 1."""
    positions = getattr(config, "max_position_embeddings", None) or 2**31
    if not getattr(config, "position_biased_input", True):  # DeBERTa: relative positions only
        return 2**31
    return positions - (config.pad_token_id + 1 if "roberta" in config.model_type else 0)


def span_loss_sum(logits: Tensor, labels: dict[str, Tensor]) -> Tensor:
    """(CE(start) + CE(end)) / 2, summed over the windows of the micro-batch; fp32 scalar.

    logits: (B, L, 2); labels start, end: (B,), IGNORE_INDEX for an ignored window.
    """
    start, end = (
        functional.cross_entropy(logits[..., i], labels[name], ignore_index=IGNORE_INDEX, reduction="sum")
        for i, name in enumerate(("start", "end"))
    )
    return (start + end) / 2

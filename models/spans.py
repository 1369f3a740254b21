"""Extractive question answering: any encoder with a start/end head. Returns logits; the loss is separate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from plainloop.data.errors import InputError
from plainloop.data.types import IGNORE_INDEX
from plainloop.models.cpu_dropout import MASK_TAKEN_AS_IT_IS
from plainloop.models.families import extra_inputs, require_usable, takes_segments
from plainloop.models.load import load_config, load_network

# Top-level modules that are heads, in networks whose base model is not a module of its own, such as T5's.
HEADS = ("qa_outputs", "classifier", "score")
# Encoders that use the padding mask only in attention. They get its final form, bool (B, 1, L, L): for a
# (B, L) mask, transformers checks whether anything is masked, which is a host sync.
PLAIN_ATTENTION = {"bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta"}


class SpanModel(nn.Module):
    """A transformers network with a start/end head (without pooler) that returns only logits.

    network: a *ForQuestionAnswering, or a *ForTokenClassification with two labels: start and end. The
    parameters and their names are the same, so our checkpoints load in transformers and vice versa. head:
    prefixes of the names of the head's.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.head = _head(network)

    def forward(self, **inputs: Tensor) -> Tensor:
        """inputs: (B, L) int64 -> start and end logits (B, L, 2), fp32; the lowest number at padding."""
        visible = inputs["attention_mask"] != 0
        config = self.network.config
        inputs |= extra_inputs(config, inputs["input_ids"])
        if config.model_type in PLAIN_ATTENTION and config._attn_implementation in MASK_TAKEN_AS_IT_IS:
            length = visible.shape[1]
            inputs = {**inputs, "attention_mask": visible[:, None, None, :].expand(-1, 1, length, -1)}
        output = self.network(**inputs, return_dict=True)
        if "start_logits" in output:
            logits = torch.stack([output.start_logits, output.end_logits], dim=-1).float()
        else:
            logits = output.logits.float()
        return logits.masked_fill(~visible.unsqueeze(-1), torch.finfo(torch.float32).min)


def span_class(config: Any, path: str) -> Any:
    """The auto class that makes a span model of this config, and later loads it: the one for question
    answering, else the one for token classification. Raises InputError if transformers has neither.
    """
    from transformers import (
        MODEL_FOR_QUESTION_ANSWERING_MAPPING,
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
        AutoModelForQuestionAnswering,
        AutoModelForTokenClassification,
    )

    require_usable(config, path)
    if type(config) in MODEL_FOR_QUESTION_ANSWERING_MAPPING:
        return AutoModelForQuestionAnswering
    if type(config) in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        return AutoModelForTokenClassification
    raise InputError(
        f"model.path {path}: transformers has no question-answering or token-classification class for a"
        f" {config.model_type}; use another encoder, such as BERT, RoBERTa, DeBERTa or ModernBERT."
    )


def load_span_model(
    path: str,
    *,
    new_head: bool,
    dropout: float | None = None,
    attention_dropout: float | None = None,
    attention: str | None = None,
) -> SpanModel:
    """Load from a folder or hub name. new_head: the head may be missing. Dropouts override the config."""
    from transformers import MODEL_FOR_QUESTION_ANSWERING_MAPPING

    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": attention_dropout}
    overrides: dict[str, Any] = {key: value for key, value in dropouts.items() if value is not None}
    config = load_config(path)
    auto_class, head = span_class(config, path), _head if new_head else ()
    if type(config) not in MODEL_FOR_QUESTION_ANSWERING_MAPPING:  # else not written: two is the default
        overrides |= {"id2label": {0: "start", 1: "end"}, "label2id": {"start": 0, "end": 1}}
    network = load_network(auto_class, path, head=head, attention=attention, num_labels=2, **overrides)
    if _is_of_another_task(config):  # a head of the same name and shape
        mine = _head(network)
        network.new_parameters = sorted(n for n, _ in network.named_parameters() if n.startswith(mine))
    return SpanModel(network)


def _is_of_another_task(config: Any) -> bool:
    """Whether the folder's head was trained for something else than spans."""
    (made_by, *_) = config.architectures or [""]
    labels = {str(label).lower() for label in config.id2label.values()}
    return made_by.endswith("ForSequenceClassification") or (
        made_by.endswith("ForTokenClassification") and labels != {"start", "end"}
    )


def _head(network: Any) -> tuple[str, ...]:
    """Prefixes of the parameters outside the base model."""
    children = [name for name, _ in network.named_children()]
    base = network.base_model_prefix
    return tuple(f"{c}." for c in children if (c != base if base in children else c in HEADS))


def use_segments(path: str) -> bool:
    """Whether the model in this folder takes token_type_ids. Raises InputError."""
    config = load_config(path)
    return takes_segments(span_class(config, path)._model_mapping[type(config)], config)


def span_loss_sum(logits: Tensor, labels: dict[str, Tensor]) -> Tensor:
    """(CE(start) + CE(end)) / 2, summed over the windows of the micro-batch; fp32 scalar.

    logits: (B, L, 2); labels start, end: (B,), IGNORE_INDEX for an ignored window.
    """
    start, end = (
        functional.cross_entropy(logits[..., i], labels[name], ignore_index=IGNORE_INDEX, reduction="sum")
        for i, name in enumerate(("start", "end"))
    )
    return (start + end) / 2

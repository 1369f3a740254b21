"""What differs between the model families of transformers: limits, inputs, and those that can't be used.

Found by trying every entry of its tables; tests/models/test_matrix.py does so again, docs/models.md shows it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from plainloop.data.errors import InputError

NO_LIMIT = 2**31
LAYOUT = "needs the boxes of the words on a page, which question answering on plain text does not have"
REFUSED = {
    "bros": LAYOUT,
    "canine": "works on characters and has no fast tokenizer, which is needed for offsets",
    "ibert": "changes its quantisation ranges in training, which are no parameters: a resumed run differs",
    "layoutlm": LAYOUT,
    "layoutlmv2": LAYOUT,
    "layoutlmv3": LAYOUT,
    "lilt": LAYOUT,
    "lxmert": "answers questions about images, which question answering on text does not have",
    "mra": "its attention is a CUDA kernel of its own; elsewhere transformers computes zeros for it",
    "reformer": "draws its own random seeds in training, so that a run could not be resumed exactly",
    "nllb-moe": "its experts drop tokens that depend on the rest of the batch, in training and after it",
    "prophetnet": "in transformers, its predictions depend on later tokens of the target",
    "seamless_m4t": "its targets begin with the token that ends a text, so that generation ends at once",
    "seamless_m4t_v2": "its targets begin with the token that ends a text, so that generation ends at once",
}
# Positions are numbered from pad_token_id + 1.
PADDED_POSITIONS = {
    "camembert", "data2vec-text", "esm", "longformer", "luke", "markuplm", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
RELATIVE_POSITIONS = {
    "bloom", "funnel", "longt5", "mt5", "switch_transformers", "t5", "t5gemma", "t5gemma2", "umt5", "xlnet",
}  # fmt: skip
# Some of their parameters take no part in answering a question: a pooler, another modality.
UNUSED_PARAMETERS = {
    "axk2", "encoder-decoder", "esm", "flaubert", "fnet", "luke", "marian", "markuplm", "modernvbert",
    "pegasus", "qwen3_5", "qwen3_asr", "roformer", "squeezebert", "t5gemma2", "ultravbert", "xlm", "xlnet",
}  # fmt: skip
# Each of their experts has parameters of its own, without a gradient on a rank that did not use it.
SEPARATE_EXPERTS = {"switch_transformers"}
# They look token_type_ids up among the words.
NO_SEGMENTS = {"flaubert", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "xlm"}


def require_usable(config: Any, path: str) -> None:
    """Raise InputError, with the reason, for a family that can't be trained on text or not exactly."""
    kind = config.model_type
    if kind in REFUSED:
        raise InputError(f"model.path {path}: a {kind} model can't be used: it {REFUSED[kind]}.")
    if kind == "xmod" and not config.default_language:
        raise InputError(
            f"model.path {path}: an xmod model has one adapter per language; set default_language in its"
            f" config.json, to one of {', '.join(config.languages)}."
        )
    if kind == "nystromformer" and config.num_landmarks != config.segment_means_seq_len:
        raise InputError(
            f"model.path {path}: this nystromformer works at one length only; set num_landmarks to"
            f" {config.segment_means_seq_len} in its config.json, as segment_means_seq_len."
        )


def set_everywhere(config: Any, key: str, value: Any) -> bool:
    """Set a value of a config and of the configs inside it that have it. Return whether any has it."""
    from transformers import PreTrainedConfig

    inside = [part for part in vars(config).values() if isinstance(part, PreTrainedConfig)]
    found = any([set_everywhere(part, key, value) for part in inside])
    if hasattr(config, key):
        setattr(config, key, value)
        return True
    return found


def prepare(config: Any) -> None:
    """Change a config before its model is loaded. BigBird's sparse attention depends on which batches came
    before, and its blocks on the padding: full attention depends on neither. A layer that one rank drops and
    another does not would have no common gradient, so none is dropped.
    """
    for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        set_everywhere(config, name, 0.0)
    if config.model_type in ("big_bird", "bigbird_pegasus"):
        config.attention_type = "original_full"


def input_limit(config: Any) -> int:
    """Maximum length of an input in tokens, special tokens included; NO_LIMIT for relative positions."""
    kind = config.model_type
    if kind == "encoder-decoder":
        return input_limit(config.encoder)
    if kind in RELATIVE_POSITIONS or not getattr(config, "position_biased_input", True):
        return NO_LIMIT
    if kind == "led":  # the encoder's, rounded down to whole attention windows
        windows = config.attention_window
        window = windows if isinstance(windows, int) else max(windows)
        return int(config.max_encoder_position_embeddings // window * window)
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    limits = [getattr(text, name, None) for name in names]
    limit = int(next((n for n in limits if n), NO_LIMIT))
    if kind == "mpnet":  # its padding index is fixed, whatever its config says
        return limit - 2
    return limit - ((config.pad_token_id or 0) + 1 if kind in PADDED_POSITIONS else 0)


def target_limit(config: Any) -> int:
    """Maximum length of a decoder's input in tokens; NO_LIMIT for relative positions."""
    if config.model_type == "encoder-decoder":
        return input_limit(config.decoder)
    if config.model_type == "led":
        return int(config.max_decoder_position_embeddings)
    return input_limit(config)


def span_limit(config: Any) -> int:
    """input_limit of a span model. An encoder-decoder also feeds the input to its decoder."""
    both = (input_limit(config), target_limit(config))
    return min(both) if config.is_encoder_decoder else both[0]


def takes_segments(network_class: Any, config: Any) -> bool:
    """Whether a network tells question and context apart by token_type_ids of 0 and 1."""
    kinds = getattr(config, "type_vocab_size", None)
    if config.model_type in NO_SEGMENTS or (kinds is not None and kinds < 2):
        return False
    return "token_type_ids" in inspect.signature(network_class.forward).parameters


def extra_inputs(config: Any, input_ids: Tensor) -> dict[str, Tensor]:
    """Inputs of a family besides the usual ones. Longformer: tokens before the first separator, which are the
    question, attend to everything and are attended to by everything. LED: the first token does.
    """
    if config.model_type == "longformer":
        after = (input_ids == config.sep_token_id).cumsum(dim=1) > 0
        return {"global_attention_mask": (~after).long()}
    if config.model_type == "led":
        first = torch.zeros_like(input_ids)
        first[:, 0] = 1
        return {"global_attention_mask": first}
    return {}

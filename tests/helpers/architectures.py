"""Tiny configs for every model of transformers' tables that reads text."""

from __future__ import annotations

from typing import Any

VOCABULARY = 120
USUAL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 36,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64,
}  # fmt: skip
KEYS: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 36,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 36,
    "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 16, "d_ff": 36, "num_layers": 2,
    "num_decoder_layers": 2, "num_heads": 2, "decoder_start_token_id": 0,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 16, "num_key_value_heads": 2,
}  # fmt: skip
LINEAR: dict[str, Any] = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 36}
XLM: dict[str, Any] = {"emb_dim": 32, "n_layers": 2, "n_heads": 2, "n_langs": 2, "use_lang_emb": True}
NARROW: dict[str, Any] = {"embedding_size": 16}
SPARSE: dict[str, Any] = {"block_size": 4, "num_random_blocks": 1}
FEW_KEYS: dict[str, Any] = {"num_key_value_heads": 2}
POOLER: dict[str, Any] = {"pooler_hidden_size": 32}
# What differs from USUAL.
CHANGES: dict[str, dict[str, Any]] = {
    "albert": NARROW, "electra": NARROW, "convbert": NARROW, "roformer": NARROW,
    "mobilebert": {**NARROW, "intra_bottleneck_size": 16}, "squeezebert": {"embedding_size": 32},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16},
    "deberta": POOLER, "deberta-v2": POOLER, "big_bird": SPARSE, "longformer": {"attention_window": 8},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 36},
    "flaubert": XLM, "xlm": XLM, "xmod": {"default_language": "en_XX"}, "bloom": {"n_layer": 2, "n_head": 2},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 36, "d_head": 16},
    "funnel": {
        "block_sizes": [1, 1], "block_repeats": [1, 1], "num_decoder_layers": 1, "d_model": 32, "n_head": 2,
        "d_head": 16, "d_inner": 36,
    },
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 16},
    "markuplm": {
        "max_depth": 4, "xpath_unit_hidden_size": 8, "max_xpath_tag_unit_embeddings": 20,
        "max_xpath_subs_unit_embeddings": 20, "tag_pad_id": 18, "subs_pad_id": 18,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 16, "shape_embed_dim": 16, "pronunciation_vocab_size": VOCABULARY,
        "shape_vocab_size": VOCABULARY,
    },
    "gpt2": GPT2, "gpt-sw3": GPT2, "gpt_bigcode": GPT2, "gptj": {**GPT2, "rotary_dim": 8},
    "gpt_neo": {
        "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8,
    },
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64},
    "opt": {"ffn_dim": 36, "word_embed_proj_dim": 32}, "falcon": {"num_kv_heads": 2, "ffn_hidden_size": 36},
    "t5": T5, "mt5": T5, "umt5": T5, "bart": BART, "mbart": BART, "mvp": BART,
    "led": {
        **BART, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64,
        "attention_window": 8,
    },
    "bigbird_pegasus": {**BART, **SPARSE},
    "exaone4": FEW_KEYS, "qwen2": FEW_KEYS, "apertus": FEW_KEYS, "phi": FEW_KEYS, "stablelm": FEW_KEYS,
    "starcoder2": FEW_KEYS, "smollm3": FEW_KEYS, "phi3": FEW_KEYS,
    **{
        kind: KEYS
        for kind in (
            "arcee", "llama", "diffllama", "ministral", "ministral3", "mistral", "nemotron", "qwen3",
            "seed_oss", "ultrabert", "esmc", "eurobert", "gemma", "gemma2", "glm", "glm4", "helium",
        )
    },
    "minimax": {**EXPERTS, **KEYS}, "mixtral": {**EXPERTS, **KEYS}, "qwen2_moe": {**EXPERTS, **FEW_KEYS},
    "qwen3_moe": {**EXPERTS, **KEYS}, "qwen3_next": {**EXPERTS, **LINEAR, **KEYS},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, **KEYS},
    "openai_privacy_filter": {"num_local_experts": 4, "num_experts_per_tok": 2, **KEYS},
    "deepseek_v3": DEEPSEEK, "mistral4": DEEPSEEK, "axk1": DEEPSEEK,
    "axk2": {**DEEPSEEK, "index_topk": 64, "index_head_dim": 16, "index_n_heads": 2},
    "esm": {"mask_token_id": 4},
}  # fmt: skip
WITHOUT = {"xlnet": ["max_position_embeddings"], "funnel": ["num_hidden_layers"]}
VISION = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
GEMMA: dict[str, Any] = {**USUAL, **KEYS}
BERT: dict[str, Any] = {**USUAL, "model_type": "bert"}
# Configs inside configs: instead of USUAL.
NESTED: dict[str, dict[str, Any]] = {
    "modernvbert": {
        "text_config": {**USUAL, "model_type": "modernbert", "pad_token_id": 0}, "vision_config": VISION,
        "image_token_id": 119,
    },
    "ultravbert": {
        "text_config": {**USUAL, **KEYS, "model_type": "ultrabert"}, "vision_config": VISION,
        "image_token_id": 119,
    },
    "qwen3_5": {
        "text_config": {**USUAL, **LINEAR, **KEYS}, "image_token_id": 119, "video_token_id": 118,
        "vision_start_token_id": 117, "vision_end_token_id": 116,
        "vision_config": {
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": 8, "num_position_embeddings": 16, "deepstack_visual_indexes": [],
        },
    },
    "qwen3_asr": {
        "text_config": {**USUAL, **KEYS, "model_type": "qwen3"}, "eos_token_id": 1, "audio_token_id": 119,
        "timestamp_token_id": 118,
        "audio_config": {
            "num_mel_bins": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16,
            "d_model": 16, "output_dim": 32, "downsample_hidden_size": 8, "max_source_positions": 32,
            "num_hidden_layers": 1,
        },
    },
    "t5gemma": {
        "encoder": GEMMA, "decoder": {**GEMMA, "cross_attention_hidden_size": 32}, "vocab_size": VOCABULARY,
    },
    "t5gemma2": {
        "encoder": {"text_config": GEMMA, "vision_config": VISION, "mm_tokens_per_image": 4},
        "decoder": GEMMA, "image_token_index": 119, "eoi_token_index": 118,
    },
}  # fmt: skip
# Text to text, where it differs from the above.
TEXT: dict[str, dict[str, Any]] = {
    **{
        kind: BART
        for kind in ("blenderbot", "blenderbot-small", "m2m_100", "pegasus", "plbart", "mbart")
    },
    "encoder-decoder": {
        "encoder": BERT, "decoder": {**BERT, "is_decoder": True, "add_cross_attention": True},
        "decoder_start_token_id": 2, "eos_token_id": 3,
    },
    "fsmt": {**BART, "langs": ["en", "de"], "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY},
    "longt5": {**T5, "local_radius": 3, "global_block_size": 4},
    "switch_transformers": {
        **T5, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
    },
    "marian": {
        **BART, "decoder_vocab_size": VOCABULARY, "pad_token_id": 0, "decoder_start_token_id": 2,
    },
    "pegasus_x": {**BART, **SPARSE, "num_global_tokens": 4},
}  # fmt: skip
TEXT["fsmt"].pop("vocab_size")
TEXT["pegasus_x"].pop("num_random_blocks")
for kind in ("mbart", "plbart"):
    TEXT[kind] = {**BART, "decoder_start_token_id": 2}


def config_of(kind: str, text: bool = False) -> Any:
    """A tiny config of this model type. text: for text to text."""
    from transformers import AutoConfig

    if text and kind in TEXT:
        return AutoConfig.for_model(kind, **TEXT[kind])
    if kind in NESTED:
        return AutoConfig.for_model(kind, **NESTED[kind], pad_token_id=0)
    usual = {name: value for name, value in USUAL.items() if name not in WITHOUT.get(kind, ())}
    padding = AutoConfig.for_model(
        kind, **{"default_language": "en_XX"} if kind == "xmod" else {}
    ).pad_token_id
    return AutoConfig.for_model(
        kind, **{**usual, "pad_token_id": padding if padding in (0, 1, 2, 3) else 0, **CHANGES.get(kind, {})}
    )

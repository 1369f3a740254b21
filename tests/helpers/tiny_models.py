"""Tiny models with random weights and their own vocabulary, for tests."""

from __future__ import annotations

from pathlib import Path


def tiny_bert(folder: Path, corpus: Path, *, positions: int = 128) -> Path:
    """A two-layer BERT with a WordPiece vocabulary learned from `corpus`: 35,000 parameters."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    trained = BertWordPieceTokenizer()
    trained.train_from_iterator([corpus.read_text()], vocab_size=600, show_progress=False)
    trained.save_model(str(folder))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=positions)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=positions,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def tiny_t5_for(folder: Path, corpus: Path) -> Path:
    """A T5 with 2 + 2 layers and a sentencepiece vocabulary learned from `corpus`: 60,000 parameters."""
    from plainloop.data.readers.causalqa import TextOptions, read_text
    from plainloop.models.tiny_t5 import write_tiny_t5

    rows = read_text([str(corpus)], TextOptions())
    write_tiny_t5(folder, [row.question + row.context for row in rows], width=32)
    return folder

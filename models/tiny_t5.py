"""Create a small T5 from scratch, with its own sentencepiece vocabulary, for demos and tests."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path


def write_tiny_t5(
    folder: Path,
    texts: Iterable[str],
    *,
    vocabulary: int = 400,
    width: int = 128,
    layers: int = 2,
    seed: int = 0,
) -> None:
    """Train the vocabulary on `texts`, initialise the weights, and write a folder that from_pretrained reads.

    vocabulary: maximum number of sentencepiece tokens; 100 sentinels are added, as in T5's tokenizer.
    """
    import sentencepiece
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    trained = io.BytesIO()
    # sentencepiece's candidates are strings that occur in two different words. In a small corpus most words
    # share no string with another, so add a variant of each.
    words = [form for text in texts for word in text.split() for form in (word, word + ",")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_writer=trained,
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(trained.getvalue())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}\n', encoding="utf-8")
    (folder / "tokenizer.json").unlink(missing_ok=True)  # a stale one would be read instead
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_heads=4,
        num_layers=layers,
        num_decoder_layers=layers,
    )
    config.decoder_start_token_id = 0  # <pad>, as in T5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = T5ForConditionalGeneration(config)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

"""The text model: logits and loss against transformers and by hand, generation, log-probabilities."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from plainloop.data.errors import InputError
from plainloop.data.types import IGNORE_INDEX
from plainloop.models import cpu_dropout
from plainloop.models.cpu_dropout import speed_up_dropout
from plainloop.models.load import load_tokenizer
from plainloop.models.seq2seq import generate, load_seq2seq_model, sequence_log_probs, token_loss_sum
from plainloop.models.tiny_t5 import write_tiny_t5

T5_LIKE: dict[str, Any] = {
    "vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 2, "decoder_start_token_id": 0,
}  # fmt: skip
BART_LIKE: dict[str, Any] = {
    "vocab_size": 60, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 40,
}  # fmt: skip
FAMILIES = [("t5", T5_LIKE), ("mt5", T5_LIKE), ("umt5", T5_LIKE), ("bart", BART_LIKE)]


@pytest.fixture(params=FAMILIES, ids=[name for name, _ in FAMILIES])
def folder(request: Any, tmp_path: Path) -> Path:
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    name, options = request.param
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(name, **options)).save_pretrained(tmp_path)
    return tmp_path


def batch() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    return {
        "input_ids": torch.arange(5, 21).view(2, 8),
        "attention_mask": mask,
        "decoder_input_ids": torch.tensor([[0, 7, 8, 9], [0, 11, 0, 0]]),
        "scored": torch.tensor([0, 1, 2, 3, 4, 5]),
    }


def test_logits_match_transformers_at_the_scored_positions(folder: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    theirs = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    model = load_seq2seq_model(str(folder)).eval()
    full = {name: tensor for name, tensor in batch().items() if name != "scored"}
    expected = theirs(**full).logits.reshape(8, -1)[:6]
    torch.testing.assert_close(model(**batch()), expected, atol=1e-6, rtol=1e-5)
    speed_up_dropout(model.network)
    torch.testing.assert_close(model(**batch()), expected, atol=1e-6, rtol=1e-5)
    assert model.network(**full).logits.shape == (2, 4, 60)  # generation gets the logits of all positions


def test_cpu_attention_that_drops_nothing_matches_eval(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training mode, with a mask that drops nothing: causal mask, padding and T5's bias are applied."""
    model = load_seq2seq_model(str(folder))
    expected = model.eval()(**batch())
    monkeypatch.setattr(cpu_dropout, "cpu_dropout", lambda x, p: x)
    monkeypatch.setattr(functional, "dropout", lambda x, p=0.5, training=True: x)  # BART, outside attention
    speed_up_dropout(model.network)
    for module in model.modules():
        if hasattr(module, "is_causal"):  # an attention module: force the dropout path
            module.dropout = 0.1
    torch.testing.assert_close(model.train()(**batch()), expected, atol=1e-5, rtol=1e-4)


def test_gradients_reach_every_parameter(folder: Path) -> None:
    model = load_seq2seq_model(str(folder)).train()
    speed_up_dropout(model.network)
    token_loss_sum(model(**batch()), {"target": torch.tensor([7, 8, 9, 1, 11, 1])}).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing, "DDP would hang on these"


def test_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0], [9.0, 9.0, 9.0]])
    labels = {"target": torch.tensor([1, 0, IGNORE_INDEX])}
    log_probs = functional.log_softmax(logits, dim=1)
    plain = -(log_probs[0, 1] + log_probs[1, 0])
    torch.testing.assert_close(token_loss_sum(logits, labels), plain)
    smooth = 0.9 * plain - 0.1 / 3 * log_probs[:2].sum()
    torch.testing.assert_close(token_loss_sum(logits, labels, label_smoothing=0.1), smooth)
    nothing = {"target": torch.full((3,), IGNORE_INDEX)}
    assert token_loss_sum(logits, nothing).item() == 0


def test_generation_is_greedy(folder: Path) -> None:
    """Compare tokens and summed log-probabilities with a plain loop over full forward passes."""
    model = load_seq2seq_model(str(folder)).eval()
    inputs = {name: tensor for name, tensor in batch().items() if name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        ids = generate(model, inputs, max_new_tokens=6)
        found = sequence_log_probs(model, inputs, ids)
        special = model.network.generation_config
        start, end = special.decoder_start_token_id, special.eos_token_id
        for row in range(2):
            tokens, total = [start], 0.0
            while len(tokens) <= 6 and (tokens[-1] != end or len(tokens) == 1):
                alone = {n: t[row : row + 1] for n, t in inputs.items()}
                logits = model.network(**alone, decoder_input_ids=torch.tensor([tokens])).logits[0, -1]
                forced = special.forced_eos_token_id if len(tokens) == 6 else None
                best = int(logits.argmax()) if forced is None else forced
                total += float(functional.log_softmax(logits, dim=0)[best])
                tokens.append(best)
            generated = ids[row, : len(tokens) - 1].tolist()
            assert generated == tokens[1:]
            if special.pad_token_id not in generated:
                assert found[row].item() == pytest.approx(total, abs=1e-4)
        assert generate(model, inputs, max_new_tokens=6, num_beams=3).shape[0] == 2


def test_a_tiny_t5_from_scratch(tmp_path: Path) -> None:
    texts = ["the bridge was closed because of ice", "the mill burned because of fire"]
    write_tiny_t5(tmp_path, texts * 20, vocabulary=60)
    tokenizer = load_tokenizer(str(tmp_path), fast=False)
    ids = tokenizer("the bridge was closed because of fire")["input_ids"]
    assert ids[-1] == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the bridge was closed because of fire"
    assert load_seq2seq_model(str(tmp_path)).network.config.vocab_size == len(tokenizer)


def test_encoder_only_model_is_rejected(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="no model can be loaded"):
        load_seq2seq_model(str(tiny_model))

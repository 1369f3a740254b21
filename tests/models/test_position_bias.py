"""T5's bias and mask, merged once per stack: same logits and gradients, fewer large tensors, no leaks."""

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from plainloop.models.load import checkpoint_activations
from plainloop.models.position_bias import SHARED_BIAS, share_position_bias
from plainloop.models.seq2seq import Seq2SeqModel, generate, load_seq2seq_model
from plainloop.models.spans import load_span_model


@pytest.fixture
def pair(tiny_t5: Path) -> tuple[Seq2SeqModel, Seq2SeqModel]:
    """(the model as in transformers, with our shared bias), in training mode without dropout."""
    plain = load_seq2seq_model(str(tiny_t5), dropout=0.0)
    shared = Seq2SeqModel(copy.deepcopy(plain.network))
    share_position_bias(shared.network)
    return plain.train(), shared.train()


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 90, (3, 48), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 30:] = mask[2, 7:] = 0
    return {
        "input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :10],
        "scored": torch.arange(30),
    }  # fmt: skip


class Large(TorchDispatchMode):
    """Count tensors of shape (rows, heads, 48, 48)."""

    count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.count += isinstance(result, torch.Tensor) and result.shape[-2:] == (48, 48)
        return result


@pytest.mark.parametrize("recompute", [False, True])
def test_logits_and_gradients_are_the_same(pair: Any, recompute: bool) -> None:
    found = []
    for model in pair:
        if recompute:
            checkpoint_activations(model.network)
        with Large() as large:
            logits = model(**inputs())
        logits.square().mean().backward()
        found.append((logits, {n: p.grad for n, p in model.named_parameters()}, large.count))
    (plain, gradients, before), (shared, ours, after) = found
    assert torch.equal(plain, shared) and (recompute or after < before)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, ours[name], rtol=1e-4, atol=1e-7), name


def test_generated_texts_are_the_same(pair: Any) -> None:
    texts = [generate(model.eval(), inputs(), max_new_tokens=6).tolist() for model in pair]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("recompute", [False, True])
def test_masks_are_freed_after_each_pass(pair: Any, recompute: bool) -> None:
    model = pair[1]
    if recompute:
        checkpoint_activations(model.network)
    for _ in range(3):
        model(**inputs()).square().mean().backward()
    gc.collect()
    kept = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.ndim == 4 and len(t) == 3]
    assert not kept


def test_other_networks_keep_their_attention(tiny_model: Path) -> None:
    network = load_span_model(str(tiny_model), new_head=True).network
    before = network.config._attn_implementation
    share_position_bias(network)
    assert network.config._attn_implementation == before != SHARED_BIAS

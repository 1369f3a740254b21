"""The span model: loss by hand, several architectures, checkpoints compatible with transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from plainloop.data.errors import InputError
from plainloop.data.types import IGNORE_INDEX
from plainloop.models.cpu_dropout import speed_up_dropout
from plainloop.models.load import load_tokenizer
from plainloop.models.spans import load_span_model, span_loss_sum

SMALL: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 40,
}  # fmt: skip


def inputs() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    return {"input_ids": torch.arange(5, 21).view(2, 8), "attention_mask": mask}


def test_loss_by_hand() -> None:
    logits = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [1.0, 3.0]], [[9.0, 9.0], [0.0, 0.0], [0.0, 0.0]]])
    labels = {"start": torch.tensor([1, IGNORE_INDEX]), "end": torch.tensor([2, IGNORE_INDEX])}
    log = torch.tensor
    start = -(2.0 - torch.logsumexp(log([0.0, 2.0, 1.0]), 0))
    end = -(3.0 - torch.logsumexp(log([1.0, 0.0, 3.0]), 0))
    assert span_loss_sum(logits, labels).item() == pytest.approx(((start + end) / 2).item(), rel=1e-6)
    nothing = {name: torch.full_like(label, IGNORE_INDEX) for name, label in labels.items()}
    assert span_loss_sum(logits, nothing).item() == 0


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "deberta-v2", "distilbert"])
def test_encoders_of_several_families(tmp_path: Path, family: str) -> None:
    from transformers import AutoConfig, AutoModel

    AutoModel.from_config(AutoConfig.for_model(family, **SMALL)).save_pretrained(tmp_path)
    model = load_span_model(str(tmp_path), new_head=True).train()
    speed_up_dropout(model.network)
    logits = model(**inputs())
    assert logits.shape == (2, 8, 2) and logits.dtype == torch.float32
    labels = {"start": torch.tensor([1, 2]), "end": torch.tensor([3, 4])}
    span_loss_sum(logits, labels).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing, "DDP would hang on these"
    model.eval()
    alone = {name: tensor[1:, :5] for name, tensor in inputs().items()}
    torch.testing.assert_close(model(**inputs())[1, :5], model(**alone)[0], atol=1e-5, rtol=1e-4)
    loss = span_loss_sum(model(**inputs())[1:], {"start": torch.tensor([2]), "end": torch.tensor([2])})
    unpadded = span_loss_sum(model(**alone), {"start": torch.tensor([2]), "end": torch.tensor([2])})
    torch.testing.assert_close(loss, unpadded)  # softmax over the unpadded positions


def test_checkpoints_are_interchangeable_with_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForQuestionAnswering, BertConfig, BertForQuestionAnswering

    theirs = BertForQuestionAnswering(BertConfig(**SMALL)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_span_model(str(tmp_path / "theirs"), new_head=False).eval()
    expected = theirs(**inputs())
    got = ours(**inputs())
    assert torch.equal(got[0, :, 0], expected.start_logits[0]) and torch.equal(
        got[0, :, 1], expected.end_logits[0]
    )
    ours.network.save_pretrained(tmp_path / "ours")
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again(**inputs()).start_logits, expected.start_logits)


def test_checkpoint_without_a_qa_head_is_rejected(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="qa_outputs"):
        load_span_model(str(tiny_model), new_head=False)


def test_dropout_overrides(tiny_model: Path) -> None:
    config = load_span_model(
        str(tiny_model), new_head=True, dropout=0.3, attention_dropout=0.2
    ).network.config
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.3, 0.2)


def test_folders_without_a_model_or_fast_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load_tokenizer("./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path / "empty"))
    with pytest.raises(InputError, match="no model can be loaded"):
        load_span_model(str(tmp_path / "empty"), new_head=True)
    (tmp_path / "slow").mkdir()  # ByT5 works on bytes: transformers has no fast tokenizer for it
    (tmp_path / "slow/tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(InputError, match="has no fast tokenizer"):
        load_tokenizer(str(tmp_path / "slow"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_same_logits_on_a_gpu(tiny_model: Path) -> None:
    model = load_span_model(str(tiny_model), new_head=True).eval()
    expected = model(**inputs())
    moved = {name: tensor.cuda() for name, tensor in inputs().items()}
    torch.testing.assert_close(model.cuda()(**moved).cpu(), expected, atol=1e-4, rtol=1e-3)

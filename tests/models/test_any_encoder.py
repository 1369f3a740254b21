"""Encoders beyond BERT: heads of other names, token classification, attention, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.architectures import config_of
from helpers.matrix import write_tokenizer

from plainloop.data.errors import InputError
from plainloop.models.cpu_dropout import speed_up_dropout
from plainloop.models.families import input_limit, span_limit, takes_segments, target_limit
from plainloop.models.spans import load_span_model, span_class, span_loss_sum


def written(kind: str, folder: Path, auto: Any = None, **changes: Any) -> Path:
    """A tiny model of random weights in a folder."""
    config = config_of(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    (auto or span_class(config, "")).from_config(config).save_pretrained(folder)
    return folder


def inputs() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, 9:] = 0
    return {
        "input_ids": torch.randint(5, 100, (2, 16), generator=torch.manual_seed(1)) * mask,
        "attention_mask": mask,
    }


def test_modernbert_is_that_of_transformers(tmp_path: Path) -> None:
    """The same logits; the loss and the gradient of a step written by hand."""
    from transformers import ModernBertForQuestionAnswering

    written("modernbert", tmp_path)
    ours = load_span_model(str(tmp_path), new_head=False).eval()
    theirs = ModernBertForQuestionAnswering.from_pretrained(tmp_path, dtype=torch.float32).eval()
    got, expected = ours(**inputs()), theirs(**inputs())
    visible = inputs()["attention_mask"] == 1
    for i, logits in enumerate((expected.start_logits, expected.end_logits)):
        torch.testing.assert_close(got[..., i][visible], logits[visible], atol=1e-6, rtol=0)
    labels = {"start": torch.tensor([3, 0]), "end": torch.tensor([5, 2])}
    loss = span_loss_sum(got, labels)
    loss.backward()
    by_hand = torch.zeros(())
    for logits, name in ((expected.start_logits, "start"), (expected.end_logits, "end")):
        for row, label in enumerate(labels[name]):
            seen = logits[row][visible[row]]
            by_hand = by_hand + (torch.logsumexp(seen, 0) - seen[label]) / 2
    by_hand.backward()
    torch.testing.assert_close(loss, by_hand, atol=1e-5, rtol=1e-6)
    named = dict(theirs.named_parameters())
    for name, parameter in ours.network.named_parameters():
        torch.testing.assert_close(parameter.grad, named[name].grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["modernbert", "big_bird", "splinter", "electra", "xlnet", "t5", "eurobert"])
def test_a_pretrained_encoder_gets_a_new_head(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    written(kind, tmp_path, AutoModel)
    model = load_span_model(str(tmp_path), new_head=True)
    new = {name.partition(".")[0] for name in model.network.new_parameters}
    assert new and new <= {"qa_outputs", "classifier", "head", "qa_classifier", "splinter_qass"}
    with pytest.raises(InputError, match="weights are missing"):
        load_span_model(str(tmp_path), new_head=False)


def test_a_causal_model_that_would_lose_its_layers_is_refused(tmp_path: Path) -> None:
    """transformers loads a LlamaForCausalLM as a question-answering model without one of its weights."""
    from transformers import AutoModelForCausalLM

    with pytest.raises(InputError, match="weights are missing .*layers"):
        load_span_model(str(written("llama", tmp_path, AutoModelForCausalLM)), new_head=True)


def test_token_classification_is_a_span_head(tmp_path: Path) -> None:
    from transformers import AutoModelForTokenClassification

    written("eurobert", tmp_path / "ner", AutoModelForTokenClassification, num_labels=5)
    with pytest.raises(InputError, match="wrong shape"):  # five labels: the head is another task's
        load_span_model(str(tmp_path / "ner"), new_head=False)
    model = load_span_model(str(tmp_path / "ner"), new_head=True).eval()
    assert model.network.new_parameters == ["classifier.bias", "classifier.weight"]
    model.network.save_pretrained(tmp_path / "ours")
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path / "ours").eval()
    assert plain.config.id2label == {0: "start", 1: "end"}
    visible = inputs()["attention_mask"] == 1
    assert torch.equal(plain(**inputs()).logits[visible], model(**inputs())[visible])


def test_the_head_of_another_task_is_new(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    written("modernbert", tmp_path, AutoModelForSequenceClassification, num_labels=2)
    model = load_span_model(str(tmp_path), new_head=True)
    assert model.network.new_parameters[:2] == ["classifier.bias", "classifier.weight"]


def test_longformer_attends_globally_to_the_question_whatever_its_separators(tmp_path: Path) -> None:
    """transformers' own rule needs exactly three separators in every row."""
    written("longformer", tmp_path, sep_token_id=3)
    model = load_span_model(str(tmp_path), new_head=False).eval()
    batch = inputs()
    batch["input_ids"][:, [4, 5, 8]] = 3
    plain = model.network(**batch)  # its own rule: global up to the first separator
    torch.testing.assert_close(model(**batch)[0, :, 0], plain.start_logits[0])
    batch["input_ids"][:, 5] = 7
    assert model(**batch).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "limit"),
    [("bert", 64), ("roberta", 62), ("camembert", 62), ("xlm-roberta", 62), ("mpnet", 62), ("markuplm", 63),
     ("xlnet", 2**31), ("t5", 2**31), ("gpt2", 64), ("mpt", 64), ("led", 64), ("modernbert", 64),
     ("modernvbert", 64)],
)  # fmt: skip
def test_longest_input(kind: str, limit: int) -> None:
    assert span_limit(config_of(kind)) == limit


def test_limits_of_encoder_decoders() -> None:
    config = config_of("led")
    config.attention_window, config.max_encoder_position_embeddings = [8, 24], 64
    assert (input_limit(config), target_limit(config), span_limit(config)) == (48, 64, 48)
    pair = config_of("encoder-decoder", text=True)
    pair.encoder.max_position_embeddings = 32
    assert (input_limit(pair), target_limit(pair)) == (32, 64)


def test_segments_only_where_they_are_segments() -> None:
    for kind, expected in (
        ("bert", True),
        ("roberta", False),
        ("gpt2", False),
        ("xlm", False),
        ("deberta", False),
    ):
        config = config_of(kind)
        if kind == "roberta":
            config.type_vocab_size = 1
        assert takes_segments(span_class(config, "")._model_mapping[type(config)], config) == expected, kind


def test_shared_key_heads_and_dropout_on_a_cpu(tmp_path: Path) -> None:
    written("llama", tmp_path, num_key_value_heads=1, num_attention_heads=2, attention_dropout=0.5)
    model = load_span_model(str(tmp_path), new_head=False)
    expected = model.eval()(**inputs())
    speed_up_dropout(model.network)
    torch.testing.assert_close(model(**inputs()), expected, atol=1e-5, rtol=1e-4)
    model.train()(**inputs())


def test_attention_is_an_option(tmp_path: Path) -> None:
    path = str(written("bert", tmp_path / "bert"))
    for attention in ("eager", "sdpa"):
        model = load_span_model(path, new_head=False, attention=attention)
        assert model.network.config._attn_implementation == attention
    for attention in ("flash_attention_2", "foo"):
        with pytest.raises(InputError, match=f"model.attention {attention}: .*leave it out, or choose eager"):
            load_span_model(path, new_head=False, attention=attention)
    path = str(written("deberta-v2", tmp_path / "deberta"))
    with pytest.raises(InputError, match="model.attention sdpa: .*does not support"):
        load_span_model(path, new_head=False, attention="sdpa")


def test_refusals_say_why(tmp_path: Path) -> None:
    from transformers import AutoConfig

    for kind, changes, reason in (
        ("layoutlmv3", {}, "needs the boxes of the words"), ("lxmert", {}, "about images"),
        ("xmod", {}, "set default_language in its config.json, to one of en_XX"),
        ("nystromformer", {"num_landmarks": 8}, "set num_landmarks to 64"),
        ("vit", {}, "no question-answering or token-classification class for a vit"),
    ):  # fmt: skip
        AutoConfig.for_model(kind, **changes).save_pretrained(tmp_path)
        with pytest.raises(InputError, match=reason) as caught:
            load_span_model(str(tmp_path), new_head=True)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_without_cls_uses_the_first_token(tmp_path: Path) -> None:
    from plainloop.data.span_features import span_windows
    from plainloop.data.types import Answer, Example
    from plainloop.models.load import load_tokenizer

    write_tokenizer(tmp_path, 0)
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.cls_token = None
    examples = [
        Example("1", "who saw", "ada saw bob " * 3, (Answer("bob", 8),)),
        Example("2", "who", "it was"),
    ]
    arrays = span_windows(examples, tokenizer, max_length=64, stride=8)
    assert arrays["cls"].tolist() == [0, 0] and arrays["label"][1].tolist() == [0, 0]

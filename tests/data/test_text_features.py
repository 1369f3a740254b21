"""Source and target ids: the separator, truncation that keeps the question, windows, and batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plainloop.data.errors import InputError
from plainloop.data.loader import Steps, TextCollate
from plainloop.data.readers.causalqa import SEPARATOR
from plainloop.data.samplers import Sampler
from plainloop.data.store import build
from plainloop.data.text_features import pair_rows
from plainloop.data.types import TextExample
from plainloop.models.load import load_tokenizer


@pytest.fixture(scope="module")
def t5(real_data: Path) -> Any:
    return load_tokenizer(str(real_data / "tokenizers/t5"), fast=False)


def example(question: str, context: str, target: str = "so") -> TextExample:
    return TextExample("x", question + SEPARATOR, context, (target,), (target,))


def rows(arrays: dict[str, np.ndarray], name: str = "input_ids", length: str = "length") -> list[list[int]]:
    return [part.tolist() for part in np.split(arrays[name], np.cumsum(arrays[length])[:-1])]


def test_the_separator_reaches_the_model(t5: Any) -> None:
    assert t5("a \\n b", add_special_tokens=False)["input_ids"][2:5] == [3, 2, 29]
    assert t5("Hello world")["input_ids"] == [8774, 296, 1]
    arrays = pair_rows([example("why ?", "it is")], t5, max_source_length=64, max_target_length=8)
    assert rows(arrays) == [t5("why ? \\n it is")["input_ids"]]
    assert rows(arrays, "target_ids", "target_length") == [t5("so")["input_ids"]]


def test_truncation_keeps_the_question_and_the_end_token(t5: Any) -> None:
    long = example("why is it so ?", "word " * 100, "answer " * 50)
    question = t5("why is it so ? \\n", add_special_tokens=False)["input_ids"]
    arrays = pair_rows([long, example("q", "c")], t5, max_source_length=30, max_target_length=10)
    source, _ = rows(arrays)
    assert len(source) == 30 and source[: len(question)] == question and source[-1] == 1
    target, _ = rows(arrays, "target_ids", "target_length")
    assert len(target) == 10 and target[-1] == 1
    assert arrays["cut"].tolist() == [True, False] and arrays["target_cut"].tolist() == [True, False]
    for length in (6, len(question) + 1, len(question) + 10):
        with pytest.raises(InputError, match=r"id 'x': the question leaves no room .* never truncated"):
            pair_rows([long], t5, max_source_length=length, max_target_length=10)


@pytest.mark.parametrize("length", [30, 41, 64])
def test_windows_contain_the_question_and_cover_the_context(t5: Any, length: int) -> None:
    words = " ".join(f"{n}" for n in range(100, 180))
    arrays = pair_rows(
        [example("why", words), example("q", "c")],
        t5,
        max_source_length=length,
        max_target_length=8,
        stride=8,
    )
    head = len(t5("why \\n", add_special_tokens=False)["input_ids"])
    whole = t5(example("why", words).question + words)["input_ids"]
    windows = rows(arrays)[:-1]
    assert arrays["example"].tolist() == [0] * len(windows) + [1]
    assert all(len(w) <= length and w[:head] == whole[:head] and w[-1] == 1 for w in windows)
    step = len(windows[0]) - head - 1 - 8
    joined = windows[0][head:-1]
    for window in windows[1:]:
        assert window[head : head + 8] == joined[-8:]
        joined += window[head + 8 : -1]
    assert joined == whole[head:-1] and step > 0


def test_batches_by_hand(tmp_path: Path, t5: Any) -> None:
    examples = [example(f"why {'so ' * n}", "it is", "yes " * (1 + n % 3)) for n in range(12)]
    arrays = pair_rows(examples, t5, max_source_length=64, max_target_length=16)
    store = build(tmp_path / "s", lambda writer: writer.append(arrays) or {})
    inputs, labels = TextCollate(store, pad_token_id=0, start_token_id=0, max_length=64)(np.array([0, 2]))
    targets = [store.target(0).tolist(), store.target(2).tolist()]
    assert labels["target"].tolist() == targets[0] + targets[1]
    decoder, scored = inputs["decoder_input_ids"], inputs["scored"].tolist()
    assert decoder.shape == (2, 8) and decoder[1, : len(targets[1])].tolist() == [0, *targets[1][:-1]]
    assert scored == [*range(len(targets[0])), *range(8, 8 + len(targets[1]))]
    both = np.stack([store.lengths, store.arrays["target_length"]], axis=1)
    counts = np.asarray(store.arrays["target_length"]).astype(np.int64)
    for world_size in (1, 2, 3):
        ranks = [
            Steps(Sampler(both, 4, seed=1, bucket=2), TextCollate(store, 0, 0, 64), counts,
                  world_size=world_size, rank=rank, max_tokens=90)
            for rank in range(world_size)
        ]  # fmt: skip
        for step in range(3):
            batches = [steps[step] for steps in ranks]
            scored_tokens = sum(
                int((m.labels["target"] >= 0).sum()) for b in batches for m in b.micro_batches
            )
            assert {b.num_targets for b in batches} == {scored_tokens}
            for batch in batches:
                assert all(
                    m.inputs["input_ids"].numel() + m.inputs["decoder_input_ids"].numel() <= 90
                    or len(m.inputs["input_ids"]) == 1
                    for m in batch.micro_batches
                )

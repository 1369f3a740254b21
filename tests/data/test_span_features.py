"""Windows and labels: cases that common implementations get wrong, and known window counts."""

import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plainloop.data.errors import InputError
from plainloop.data.readers.examples import read_examples
from plainloop.data.span_features import question_limit, span_windows
from plainloop.data.tokenise import in_chunks
from plainloop.data.types import Answer, Example


@pytest.fixture(scope="module")
def roberta(real_data: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real_data / "tokenizers/roberta")


@pytest.fixture(scope="module")
def bert(minilm: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm)


def example(context: str, answer: str, question: str = "Who is it?") -> Example:
    return Example("1", question, context, (Answer(answer, context.index(answer)),))


def labelled_text(arrays: dict[str, np.ndarray], context: str, window: int) -> str | None:
    """Text of a window's label, read back from its offsets; None if the label is the CLS position."""
    starts = np.concatenate([[0], np.cumsum(arrays["length"])])
    first, last = arrays["label"][window]
    if first == arrays["cls"][window]:
        assert last == first
        return None
    low, high = arrays["context"][window]
    assert low <= first <= last < high
    offsets = arrays["offsets"][starts[window] : starts[window + 1]]
    return context[offsets[first, 0] : offsets[last, 1]]


@pytest.mark.parametrize(
    ("context", "answer"),
    [
        ("Warsaw has the park Łazienki in the south.", "Łazienki"),
        ("The capital is 東京 today.", "東"),
        ("It is the last word", "word"),
        ("First of all", "First"),
        ("naïve café 🎉 party", "🎉"),
    ],
)
def test_label_is_the_answer_if_characters_are_split_into_tokens(
    roberta: Any, bert: Any, context: str, answer: str
) -> None:
    for tokenizer in (roberta, bert):
        arrays = span_windows([example(context, answer)], tokenizer, max_length=64, stride=8)
        text = labelled_text(arrays, context, 0)
        assert text is not None and answer in text
        assert text == answer or tokenizer is bert  # some characters are not in BERT's vocabulary


def test_every_window_is_labelled_with_the_whole_answer_or_none(bert: Any) -> None:
    words = [f"word{i}" for i in range(150)]
    context = " ".join(words)
    whole = 0
    for i in range(0, 147, 3):
        answer = " ".join(words[i : i + 3])
        arrays = span_windows([example(context, answer)], bert, max_length=64, stride=16)
        texts = [labelled_text(arrays, context, w) for w in range(len(arrays["length"]))]
        assert set(texts) <= {None, answer}
        whole += answer in texts
        starts = np.concatenate([[0], np.cumsum(arrays["length"])])
        for w, text in enumerate(texts):  # an answer inside the window is never missed
            low, high = arrays["context"][w] + starts[w]
            begin, end = arrays["offsets"][low, 0], arrays["offsets"][high - 1, 1]
            at = context.index(answer)
            assert (text is not None) == (begin <= at and at + len(answer) <= end)
    assert whole == 49


def test_windows_cover_the_context_and_overlap_by_the_stride(bert: Any) -> None:
    context = " ".join(["tree"] * 300)
    arrays = span_windows([example(context, "tree", "what is it")], bert, max_length=64, stride=16)
    starts = np.concatenate([[0], np.cumsum(arrays["length"])])
    spans = [arrays["offsets"][s + a : s + b] for s, (a, b) in zip(starts, arrays["context"], strict=False)]
    for left, right in zip(spans, spans[1:], strict=False):
        assert np.array_equal(left[-16:], right[:16])
    assert spans[0][0, 0] == 0 and spans[-1][-1, 1] == len(context)


@pytest.mark.parametrize("context", ["", "   ", "\n"])
def test_an_empty_context_is_one_window_labelled_cls(roberta: Any, bert: Any, context: str) -> None:
    for tokenizer in (roberta, bert):
        arrays = span_windows([Example("1", "Who?", context)], tokenizer, max_length=32, stride=4)
        assert len(arrays["length"]) == 1 and labelled_text(arrays, context, 0) is None


def test_question_longer_than_the_window_is_truncated_and_reported(roberta: Any, bert: Any) -> None:
    for tokenizer in (roberta, bert):
        cases = [example("The answer is here.", "here", "why " * 500), example("The answer is here.", "here")]
        arrays = span_windows(cases, tokenizer, max_length=64, stride=16)
        assert list(arrays["capped"]) == [True, False]
        assert arrays["length"].max() <= 64
        assert labelled_text(arrays, cases[0].context, 0) == "here"


@pytest.mark.parametrize("question", ["東" * 200, "🎉" * 200, "한" * 200, "why " * 130])
def test_question_with_many_tokens_per_character_is_truncated(roberta: Any, bert: Any, question: str) -> None:
    for tokenizer in (roberta, bert):
        arrays = span_windows(
            [example("Here it is. " * 99, "Here", question)], tokenizer, max_length=384, stride=128
        )
        assert arrays["length"].max() <= 384 and (np.diff(arrays["context"], axis=1) > 128).any()


def test_answer_is_never_located_in_the_question(bert: Any) -> None:
    arrays = span_windows(
        [example("Paris is it.", "Paris", "Paris Paris Paris?")], bert, max_length=64, stride=8
    )
    assert labelled_text(arrays, "Paris is it.", 0) == "Paris"


def test_stride_that_leaves_no_room_is_a_clear_error(bert: Any) -> None:
    with pytest.raises(InputError, match="data.stride 60"):
        question_limit(bert, max_length=64, stride=60)
    with pytest.raises(InputError, match="limit of 512"):
        question_limit(bert, max_length=600, stride=60)


def test_windows_do_not_depend_on_the_number_of_processes(bert: Any) -> None:
    cases = [example(f"In {y} it was {y} trees.", str(y)) for y in range(1000, 3500)]
    job = functools.partial(span_windows, tokenizer=bert, max_length=32, stride=8)
    whole = job(cases)
    for processes in (1, 2):
        counts, parts = zip(*in_chunks(job, iter(cases), processes), strict=True)
        assert sum(counts) == len(cases) and len(parts) > 2
        for name in set(whole) - {"example"}:
            assert np.array_equal(whole[name], np.concatenate([part[name] for part in parts]))


def test_examples_are_a_stream_of_which_few_are_read_ahead(bert: Any) -> None:
    read = []
    stream = (read.append(i) or i for i in range(100_000))
    results = in_chunks(lambda chunk: sum(chunk), stream, 2)
    assert next(results) == (256, sum(range(256)))
    assert len(read) <= 2000 + 6 * 256
    results.close()


def test_a_killed_process_is_an_error_and_not_a_hang() -> None:
    def job(chunk: list[int]) -> int:
        if 3000 in chunk:
            os.kill(os.getpid(), signal.SIGKILL)
        return len(chunk)

    before = signal.signal(signal.SIGTERM, lambda *_: None)  # as in a run, which its workers inherit
    try:
        with pytest.raises(InputError, match="lower --data.processes"):
            list(in_chunks(job, range(5000), 2))
    finally:
        signal.signal(signal.SIGTERM, before)


def test_bad_input_in_the_middle_of_a_stream_ends_the_processes() -> None:
    def stream() -> Iterator[int]:
        yield from range(4000)
        raise InputError("bad")

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(InputError, match="bad"):
            list(in_chunks(sum, stream(), 2))
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(RuntimeError, match="failed in the chunk that starts with id 'x'"):
        list(in_chunks(lambda chunk: 1 / 0, (Example("x", "", "") for _ in range(3000)), 2))


def test_known_window_counts_of_the_dev_set(real_data: Path, roberta: Any, bert: Any) -> None:
    examples = read_examples(real_data / "squad2/dev-v2.0.full-rebuilt.json")
    assert len(examples) == 11873
    assert len(span_windows(examples, roberta, max_length=384, stride=128)["length"]) == 12165
    assert len(span_windows(examples, bert, max_length=384, stride=128)["length"]) == 12134


def test_answers_of_the_real_training_file_are_recovered(real_data: Path, roberta: Any) -> None:
    """From a window that contains the answer, up to the boundaries of its first and last token."""
    examples = read_examples(real_data / "squad2/train-v2.0.subset.json")
    arrays = span_windows(examples, roberta, max_length=384, stride=128)
    exact = 0
    found: set[int] = set()
    for window, owner in enumerate(arrays["example"]):
        first, last = arrays["label"][window]
        if first == arrays["cls"][window]:
            continue
        found.add(int(owner))
        exact += labelled_text_at(arrays, examples[owner].context, window) == examples[owner].answers[0].text
    answerable = sum(bool(e.answers) for e in examples)
    assert answerable - len(found) <= 5
    assert exact / len(found) > 0.97


def labelled_text_at(arrays: dict[str, np.ndarray], context: str, window: int) -> str:
    if "starts" not in arrays:
        arrays["starts"] = np.concatenate([[0], np.cumsum(arrays["length"])])
    first, last = arrays["label"][window] + arrays["starts"][window]
    return context[arrays["offsets"][first, 0] : arrays["offsets"][last, 1]]

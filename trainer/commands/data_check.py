"""`plainloop data TRAIN [DEV]`: what to look at before training."""

from __future__ import annotations

import functools
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from plainloop.data.errors import InputError
from plainloop.data.readers.causalqa import TextOptions, data_files, is_causalqa, read_text
from plainloop.data.readers.examples import Examples, ReadOptions, require_use
from plainloop.data.tokenise import in_chunks
from plainloop.data.types import Example
from plainloop.trainer.config.options import TrainConfig
from plainloop.trainer.config.report_options import DatasetConfig
from plainloop.trainer.report.results import as_example
from plainloop.trainer.tasks.normalize import normalize_answer

BINS = 10
CHARACTERS_PER_WORD = 12  # more than this on average: the script has no blanks between words
Content = dict[str, Any]
_SPACE_OR_MARK = re.compile(r"[\W_]+")


def look_at(config: DatasetConfig) -> tuple[Content, bool]:
    """All findings, JSON-serialisable, and whether `train` would read the data. Raises InputError."""
    if not config.train:
        raise InputError("data needs a file: plainloop data TRAIN [DEV]; see --help.")
    found: Content = {}
    examples: dict[str, list[Example]] = {}
    for split, path in (("train", config.train), ("dev", config.dev)):
        if path:
            found[split], examples[split] = _split(split, path, config)
    if len(examples) == 2:
        found["shared"] = shared(examples["train"], examples["dev"], config.examples)
    return found, not any({"faults", "refused"} & set(of) for of in found.values() if isinstance(of, dict))


def _split(split: str, path: str | Sequence[str], config: DatasetConfig) -> tuple[Content, list[Example]]:
    """The findings about a split, and its examples."""
    files = data_files(path, {"train": "train", "dev": "valid"}[split], TextOptions())
    causalqa = is_causalqa(files[0])
    content: Content = {"files": files}
    try:
        if causalqa:
            source: Sequence[Any] = read_text(files, TextOptions())
            examples = [as_example(row) for row in source]
        else:
            require_use(config.columns, files, "--columns")
            options = ReadOptions(config.columns, config.ambiguous, locate=not generates(config.model))
            source, content["notes"] = _lenient(files, options)
            examples = list(source)
            if config.ambiguous == "error" and any("left out" in note for note in content["notes"]):
                content["refused"] = "an answer can't be located; choose --data.ambiguous first or skip"
    except InputError as error:  # the rest is still worth a look
        return content | {"faults": str(error)}, []
    content |= counts(examples)
    content["lengths"] = lengths(examples)
    content["findings"] = findings(examples, config.examples)
    if config.model:
        content["rows"] = rows(source, config, split, causalqa)
    return content, examples


def _lenient(files: list[str], options: ReadOptions) -> tuple[list[Example], list[str]]:
    """The examples that can be used, and the notes of the reader."""
    if options.ambiguous == "error":
        options = replace(options, ambiguous="skip")
    read = Examples(files, options)
    return list(read), [note.removeprefix("warning: ") for note in read.notes]


def generates(model: str | None) -> bool:
    """Whether this model writes its answer, so that answers need no place in the context."""
    from plainloop.models.load import load_config

    return model is not None and bool(load_config(model).is_encoder_decoder)


def counts(examples: Sequence[Example]) -> Content:
    unanswerable = sum(not example.answers for example in examples)
    return {
        "questions": len(examples),
        "unanswerable": unanswerable,
        "contexts": len({example.context for example in examples}),
        "articles": len({example.title for example in examples} - {""}),
        "answers per answerable question": round(
            sum(len(e.answers) for e in examples) / max(1, len(examples) - unanswerable), 3
        ),
    }


def lengths(examples: Sequence[Example]) -> Content:
    """Words of the questions, of the distinct contexts, and of the first answers; characters in a script
    without blanks.
    """
    texts = {
        "question": [e.question for e in examples],
        "context": list({e.context: None for e in examples}),
        "answer": [e.answers[0].text for e in examples if e.answers],
    }
    characters, words = (sum(map(size, texts["context"])) for size in (len, _words))
    spaced = characters < CHARACTERS_PER_WORD * words
    size, unit = (_words, "words") if spaced else (len, "characters")
    return {
        name: distribution(np.array([size(text) for text in of]), unit) for name, of in texts.items() if of
    }


def _words(text: str) -> int:
    return len(text.split())


def distribution(sizes: np.ndarray, unit: str) -> Content:
    """Least, median, 95th percentile, most; and a histogram: [from, to, count], the last with all above."""
    low, high = int(sizes.min()), int(np.ceil(np.quantile(sizes, 0.995)))
    edges = np.unique(np.linspace(low, high + 1, BINS + 1).round().astype(int))
    edges = edges if len(edges) > 1 else np.array([low, low + 1])
    bin_of = np.minimum(np.searchsorted(edges, sizes, side="right") - 1, len(edges) - 2)
    held = np.bincount(bin_of, minlength=len(edges) - 1)
    tops = [*(int(edge) - 1 for edge in edges[1:-1]), int(sizes.max())]
    return {
        "unit": unit, "min": low, "median": float(np.median(sizes)),
        "p95": float(np.quantile(sizes, 0.95)), "max": int(sizes.max()),
        "histogram": [[int(a), b, int(n)] for a, b, n in zip(edges[:-1], tops, held, strict=True)],
    }  # fmt: skip


def findings(examples: Sequence[Example], shown: int) -> list[Content]:
    """What may be a mistake in one split, each with its number and some examples."""
    normal = {text: normalize(text) for text in {e.context for e in examples}}
    by_question: defaultdict[tuple[str, str], list[Example]] = defaultdict(list)
    by_text: defaultdict[str, set[str]] = defaultdict(set)
    for example in examples:
        question = normalize(example.question)
        by_question[question, normal[example.context]].append(example)
        by_text[question].add(normal[example.context])
    again = [group for group in by_question.values() if len(group) > 1]
    differing = [g for g in again if len({frozenset(a.text for a in e.answers) for e in g}) > 1]
    contexts: defaultdict[str, set[str]] = defaultdict(set)
    for text, key in normal.items():
        contexts[key].add(text)
    answered = [(e, a) for e in examples for a in e.answers]
    return [
        _finding("questions asked again about the same context", [g[1] for g in again], shown),
        _finding("of these, with other answers", [g[1] for g in differing], shown),
        _finding(
            "questions asked about more than one context",
            [g[0] for (q, _), g in by_question.items() if len(by_text[q]) > 1],
            shown,
        ),
        {
            "what": "contexts that differ only in case, blanks or punctuation",
            "count": sum(len(texts) - 1 for texts in contexts.values()),
            "examples": [min(t)[:120] for t in contexts.values() if len(t) > 1][:shown],
        },
        _finding(
            "answers that begin or end inside a word", [e for e, a in answered if _inside_word(e, a)], shown
        ),
        _finding(
            "answers with blanks at an end", [e for e, a in answered if a.text != a.text.strip()], shown
        ),
        _finding(
            "answers of which the metric leaves nothing (articles, punctuation)",
            [e for e, a in answered if not normalize_answer(a.text)],
            shown,
        ),
        _finding(
            "records with characters that were lost before (U+FFFD)",
            [e for e in examples if "\ufffd" in e.question + e.context],
            shown,
        ),
    ]


def _finding(what: str, examples: Iterable[Example], shown: int) -> Content:
    distinct = list({e.id: e for e in examples}.values())
    return {
        "what": what,
        "count": len(distinct),
        "examples": [f"{e.id}: {e.question[:120]}" for e in distinct[:shown]],
    }


def _inside_word(example: Example, answer: Any) -> bool:
    """Whether a Latin letter or a digit continues the answer on a side; other scripts may have no blanks."""
    start, end, text = answer.start, answer.start + len(answer.text), example.context
    if start < 0 or not answer.text:
        return False
    pairs = (text[start - 1 : start + 1] if start else "", text[end - 1 : end + 1] if end < len(text) else "")
    return any(len(pair) == 2 and pair.isalnum() and max(pair) < "\u0250" for pair in pairs)


def shared(train: Sequence[Example], dev: Sequence[Example], shown: int) -> list[Content]:
    """What is in both files, by normalised text, as numbers of questions of the second one: leaks."""
    contexts = {normalize(text) for text in {e.context for e in train}} - {""}
    questions = {normalize(e.question) for e in train}
    ids, titles = {e.id for e in train}, {e.title for e in train} - {""}
    leaked = {text: normalize(text) in contexts for text in {e.context for e in dev}}
    asked = [e for e in dev if normalize(e.question) in questions]
    return [
        _finding("dev questions whose context is in train", [e for e in dev if leaked[e.context]], shown),
        _finding("dev questions that are asked in train", asked, shown),
        _finding("dev questions that are in train with their context",
                 [e for e in asked if leaked[e.context]], shown),
        _finding("dev questions whose id is in train", [e for e in dev if e.id in ids], shown),
        _finding("dev questions whose article is in train", [e for e in dev if e.title in titles], shown),
    ]  # fmt: skip


def normalize(text: str) -> str:
    """For comparing texts: NFKC, case folded, punctuation and blanks as one blank."""
    return _SPACE_OR_MARK.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def rows(source: Sequence[Any], config: DatasetConfig, split: str, causalqa: bool) -> Content:
    """What the model will see: the rows that `train` makes, and the warnings that it gives about them."""
    from plainloop.trainer.tasks.find import find_task

    encoder_decoder = generates(config.model)
    if causalqa and not encoder_decoder:
        raise InputError(f"--model {config.model}: CausalQA data needs an encoder-decoder, such as T5.")
    run = TrainConfig(task="text" if encoder_decoder else "span")
    run = replace(
        run, model=replace(run.model, path=str(config.model)),
        data=replace(run.data, **_given(max_length=config.max_length, stride=config.stride)),
        text=replace(run.text, **_given(max_source_length=config.max_length, stride=config.stride)),
    )  # fmt: skip
    task = find_task(run.task)(run)
    if encoder_decoder and not causalqa:
        from plainloop.data.readers.causalqa import as_text

        source = [as_text(example, TextOptions()) for example in source]
    sizes, warnings = [], Counter[str]()
    processes = config.processes or len(os.sched_getaffinity(0))
    for _, encoded in in_chunks(functools.partial(task.encode, split=split), source, processes):
        sizes.append(encoded.arrays["length"])
        warnings.update(encoded.warnings)
    every = np.concatenate(sizes)
    return {
        "model": str(config.model),
        "rows": len(every),
        "length": distribution(every, "tokens"),
        "warnings": [f"{number} {what}" for what, number in warnings.items() if number],
    }


def _given(**values: int | None) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}

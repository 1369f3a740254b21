"""Read the questions of a data set, and what a run answered, with the score of each question."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from plainloop.data.errors import InputError
from plainloop.data.readers.causalqa import SEPARATOR, TextOptions, data_files, is_causalqa, read_text
from plainloop.data.readers.examples import Examples, ReadOptions, require_use
from plainloop.data.readers.files import read_json
from plainloop.data.samplers import subset
from plainloop.data.types import Answer, Example
from plainloop.trainer.tasks.metrics import per_question, per_text
from plainloop.trainer.tasks.normalize import Rules, metric_rules
from plainloop.trainer.trained.summary import read_options

SQUAD_FIGURES = ("exact", "f1")
CAUSALQA_FIGURES = ("em", "f1", "rougeL_f1")


@dataclass(frozen=True)
class Questions:
    """A data set. examples: in file order; CausalQA's references are their answers, with start -1 if the
    context does not hold them.
    """

    files: list[str]
    examples: list[Example]
    causalqa: bool

    @property
    def figures(self) -> tuple[str, ...]:
        """The names of the figures that each question has."""
        return CAUSALQA_FIGURES if self.causalqa else SQUAD_FIGURES

    @property
    def scale(self) -> float:
        """Of the figures: percent for SQuAD, fractions for CausalQA, as their own scripts print them."""
        return 1.0 if self.causalqa else 100.0

    def take(self, kept: np.ndarray) -> Questions:
        return dataclasses.replace(self, examples=[self.examples[i] for i in kept])


@dataclass(frozen=True)
class Results:
    """What a run answered. texts: one for each question, in the order of the data; None: no prediction.

    odds: (N,) score of "no answer" minus that of the best answer; nbest: candidates of each question.
    folder: that the files were read from, for what else is there.
    """

    name: str
    folder: Path | None
    texts: list[str | None]
    odds: np.ndarray | None = None
    nbest: list[list[dict[str, Any]]] | None = None
    scores: dict[str, np.ndarray] = field(default_factory=dict)


def rules_for(metric: str | None, language: str | None, scored: str) -> Rules:
    """How answers are compared: as said, or else as in the evaluations of this run."""
    options = read_options(Path(scored)) if Path(scored).is_dir() else {}
    metric = metric or options.get("evaluation.metric") or "squad"
    if language and metric == "squad":
        raise InputError("--language: no effect with --metric squad; leave it out, or choose --metric mlqa.")
    return metric_rules(metric, language or options.get("evaluation.language") or "en")


def read_questions(data: str | Sequence[str] | None, columns: Mapping[str, str], scored: str) -> Questions:
    """The questions of these files; by default, of those that the run or score folder `scored` was scored on.
    Raises InputError.
    """
    options = read_options(Path(scored)) if Path(scored).is_dir() else {}
    text = TextOptions()
    if data is None:
        data = scored_on(Path(scored), options)
        text = TextOptions(dataset=options.get("text.dataset"), split=options.get("text.split") or "original")
    files = data_files(data, "valid", text)
    if is_causalqa(files[0]):
        rows = read_text(files, text)
        return Questions(files, [as_example(r) for r in rows], True)
    columns = columns or options.get("data.columns") or {}
    require_use(columns, files, "--columns")
    read = Examples(files, ReadOptions(columns, locate=False))
    examples = list(read)
    for note in read.notes:
        print(note, file=sys.stderr)
    return Questions(files, examples, False)


def scored_on(folder: Path, options: Mapping[str, Any]) -> str | list[str]:
    """The data that a run or score folder was scored on. Raises InputError if it does not say, or is gone."""
    if (folder / "provenance.json").is_file():
        found: Any = list(read_json(folder / "provenance.json").get("data") or [])
    else:
        found = options.get("data.dev")
    if not found:
        raise InputError(f"{folder}: does not say which data it was scored on; name it with --data FILE.")
    return found if isinstance(found, str) else list(found)


def read_results(path: str, questions: Questions, *, nbest: bool = True) -> Results:
    """The answers of a run folder's last evaluation, of a score folder, or in a predictions file.
    Raises InputError.
    """
    name, place = path, Path(path)
    if not place.exists():
        raise InputError(f"{path}: no such file or folder.")
    if place.is_file():
        return Results(name, None, _texts(place, questions))
    folder = place if (place / "metrics.json").is_file() else place / "evaluation"
    file = next((folder / n for n in ("predictions.json", "results.json") if (folder / n).is_file()), None)
    if file is None:
        raise InputError(
            f"{path}: neither a run folder with an evaluation nor a folder of evaluate --out_dir: no"
            f" predictions.json in {folder}."
        )
    ids = [example.id for example in questions.examples]
    odds = read_json(folder / "null_odds.json") if (folder / "null_odds.json").is_file() else None
    if odds is not None and set(ids) - odds.keys():
        raise InputError(f"{folder / 'null_odds.json'}: lacks questions of {', '.join(questions.files)}.")
    nbest_file = folder / "nbest_predictions.json"
    lists = read_json(nbest_file) if nbest and nbest_file.is_file() else None
    return Results(
        name,
        folder,
        _texts(file, questions),
        None if odds is None else np.array([float(odds[i]) for i in ids]),
        None if lists is None else [list(lists.get(i) or []) for i in ids],
    )


def _texts(file: Path, questions: Questions) -> list[str | None]:
    """(N,) the prediction for each question. Raises InputError."""
    content, total = read_json(file), len(questions.examples)
    if isinstance(content, dict) and isinstance(content.get("predictions"), list):
        content = content["predictions"]
    if isinstance(content, list) and len(content) <= total:
        # An evaluation in training generates for a subset, which depends on its size alone.
        texts: list[str | None] = [None] * total
        for i, text in zip(subset(total, len(content)), content, strict=True):
            texts[i] = text
    elif isinstance(content, dict):
        texts = [content.get(example.id) for example in questions.examples]
    else:
        raise InputError(f"{file}: must be a JSON object {{id: text}}, or a list of at most {total} texts.")
    if not all(isinstance(text, str) for text in texts if text is not None):
        raise InputError(f"{file}: a prediction is not text.")
    return texts


def common(results: Sequence[Results], questions: Questions) -> tuple[list[Results], Questions]:
    """Keep the questions that have predictions. Raises InputError unless all results have the same ones."""
    has = np.array([[text is not None for text in one.texts] for one in results])
    for one, mask in zip(results, has, strict=True):
        if (differs := np.flatnonzero(mask != has[0])).size:
            lacking = one if not mask[differs[0]] else results[0]
            other = results[0] if lacking is one else one
            raise InputError(
                f"{lacking.name}: has no prediction for {questions.examples[differs[0]].id!r}, which"
                f" {other.name} has ({differs.size} questions differ): score both on the same data."
            )
    kept = np.flatnonzero(has[0])
    if not len(kept):
        raise InputError(f"{results[0].name}: has no prediction for any question of the data: wrong --data?")
    if len(kept) < len(has[0]):
        print(
            f"warning: {len(kept)} of {len(has[0])} questions have predictions; the others are left out",
            file=sys.stderr,
        )
    return [
        dataclasses.replace(
            one,
            texts=[one.texts[i] for i in kept],
            odds=None if one.odds is None else one.odds[kept],
            nbest=None if one.nbest is None else [one.nbest[i] for i in kept],
        )
        for one in results
    ], questions.take(kept)


def scored(one: Results, questions: Questions, rules: Rules) -> Results:
    """With the score (N,) of each question, in the units of the figures."""
    texts = [text or "" for text in one.texts]
    if questions.causalqa:
        exact, f1, rouge = per_text(texts, [[a.text for a in e.answers] for e in questions.examples])
        values: list[Any] = [exact, f1, [score.fmeasure for score in rouge]]
    else:
        by_id = {e.id: text for e, text in zip(questions.examples, texts, strict=True)}
        values = [list(of.values()) for of in per_question(questions.examples, by_id, rules)]
    scores = {
        name: np.array(of, float) * questions.scale
        for name, of in zip(questions.figures, values, strict=True)
    }
    known = read_metrics(one)
    for name, of in scores.items():
        if name in known and len(of) == known.get("total", len(of)) and abs(known[name] - of.mean()) > 1e-6:
            print(
                f"warning: {one.name}: {name} is {of.mean():.4f} here, but {known[name]:.4f} in its"
                " metrics.json: it was scored on other data, or by another --metric or --language",
                file=sys.stderr,
            )
    return dataclasses.replace(one, scores=scores)


def as_example(row: Any) -> Example:
    question = row.question.removesuffix(SEPARATOR)
    answers = tuple(Answer(text, row.context.find(text) if text else -1) for text in row.references)
    return Example(row.id, question, row.context, answers)


def read_metrics(results: Results) -> dict[str, float]:
    """The figures beside the predictions; {} if there are none."""
    if results.folder is None or not (results.folder / "metrics.json").is_file():
        return {}
    try:
        content = json.loads((results.folder / "metrics.json").read_text(encoding="utf-8"))
        return {name: float(value) for name, value in content.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{results.folder / 'metrics.json'}: can't be read: {error}.") from None

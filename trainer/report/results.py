"""Read the questions of a data set, and what a run answered, with the score of each question."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
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
from plainloop.trainer.run_folder.files import sha256
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
        if columns:
            raise InputError("--columns has no effect on CausalQA data; leave it out.")
        return Questions(files, [as_example(row) for row in read_text(files, text)], True)
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
        origin = read_json(folder / "provenance.json")
        known = dict(origin.get("data") or {}) if isinstance(origin, dict) else {}
        found: Any = list(known)
        for file in found:
            if Path(file).is_file() and sha256(Path(file)) != known[file]:
                print(f"warning: {file}: is not the file that {folder} was scored on", file=sys.stderr)
    else:
        found = options.get("data.dev")
    if not found or not isinstance(found, (str, list)):
        raise InputError(f"{folder}: does not say which data it was scored on; name it with --data FILE.")
    return found if isinstance(found, str) else list(found)


def has_answers(path: str) -> bool:
    """Whether there are predictions at this path. Raises InputError if there is nothing."""
    place = Path(path)
    if not place.exists():
        raise InputError(f"{path}: no such file or folder.")
    return place.is_file() or _answers_in(place) is not None


def _answers_in(place: Path) -> Path | None:
    """The file with the predictions of a score folder, or of a run's last evaluation."""
    folders = (place, place / "evaluation")
    files = (folder / n for folder in folders for n in ("predictions.json", "results.json"))
    return next((file for file in files if file.is_file()), None)


def null_threshold(path: str) -> float | None:
    """The threshold on the null odds that the predictions were made with; None if it is not known."""
    place = Path(path)
    if (place / "provenance.json").is_file():
        origin = read_json(place / "provenance.json")
        value = origin.get("null_threshold") if isinstance(origin, dict) else None
    else:
        value = read_options(place).get("evaluation.null_threshold", 0.0) if place.is_dir() else None
    return float(value) if isinstance(value, (int, float)) else None


def read_results(path: str, questions: Questions, *, texts_only: bool = False) -> Results:
    """The answers of a run folder's last evaluation, of a score folder, or in a predictions file.
    Raises InputError.
    """
    name, place = path, Path(path)
    if not place.exists():
        raise InputError(f"{path}: no such file or folder.")
    if place.is_file():
        return Results(name, None, _texts(place, questions))
    if (file := _answers_in(place)) is None:
        raise InputError(
            f"{path}: neither a run folder with an evaluation nor a folder of evaluate --out_dir: no"
            " predictions.json."
        )
    folder, ids = file.parent, [example.id for example in questions.examples]
    if texts_only:
        return Results(name, folder, _texts(file, questions))
    odds = _of_each(folder / "null_odds.json", ids, _is_number, "a number")
    lists = _of_each(folder / "nbest_predictions.json", ids, _is_nbest, "a list of candidates")
    array = None if odds is None or None in odds else np.array(odds, float)
    return Results(name, folder, _texts(file, questions), array, lists and [of or [] for of in lists])


def _of_each(file: Path, ids: Sequence[str], good: Callable[[Any], bool], what: str) -> list[Any] | None:
    """The values of {id: value}, None where there is none; None without the file. Raises InputError."""
    if not file.is_file():
        return None
    content = read_json(file)
    if not isinstance(content, dict):
        raise InputError(f"{file}: must be a JSON object {{id: {what}}}.")
    for key, value in content.items():
        if not good(value):
            raise InputError(f"{file}: {key!r} is not {what}.")
    return [content.get(i) for i in ids]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _is_nbest(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict) and isinstance(one.get("text"), str) for one in value
    )


def _texts(file: Path, questions: Questions) -> list[str | None]:
    """(N,) the prediction for each question. Raises InputError."""
    content, total = read_json(file), len(questions.examples)
    if isinstance(content, dict) and isinstance(content.get("predictions"), list):
        content = content["predictions"]
    # An evaluation in training generates for a subset, which depends on its size alone.
    if isinstance(content, list) and (len(content) == total or file.name == "results.json"):
        texts: list[str | None] = [None] * total
        for i, text in zip(subset(total, len(content)), content, strict=True):
            texts[i] = text
    elif isinstance(content, dict):
        texts = [content.get(example.id) for example in questions.examples]
    else:
        raise InputError(f"{file}: must be a JSON object {{id: text}}, or a list of {total} texts.")
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
    answers = tuple(Answer(text, _place(text, row.context)) for text in row.references)
    return Example(row.id, question, row.context, answers)


def _place(text: str, context: str) -> int:
    """Where a reference is in its context, as whole words if it can be; -1 if it is not there."""
    whole = re.search(rf"(?<!\w){re.escape(text)}(?!\w)", context) if text else None
    return whole.start() if whole else context.find(text) if text else -1


def read_metrics(results: Results) -> dict[str, float]:
    """The figures beside the predictions; {} if there are none."""
    if results.folder is None or not (results.folder / "metrics.json").is_file():
        return {}
    try:
        content = json.loads((results.folder / "metrics.json").read_text(encoding="utf-8"))
        return {name: float(value) for name, value in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        raise InputError(f"{results.folder / 'metrics.json'}: must be a JSON object of numbers.") from None

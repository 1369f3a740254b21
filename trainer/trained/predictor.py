"""A trained model as a function from questions and contexts to answers."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from plainloop.data.errors import InputError
from plainloop.data.readers.causalqa import TextExamples, as_text, is_causalqa
from plainloop.data.readers.examples import Examples, ReadOptions
from plainloop.data.tokenise import CHUNK, in_chunks
from plainloop.data.types import Example, TextExample
from plainloop.trainer.config.trained_options import PredictConfig, ScoreConfig
from plainloop.trainer.config.validate import range_faults
from plainloop.trainer.trained.model_folder import (
    as_trained,
    check_options,
    checkpoint_path,
    forward_precision,
    load_model,
    trained_on_causalqa,
    trained_with,
)

CANDIDATES = 20  # that share the probability, however many of them are asked for
Report = Callable[[str], None]


class Predictor:
    """Answers questions, with the windows, the search and the threshold of `plainloop evaluate`.

    predictor = Predictor.from_run("runs/squad")
    predictor("Who built it?", "Ada built it.")["answer"]

    Calls from several threads take turns. See tasks.answering for what an answer holds.
    """

    def __init__(self, config: PredictConfig, world: Any, report: Report = lambda line: None) -> None:
        """All ranks, inside their process group. Loads the model. Raises InputError."""
        from plainloop.trainer.distributed.device import set_up_device
        from plainloop.trainer.tasks import answering
        from plainloop.trainer.tasks.evaluation import EvaluationSettings
        from plainloop.trainer.tasks.find import find_task

        self.config, self.path = config, checkpoint_path(str(config.model))
        if ":" in (recorded := str(trained_with(self.path).get("task"))):
            raise InputError(f"{self.path}: predict knows the tasks span and text, not {recorded}.")
        scoring = as_scoring(config)
        run, fitted = as_trained(self.path, scoring)
        if run.task not in ("span", "text"):
            raise InputError(f"{self.path}: predict knows the tasks span and text, not {run.task}.")
        task_type = find_task(run.task)
        check_options(run.task, task_type.uses, scoring)
        self.text = run.task == "text"
        self.task: Any = task_type(run)
        set_up_device(world, tf32=config.tf32, deterministic=False)
        precision, why = forward_precision(self.path, config.precision, world.device)
        for line in why:
            report(line)
        if faults := range_faults(config):
            raise InputError("; ".join(faults))
        options = replace(run.evaluation, num_best=max(CANDIDATES, config.num_best))
        temperature = fitted.temperature if fitted else None
        self.settings = EvaluationSettings(
            world, precision, config.tokens_per_device, options, temperature=temperature,
            lockstep=config.parallel == "fsdp",
        )  # fmt: skip
        self.model = load_model(self.task, self.path, run, world).eval()
        self._causalqa = self.text and not config.text.format and trained_on_causalqa(self.path)
        self._answer: Any = answering.answer_texts if self.text else answering.answer_spans
        self._lock = threading.Lock()

    @classmethod
    def from_run(cls, path: str, **options: Any) -> Predictor:
        """Load a run folder, a checkpoint or a Hub name, in this process alone. options: of PredictConfig."""
        import torch.distributed as dist

        from plainloop.trainer.distributed.world import world_from_env

        if dist.is_initialized() and dist.get_world_size() > 1:
            raise InputError(
                "Predictor.from_run is for a process alone; the ranks would wait for each other."
            )
        config = PredictConfig(model=path, **options)
        return cls(config, replace(world_from_env(config.device), rank=0, size=1))

    def __call__(self, question: str | Sequence[str], context: str | Sequence[str]) -> Any:
        """One question on one context gives a dict; lists of equal length give a list. Raises InputError."""
        one = isinstance(question, str)
        questions = [question] if isinstance(question, str) else list(question)
        contexts = [context] * len(questions) if isinstance(context, str) else list(context)
        if len(questions) != len(contexts):
            raise InputError(f"{len(questions)} questions, but {len(contexts)} contexts.")
        for name, texts in (("question", questions), ("context", contexts)):
            if name == "question" or not self.text:
                if broken := [i for i, text in enumerate(texts) if not is_unicode(text)]:
                    raise InputError(f"the {name} number {broken[0]} has half of a character (a surrogate).")
                if empty := [i for i, text in enumerate(texts) if not text.strip()]:
                    raise InputError(f"the {name} is empty" + ("." if one else f" (number {empty[0]})."))
        examples = [Example(str(i), *pair) for i, pair in enumerate(zip(questions, contexts, strict=True))]
        with self._lock:  # the tokenizer has a state too
            self.require_fit(examples)
            answers = [answer for _, answer in self.stream(examples, processes=1)]
        return answers[0] if one else answers

    def stream(self, examples: Iterable[Any], *, processes: int) -> Iterator[tuple[Any, dict[str, Any]]]:
        """All ranks. Yield (example, answer) in order, on rank 0. A chunk of examples shares its batches, so
        that an answer does not depend on what came before.
        """
        ahead, chunks = itertools.tee(_chunked(examples))
        job, flat = self._encode, itertools.chain.from_iterable(ahead)
        encoded_chunks = in_chunks(job, flat, processes, quiet=True)
        for chunk, (_, encoded) in zip(chunks, encoded_chunks, strict=True):
            answers = self._answer(self.task, self.model, encoded, self._examples(chunk), self.settings)
            yield from zip(chunk, map(self._shortened, answers or ()), strict=False)

    def _shortened(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The answer with --num_best candidates, and "no answer"."""
        if "nbest" not in answer:
            return answer
        with_text = [entry for entry in answer["nbest"] if entry["text"]][self.config.num_best :]
        return {**answer, "nbest": [entry for entry in answer["nbest"] if entry not in with_text]}

    def read(self, files: list[str]) -> Any:
        """The questions of these files; answers are not needed. Raises InputError."""
        if self.text and is_causalqa(files[0]):
            return TextExamples(files, self.task.options, self.config.columns)
        return Examples(files, ReadOptions(self.config.columns, locate=not self.text, answers=False))

    def require_fit(self, examples: Iterable[Example | TextExample]) -> int:
        """Count the examples. Raises InputError for a question that does not fit into a window."""
        count, limit = 0, None if self.text else self._question_limit()
        for e in examples:
            count += 1
            if limit is None or len(e.question.encode()) <= limit:  # a token has a byte or more
                continue
            ids = self.task.tokenizer(e.question.strip(), add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
            if len(ids) > limit:
                raise InputError(
                    f"id {e.id!r}: the question has {len(ids)} tokens, but a window of"
                    f" {self.task.config.data.max_length} has room for {limit}; shorten it, or raise"
                    " --max_length."
                )
        return count

    def sample_inputs(self) -> dict[str, Any]:
        """A batch of two windows, as the model gets them."""
        from plainloop.data.store import Store

        examples = [
            Example("1", "who built it ?", "it was built"),
            Example("2", "who ?", "Ada built it in a day"),
        ]
        store = Store(self._encode(examples).arrays)
        return dict(self.task.collate(store)(np.arange(2)).inputs)

    def _question_limit(self) -> int:
        from plainloop.data.span_features import question_limit

        data = self.task.config.data
        return question_limit(self.task.tokenizer, max_length=data.max_length, stride=data.stride)

    def _encode(self, examples: Sequence[Example]) -> Any:
        return self.task.encode(self._examples(examples), "dev")

    def _examples(self, examples: Sequence[Any]) -> Sequence[Any]:
        return [self._as_text(e) for e in examples] if self.text else examples

    def _as_text(self, example: Example | TextExample) -> TextExample:
        """The example as the model's training data had it."""
        if isinstance(example, TextExample):
            return example
        if not self._causalqa:
            return as_text(example, self.task.options)
        return replace(as_text(example, replace(self.task.options, format="unifiedqa")), is_squad=False)


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _chunked(examples: Iterable[Any]) -> Iterator[list[Any]]:
    stream = iter(examples)
    while chunk := list(itertools.islice(stream, CHUNK)):
        yield chunk


def as_scoring(config: PredictConfig) -> ScoreConfig:
    """The options of evaluate that say the same, where they are not the default."""
    names = (
        "base max_length stride max_answer_length null_threshold num_best text precision device tf32 parallel"
    ).split()
    default = PredictConfig()
    given = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(default, name)}
    return ScoreConfig(model=config.model, **given)


def tokenising_processes(config: PredictConfig) -> int:
    return config.processes or len(os.sched_getaffinity(0))

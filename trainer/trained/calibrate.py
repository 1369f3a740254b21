"""`plainloop calibrate`: fit the null threshold and the temperature on one half of labelled data, and judge
them on the other. The result is kept beside the weights as calibration.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plainloop.data.errors import InputError
from plainloop.data.readers.examples import Examples, ReadOptions
from plainloop.data.readers.files import find_files
from plainloop.data.types import Example
from plainloop.trainer.config.trained_options import CalibrateConfig, PredictConfig
from plainloop.trainer.tasks.metrics import per_question
from plainloop.trainer.tasks.normalize import metric_rules
from plainloop.trainer.trained import calibration
from plainloop.trainer.trained.calibration_file import NAME, context_digests, windows, write
from plainloop.trainer.trained.predictor import CANDIDATES, Predictor, tokenising_processes
from plainloop.trainer.trained.provenance import provenance


def calibrate(config: CalibrateConfig) -> dict[str, Any] | None:
    """All ranks. Return what was fitted, on rank 0. Raises InputError."""
    from plainloop.trainer.distributed.world import process_group, world_from_env

    if not config.model or not config.data:
        raise InputError("calibrate needs --model FOLDER and --data FILE, questions with answers.")
    if config.language != "en" and config.metric == "squad":
        raise InputError("--language: no effect with --metric squad; leave it out, or choose --metric mlqa.")
    files, world = find_files(config.data), world_from_env(config.device)
    same = {f.name for f in dataclasses.fields(PredictConfig)} & {f.name for f in dataclasses.fields(config)}
    asked = PredictConfig(num_best=CANDIDATES, **{name: getattr(config, name) for name in same})
    with process_group(world, timeout_s=config.timeout_s):
        say = (lambda line: print(line, file=sys.stderr)) if world.is_main else (lambda line: None)
        predictor = Predictor(asked, world, report=say)
        if predictor.text:
            raise InputError(f"--model {config.model}: calibrate is for models of task span.")
        if not Path(predictor.path).is_dir():
            raise InputError(f"--model {config.model}: must be a folder, where {NAME} can be kept.")
        read = Examples(files, ReadOptions(config.columns, config.ambiguous))
        examples = list(read)
        fitting = halves(examples)
        found = [a for _, a in predictor.stream(examples, processes=tokenising_processes(asked))]
        if not world.is_main:
            return None
        for note in read.notes:
            say(note)
        rules = metric_rules(config.metric, config.language)
        pairs = zip(examples, found, strict=True)
        best = {e.id: next((c["text"] for c in a["nbest"] if c["text"]), "") for e, a in pairs}
        exact, f1 = per_question(examples, best, rules)
        questions = calibration.judged(
            found,
            [exact[e.id] for e in examples],
            [f1[e.id] for e in examples],
            [bool(e.answers) for e in examples],
        )
        result = fit(questions, fitting, config.answer_precision)
        contexts = [e.context for e, used in zip(examples, fitting, strict=True) if used]
        result |= {
            "fitted_contexts": context_digests(contexts),
            "options": options_of(predictor),
            **provenance("calibrate", config, predictor.path, files),
        }
        write(Path(predictor.path) / NAME, result)
        return result


def halves(examples: Sequence[Example]) -> list[bool]:
    """Whether each example belongs to the half to fit on. Articles stay together (without titles: contexts),
    and so do equal contexts, so that no context is on both sides. Raises InputError if there is only one.
    """
    group_of: dict[str, str] = {}  # context -> article
    for e in examples:
        group_of.setdefault(e.context, e.title or e.context)
    if len(set(group_of.values())) < 2:  # one article alone: halve its contexts
        group_of = {context: context for context in group_of}
    if len(group_of) < 2:
        raise InputError("--data: all questions have the same context; calibrate needs two or more.")
    sizes = Counter(group_of[e.context] for e in examples)
    fitting, balance = {}, 0
    for name in sorted(sizes, key=lambda g: (-sizes[g], hashlib.sha256(g.encode()).digest())):
        fitting[name] = balance <= 0
        balance += sizes[name] if fitting[name] else -sizes[name]
    return [fitting[group_of[e.context]] for e in examples]


def fit(questions: calibration.Judged, fitting: Sequence[bool], precision: float | None) -> dict[str, Any]:
    """Fit on one half, and judge both."""
    import numpy as np

    chosen = np.array(fitting)
    fitted, untouched = questions.take(chosen), questions.take(~chosen)
    threshold = calibration.fit_threshold(fitted, precision)
    temperature = calibration.fit_temperature(fitted, threshold)

    def judge(half: calibration.Judged) -> dict[str, Any]:
        before, after = ((0.0, 1.0), (threshold, temperature))
        return {
            "questions": len(half.null),
            "before": calibration.figures(half, *before),
            "after": calibration.figures(half, *after),
        }

    return {
        "null_threshold": threshold,
        "temperature": temperature,
        "goal": "best F1" if precision is None else f"precision {precision} of the answers given",
        "untouched_half": judge(untouched),
        "fitted_half": {"tuned_on_this_data": True, **judge(fitted)},
    }


def options_of(predictor: Predictor) -> dict[str, Any]:
    """What the scores depend on besides the weights."""
    data, evaluation = predictor.task.config.data, predictor.settings.options
    return windows(data.max_length, data.stride, evaluation.max_answer_length)

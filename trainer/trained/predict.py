"""`plainloop predict`: answer one question, a file of questions, or one after another at a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from plainloop.data.errors import InputError
from plainloop.data.readers.causalqa import SEPARATOR
from plainloop.data.store import digest
from plainloop.data.types import Example, TextExample
from plainloop.trainer.config.trained_options import PredictConfig
from plainloop.trainer.errors import INTERRUPTED, RunError
from plainloop.trainer.run_folder.files import sync
from plainloop.trainer.trained.predictor import Predictor, tokenising_processes
from plainloop.trainer.trained.provenance import weights_of


def predict(config: PredictConfig) -> None:
    """All ranks. Raises InputError."""
    from plainloop.trainer.distributed.world import process_group, world_from_env

    if not config.model:
        raise InputError("predict needs --model FOLDER, the folder of a run or of a checkpoint.")
    if config.data and (config.question or config.context):
        raise InputError("--question and --context have no effect with --data; leave them out.")
    if bool(config.data) != bool(config.out):
        raise InputError("--data FILE and --out FILE belong together: where the answers go.")
    if (config.question is None) != (config.context is None):
        raise InputError("--question and --context belong together; leave both out to be asked for them.")
    world = world_from_env(config.device)
    if world.size > 1 and not config.data:
        raise InputError("several processes need --data FILE and --out FILE.")
    if config.out and world.is_main and Path(config.out).exists():
        raise InputError(f"--out {config.out}: this file exists; remove it or choose another one.")
    context = read_context(config.context) if config.context is not None else ""
    if config.question is None and not config.data and not (sys.stdin and sys.stdin.isatty()):
        raise InputError(
            "give --question and --context, or --data and --out; only a terminal is asked for them."
        )
    with process_group(world, timeout_s=config.timeout_s):
        predictor = Predictor(config, world, report=say if world.is_main else lambda line: None)
        if config.data:
            predict_file(predictor, Path(str(config.out)), world.is_main)
        elif config.question is not None:
            print(json.dumps(predictor(config.question, context), indent=2, ensure_ascii=False))
        else:
            converse(predictor)


def read_context(given: str) -> str:
    """The text of a file of this name, else the given text."""
    try:
        if not Path(given).is_file():
            return given
    except OSError:  # too long for a name
        return given
    try:
        return Path(given).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"--context {given}: byte {error.start} is not UTF-8: not a text file?") from None
    except OSError as error:
        raise InputError(f"--context {given}: {error.strerror}.") from None


def predict_file(predictor: Predictor, out: Path, is_main: bool) -> None:
    """All ranks. Write a line per question to OUT.part, in order, and rename it to OUT when it is complete.

    An existing OUT.part of the same model, data and options is continued: its last chunk is computed again,
    for the same bits, and only what is missing is written.
    """
    files = predictor.task.files(predictor.config.data, "dev")
    read = predictor.read(files)
    total = predictor.require_fit(read) if is_main else None  # a bad record shows now, not after hours
    partial = out.with_name(out.name + ".part")
    for note in read.notes:
        say(note)
    with only_writer(out, partial) if is_main else contextlib.nullcontext():
        write_answers(predictor, read, total, out, key_of(predictor, files) if is_main else None)


def write_answers(predictor: Predictor, read: Any, total: int | None, out: Path, key: str | None) -> None:
    """All ranks. key: None on ranks other than 0, which write nothing."""
    from plainloop.data.tokenise import CHUNK
    from plainloop.trainer.distributed.world import broadcast_json

    config, is_main, partial = predictor.config, key is not None, out.with_name(out.name + ".part")
    done = broadcast_json(begin(partial, key) if key is not None else None)
    again = done % CHUNK
    examples: Iterator[Example | TextExample] = islice(read, done - again, None)
    with tqdm(
        total=total, initial=done, desc="predict", unit="q", delay=2, mininterval=1, disable=not is_main
    ) as bar:
        stream = predictor.stream(examples, processes=tokenising_processes(config))
        if not is_main:
            for _ in stream:
                pass
            return
        with open(partial, "ab") as file, _told_how_to_continue():
            for number, (example, answer) in enumerate(stream, start=done - again):
                if number < done:
                    continue
                line = {"id": example.id, "question": example.question.removesuffix(SEPARATOR), **answer}
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                if number % CHUNK == CHUNK - 1:
                    file.flush()
                bar.update(1)
    sync(partial)
    os.rename(partial, out)
    say(f"{out}: complete")


@contextlib.contextmanager
def only_writer(out: Path, partial: Path) -> Iterator[None]:
    """Rank 0. Hold a lock on OUT.part.key. Raises InputError if another process has it, or wrote OUT."""
    try:
        file = open(key_file(partial), "a")
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"--out {out}: another process is writing it now.") from None
        try:
            if out.exists():
                raise InputError(f"--out {out}: this file exists; remove it or choose another one.")
            yield
        finally:
            if not partial.exists():
                key_file(partial).unlink(missing_ok=True)


@contextlib.contextmanager
def _told_how_to_continue() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise RunError("interrupted; the same command continues", INTERRUPTED) from None


def begin(partial: Path, key: str) -> int:
    """Rank 0. Return how many whole lines OUT.part has; cut off a torn one. Raises InputError."""
    try:
        if not partial.exists():
            key_file(partial).write_text(key)  # in place: it is locked
            partial.touch()
            return 0
        before = key_file(partial).read_text()
        if before != key:
            raise InputError(
                f"{partial}: was begun with another model, other data or other options; remove it, or choose"
                " another --out."
            )
        lines = whole = 0
        with open(partial, "r+b") as file:
            for line in file:
                if line.endswith(b"\n"):
                    lines, whole = lines + 1, whole + len(line)
            file.truncate(whole)
    except OSError as error:
        raise InputError(f"--out {partial}: {error.strerror or error}.") from None
    if lines:
        say(f"{partial}: continuing after {lines} answers")
    return lines


def key_file(partial: Path) -> Path:
    return partial.with_name(partial.name + ".key")


def key_of(predictor: Predictor, files: list[str]) -> str:
    """A digest of all that the answers depend on."""
    config, settings = predictor.config, predictor.settings
    fitted = settings.options.null_threshold, settings.temperature
    weights = weights_of(Path(predictor.path))
    options = {
        name: value if isinstance(value, (int, float, str, dict, type(None))) else repr(value)
        for name, value in vars(config).items()
        if name not in ("out", "data", "model", "timeout_s", "processes", "question", "context")
    }
    return digest(predictor.path, options, settings.precision, fitted, weights, *map(Path, files))


def converse(predictor: Predictor) -> None:
    """Ask for a context once, then for questions until there is none."""
    say("Paste a context. End it with an empty line.")
    lines = list(iter(lambda: _line(""), ""))
    context = "\n".join(lines)
    while question := _line("question: "):
        try:
            found: dict[str, Any] = predictor(question, context)
        except InputError as error:
            say(str(error))
            continue
        print(found["answer"] or "(no answer)", _certainty(found), flush=True)


def _line(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        return ""


def _certainty(found: dict[str, Any]) -> str:
    if "probability" in found:
        return f" [probability {found['probability']:.2f}, characters {found['start']} to {found['end']}]"
    return f" [log-probability {found['log_probability']:.2f}]"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""The command line: plainloop train | evaluate | fetch | doctor | demo.

torch is imported only by a command that computes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

USAGE = """\
usage: plainloop COMMAND [--config FILE] [--option value ...]

Fine-tune question-answering models with a training loop you can read in one sitting.

  train      train, or continue the run in --run_dir   (plainloop train --config squad.yaml --optim.lr 3e-5)
  evaluate   figures of a checkpoint or of a predictions file: SQuAD's official ones, CausalQA's
  fetch      with internet: model, tokenizer and data into folders   (plainloop fetch --model roberta-base)
  doctor     before a job: will this command run here? The options are those of train
  demo       train and evaluate on a small built-in corpus, with two processes (--task text: a small T5)

Several processes: torchrun --nproc-per-node 4 -m plainloop.trainer train ...
All options of a command: plainloop COMMAND --help
Exit codes: 0 done, 2 bad option or input, 75 stopped with a checkpoint, 70 the numbers or a process failed,
74 the last checkpoint could not be written. The same in RUN/status.json, since torchrun turns each into 1.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; a user's mistake is one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train, "evaluate": _evaluate, "fetch": _fetch, "doctor": _doctor, "demo": _demo,
    }  # fmt: skip
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    from plainloop.data.processes import end_with_parent
    from plainloop.data.types import InputError
    from plainloop.trainer.errors import UNKNOWN, explain

    if "TORCHELASTIC_RUN_ID" in os.environ:  # a rank: without its agent it would train on, unseen
        end_with_parent(signal.SIGTERM)
    try:
        if arguments[0] not in commands:
            raise InputError(f"unknown command '{arguments[0]}'; there are {', '.join(commands)}.")
        return commands[arguments[0]](arguments[1:])
    except (InputError, KeyboardInterrupt, RuntimeError, OSError, MemoryError) as error:
        message, code = explain(error)
        if code == UNKNOWN:
            raise
        return _fail(message, code)


def main_of_process() -> NoReturn:
    """`main` for a process of its own, which ends with it."""
    code = main()
    if "WORLD_SIZE" in os.environ:
        # A rank. Python would now tear down torch's process group, and one time in 15 (torch 2.13, gloo) that
        # aborts: "terminate called without an active exception". All is written and closed: leave at once.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def _fail(message: str, code: int) -> int:
    """One line, once: rank 0 speaks first, and its exit ends the others before they repeat it."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(3)
    print(f"plainloop: error: {message}", file=sys.stderr, flush=True)
    return code


def _train(arguments: list[str]) -> int:
    from plainloop.trainer.config import TrainConfig
    from plainloop.trainer.options import parse

    config = parse(TrainConfig, arguments, program="plainloop train")
    from plainloop.trainer.run import train

    verdict = train(config, last=True)
    # With --max-restarts torchrun would start a stopped run again at once, and without it prints a traceback
    # for every code but 0. launch/train.sbatch wants neither: status.json says what it is.
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    quiet = restarts or os.environ.get("PLAINLOOP_STOPPED_CODE") == "0"
    return 0 if verdict.name == "STOPPED" and quiet else verdict.value


def _as_list(arguments: list[str], option: str) -> list[str]:
    """`--summary a b c`, as a shell's pattern makes it -> the list that the option wants."""
    if option not in arguments:
        return arguments
    at = arguments.index(option) + 1
    end = next((i for i in range(at, len(arguments)) if arguments[i].startswith("--")), len(arguments))
    given = arguments[at:end]
    if len(given) == 1 and given[0].startswith("["):
        return arguments
    return [*arguments[:at], json.dumps(given), *arguments[end:]]


def _evaluate(arguments: list[str]) -> int:
    from plainloop.trainer.config import ScoreConfig
    from plainloop.trainer.options import parse

    config = parse(ScoreConfig, _as_list(arguments, "--summary"), program="plainloop evaluate")
    if config.summary is not None:
        from plainloop.trainer.summary import summary

        print(summary(config.summary))
        return 0
    from plainloop.trainer.score import print_metrics, score

    metrics = score(config)
    if metrics is not None:
        print_metrics(metrics)
    return 0


def _fetch(arguments: list[str]) -> int:
    from plainloop.trainer.config import FetchConfig
    from plainloop.trainer.options import parse

    config = parse(FetchConfig, arguments, program="plainloop fetch")
    from plainloop.trainer.fetch import fetch

    fetch(config)
    return 0


def _doctor(arguments: list[str]) -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"  # as on a compute node, wherever this is
    from plainloop.trainer.config import DoctorConfig
    from plainloop.trainer.options import parse

    config = parse(DoctorConfig, arguments, program="plainloop doctor")
    from plainloop.trainer.doctor import doctor

    return doctor(config)


def _demo(arguments: list[str]) -> int:
    from plainloop.trainer.config import DemoConfig
    from plainloop.trainer.options import parse

    config = parse(DemoConfig, arguments, program="plainloop demo")
    from plainloop.trainer.demo import demo

    return demo(config)

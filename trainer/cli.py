"""The command line: plainloop train | evaluate | demo. torch is imported only by a command that computes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

USAGE = """\
usage: plainloop COMMAND [--config FILE] [--option value ...]

Fine-tune question-answering models with a training loop you can read in one sitting.

  train      train, or continue the run in --run_dir   (plainloop train --config squad.yaml --optim.lr 3e-5)
  evaluate   figures of a checkpoint or of a predictions file: SQuAD's official ones, CausalQA's
  demo       train and evaluate on a small built-in corpus, with two processes (--task text: a small T5)

Several processes: torchrun --nproc-per-node 4 -m plainloop.trainer train ...
All options of a command: plainloop COMMAND --help
Exit codes: 0 done, 2 bad option or input, 75 stopped with a checkpoint, 70 the numbers went wrong.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; a user's mistake is one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands: dict[str, Callable[[list[str]], int]] = {"train": _train, "evaluate": _evaluate, "demo": _demo}
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    from plainloop.data.types import InputError

    try:
        if arguments[0] not in commands:
            raise InputError(f"unknown command '{arguments[0]}'; there are {', '.join(commands)}.")
        return commands[arguments[0]](arguments[1:])
    except InputError as error:
        return _fail(str(error), 2)
    except FloatingPointError as error:
        return _fail(str(error), 70)


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

    return train(config).value


def _evaluate(arguments: list[str]) -> int:
    from plainloop.trainer.config import ScoreConfig
    from plainloop.trainer.options import parse

    config = parse(ScoreConfig, arguments, program="plainloop evaluate")
    from plainloop.trainer.score import print_metrics, score

    metrics = score(config)
    if metrics is not None:
        print_metrics(metrics)
    return 0


def _demo(arguments: list[str]) -> int:
    from plainloop.trainer.config import DemoConfig
    from plainloop.trainer.options import parse

    config = parse(DemoConfig, arguments, program="plainloop demo")
    from plainloop.trainer.demo import demo

    return demo(config)

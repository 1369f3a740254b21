"""The command line: plainloop train, evaluate, predict and so on.

torch is imported only by the commands that need it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

from plainloop.data.errors import InputError
from plainloop.trainer.config.words import as_list, leading_words, words_to_options

T = TypeVar("T")

USAGE = """\
usage: plainloop COMMAND [--config FILE] [--option value ...]

Fine-tune question-answering models with a training loop you can read in one sitting.

  train      start or resume the run in --run_dir   (plainloop train --config squad.yaml --optim.lr 3e-5)
  evaluate   score a checkpoint or a predictions file with the official SQuAD metrics or those of CausalQA
  predict    answer questions with a trained model   (plainloop predict --model runs/squad)
  calibrate  fit when it should say "no answer", and how probable its answers are
  report     one page about runs: curves, figures, and every question with its answer  (plainloop report RUN)
  compare    is the difference between two runs more than noise?   (plainloop compare A B)
  replay     the rows that a training step saw, and their losses   (plainloop replay RUN --step 812 --losses)
  data       look at data before training: lengths, duplicates, leaks   (plainloop data TRAIN DEV)
  export     write a trained model into a folder, with a model card   (plainloop export runs/squad --out DIR)
  push       upload an exported folder to the Hugging Face Hub   (plainloop push DIR user/name)
  track      copy the curves of runs to a tracker   (plainloop track runs/* --to tensorboard)
  sweep      list the runs of a file with lists of values   (plainloop sweep sweep.yaml --list)
  fetch      download model, tokenizer and data for offline nodes   (plainloop fetch --model roberta-base)
  doctor     check before a job that `train` will run here; takes the options of train
  demo       train and evaluate on a small generated corpus with two processes (--task text: a small T5)

Multiple processes: torchrun --nproc-per-node 4 -m plainloop.trainer train ...
All options of a command: plainloop COMMAND --help
Exit codes: 0 done, 2 bad option or input, 70 NaN/Inf or a failed process, 74 the last checkpoint could not be
written, 75 stopped with a checkpoint, 130 interrupted without one. torchrun turns nonzero codes into 1;
RUN/status.json has the original.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code. A user error prints one line and returns 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train, "evaluate": _evaluate, "predict": _predict, "calibrate": _calibrate,
        "report": _report, "compare": _compare, "replay": _replay, "data": _data,
        "export": _export, "push": _push, "track": _track, "sweep": _sweep, "fetch": _fetch,
        "doctor": _doctor, "demo": _demo,
    }  # fmt: skip
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    from plainloop.data.processes import end_with_parent
    from plainloop.trainer.errors import UNKNOWN, explain

    if "TORCHELASTIC_RUN_ID" in os.environ:  # a rank: don't keep training if the torchrun agent dies
        end_with_parent(signal.SIGTERM)
    try:
        if arguments[0] not in commands:
            raise InputError(f"unknown command '{arguments[0]}'; choose from {', '.join(commands)}.")
        return commands[arguments[0]](arguments[1:])
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (InputError, KeyboardInterrupt, RuntimeError, OSError, MemoryError) as error:
        message, code = explain(error)
        if code == UNKNOWN:
            raise
        return _fail(message, code)


def main_of_process(arguments: list[str] | None = None) -> NoReturn:
    """Run `main` and exit the process with its exit code."""
    code = main(arguments)
    if "WORLD_SIZE" in os.environ:
        from plainloop.data.processes import exit_rank

        exit_rank(code)
    raise SystemExit(code)


def _fail(message: str, code: int) -> int:
    """Print the error once: rank 0 prints first, and its exit ends the other ranks before they repeat it."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(3)
    print(f"plainloop: error: {message}", file=sys.stderr, flush=True)
    return code


def _parse(kind: type[T], arguments: list[str], command: str) -> T:
    from plainloop.trainer.config.parse import parse
    from plainloop.trainer.config.validate import range_faults

    config = parse(kind, arguments, program=f"plainloop {command}")
    if faults := range_faults(config):
        raise InputError("; ".join(f"--{fault}" for fault in faults))
    return config


def _print(text: str) -> None:
    """Print text that has parts of data in it: no escape sequence may reach the terminal."""
    print(re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text))


def _train(arguments: list[str]) -> int:
    from plainloop.trainer.config.options import TrainConfig
    from plainloop.trainer.config.parse import parse

    config = parse(TrainConfig, arguments, program="plainloop train")
    from plainloop.trainer.run import train

    verdict = train(config, last=True).verdict
    # With --max-restarts, torchrun would restart a stopped run at once; without it, it prints a traceback
    # for every nonzero code. launch/train.sbatch needs neither; it reads status.json.
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    quiet = restarts or os.environ.get("PLAINLOOP_STOPPED_CODE") == "0"
    return 0 if verdict.name == "STOPPED" and quiet else verdict.value


def _evaluate(arguments: list[str]) -> int:
    from plainloop.trainer.config.parse import parse
    from plainloop.trainer.config.trained_options import ScoreConfig

    config = parse(ScoreConfig, as_list(arguments, "--summary"), program="plainloop evaluate")
    from plainloop.trainer.trained.evaluate import print_metrics, refuse_unused, score

    if config.summary is not None:
        from plainloop.trainer.trained.summary import summary

        refuse_unused(config, {"summary"}, "--summary")
        print(summary(config.summary))
        return 0
    metrics = score(config)
    if metrics is not None:
        print_metrics(metrics)
    return 0


def _predict(arguments: list[str]) -> int:
    from plainloop.trainer.config.trained_options import PredictConfig

    config = _parse(PredictConfig, arguments, "predict")
    from plainloop.trainer.trained.predict import predict

    predict(config)
    return 0


def _calibrate(arguments: list[str]) -> int:
    from plainloop.trainer.config.trained_options import CalibrateConfig

    config = _parse(CalibrateConfig, arguments, "calibrate")
    from plainloop.trainer.trained.calibrate import calibrate

    if (result := calibrate(config)) is not None:
        print(json.dumps(result, indent=2))
    return 0


def _export(arguments: list[str]) -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from plainloop.trainer.config.trained_options import ExportConfig

    config = _parse(ExportConfig, words_to_options(arguments, "run"), "export")
    from plainloop.trainer.publish.export import export

    export(config)
    return 0


def _push(arguments: list[str]) -> int:
    from plainloop.trainer.config.trained_options import PushConfig

    config = _parse(PushConfig, words_to_options(arguments, "folder", "repo"), "push")
    from plainloop.trainer.publish.push import push

    print(push(config))
    return 0


def _track(arguments: list[str]) -> int:
    from plainloop.trainer.config.trained_options import TrackConfig

    config = _parse(TrackConfig, leading_words(arguments, "runs"), "track")
    from plainloop.trainer.publish.track import track

    track(config)
    return 0


def _sweep(arguments: list[str]) -> int:
    from plainloop.trainer.config.sweep import SweepConfig, sweep

    print(sweep(_parse(SweepConfig, words_to_options(arguments, "file"), "sweep")))
    return 0


def _compare(arguments: list[str]) -> int:
    from plainloop.trainer.config.report_options import CompareConfig

    named = as_list(as_list(words_to_options(arguments, "a", "b"), "--a"), "--b")
    config = _parse(CompareConfig, named, "compare")
    from plainloop.trainer.report.compare import compare

    _print(compare(config))
    return 0


def _report(arguments: list[str]) -> int:
    from plainloop.trainer.config.report_options import ReportConfig

    config = _parse(ReportConfig, as_list(leading_words(arguments, "runs"), "--scores"), "report")
    from plainloop.trainer.report.report import report

    report(config)
    return 0


def _replay(arguments: list[str]) -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from plainloop.trainer.config.report_options import ReplayConfig

    config = _parse(ReplayConfig, words_to_options(arguments, "run"), "replay")
    from plainloop.trainer.commands.replay import replay

    _print(replay(config))
    return 0


def _data(arguments: list[str]) -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from plainloop.trainer.config.report_options import DatasetConfig

    config = _parse(DatasetConfig, words_to_options(arguments, "train", "dev"), "data")
    from plainloop.trainer.commands.data_report import data_report

    text, code = data_report(config)
    _print(text)
    return code


def _fetch(arguments: list[str]) -> int:
    from plainloop.trainer.config.command_options import FetchConfig
    from plainloop.trainer.config.parse import parse

    config = parse(FetchConfig, arguments, program="plainloop fetch")
    from plainloop.trainer.commands.fetch import fetch

    fetch(config)
    return 0


def _doctor(arguments: list[str]) -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"  # behave as on a compute node
    from plainloop.trainer.config.command_options import DoctorConfig
    from plainloop.trainer.config.parse import parse

    config = parse(DoctorConfig, arguments, program="plainloop doctor")
    from plainloop.trainer.commands.doctor import doctor

    return doctor(config)


def _demo(arguments: list[str]) -> int:
    from plainloop.trainer.config.command_options import DemoConfig
    from plainloop.trainer.config.parse import parse

    config = parse(DemoConfig, arguments, program="plainloop demo")
    from plainloop.trainer.commands.demo import demo

    return demo(config)

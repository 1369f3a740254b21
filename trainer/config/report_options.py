"""Options of the commands that show results: compare, report, replay and data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from plainloop.trainer.config.option import option


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare two runs on the same questions, by a paired test that knows that questions share a paragraph.

    A and B are run folders, folders of evaluate --out_dir, or predictions files. Example:
        plainloop compare runs/old runs/new --data dev-v2.0.json
        plainloop compare --a runs/old/seed-* --b runs/new/seed-* --data dev-v2.0.json
    """

    a: list[str] = option(list, "the first run, or several seeds of it; the first word")
    b: list[str] = option(list, "the second run, or several seeds of it; the second word")
    data: list[str] | str | None = option(
        None, "the questions and answers, as in train; default: the data that the first run was scored on"
    )
    columns: dict[str, str] = option(dict, "columns of the data with other names, as in train")
    metric: Literal["squad", "mlqa"] | None = option(
        None, "how answers are compared, as in evaluate; default: as in the first run's evaluations"
    )
    language: Literal["ar", "de", "en", "es", "hi", "vi", "zh"] | None = option(None, "with metric mlqa")
    unit: Literal["paragraph", "article", "question"] = option(
        "paragraph",
        "what is resampled as one: questions about the same paragraph (or article) fail together, so an"
        " interval over single questions is too narrow",
    )
    resamples: int = option(10_000, "bootstrap resamples", minimum=100)
    seed: int = option(0, "seed of the resampling: the same seed prints the same bytes", minimum=0)
    json: bool = option(False, "print JSON instead of a table")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write one HTML page about runs: options, curves, figures, and every question with its answer.

    The page needs no network, and no other file. Example:
        plainloop report runs/squad --out report.html
    """

    runs: list[str] = option(
        list,
        "run folders, or folders of evaluate --out_dir, separated by blanks; the first words",
    )
    out: str = option("report.html", "the page to write")
    scores: list[str] = option(
        list,
        "folders of evaluate --out_dir, separated by blanks, one for each run in the same order, instead of"
        " the runs' last evaluation",
    )
    data: list[str] | str | None = option(
        None, "the questions and answers; default: the data that the first run was scored on"
    )
    columns: dict[str, str] = option(dict, "columns of the data with other names, as in train")
    metric: Literal["squad", "mlqa"] | None = option(
        None, "how answers are compared, as in evaluate; default: as in the first run's evaluations"
    )
    language: Literal["ar", "de", "en", "es", "hi", "vi", "zh"] | None = option(None, "with metric mlqa")
    png: str | None = option(None, "a folder that also gets each figure as a PNG file of 200 dpi")
    resamples: int = option(10_000, "with two runs: bootstrap resamples of their comparison", minimum=100)


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Show what a training step of a run saw: its rows, in the order of the step, as text.

    Example:
        plainloop replay runs/squad --step 812 --losses
    """

    run: str | None = option(None, "run folder; the first word")
    step: int | None = option(None, "the optimizer step, counted from 1 as in the log", minimum=1)
    losses: bool = option(
        False,
        "also recompute the loss of each row: load the last checkpoint before the step, and train up to it",
    )
    around: int = option(0, "also print the log lines of this many steps before and after", minimum=0)
    chars: int = option(300, "characters of each row's input to print; 0: all", minimum=0)
    base: str | None = option(None, "base model of a run with adapters; default: where it was in training")
    task: str | None = option(None, "a task of your own must be named here: its code is run")
    json: bool = option(False, "print JSON instead of text")
    device: Literal["auto", "cuda", "cpu"] = option("auto", "with --losses: device to run the model on")


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Look at data before training: counts, lengths, cut answers, duplicates, and what train and dev share.

    Example:
        plainloop data train-v2.0.json dev-v2.0.json --model roberta-base
    """

    train: list[str] | str | None = option(None, "training data, as in train; the first word")
    dev: list[str] | str | None = option(None, "evaluation data; the second word")
    columns: dict[str, str] = option(dict, "columns of the data with other names, as in train")
    model: str | None = option(
        None, "count tokens with this model's tokenizer, and the answers that no window holds; default: words"
    )
    ambiguous: Literal["error", "skip", "first"] = option(
        "error", "what train will do with an answer that can't be located"
    )
    max_length: int | None = option(
        None, "with model: tokens per row; default: as in train, 384, or 1024 for text models", minimum=1
    )
    stride: int | None = option(
        None, "with model: overlap of neighbouring windows, in tokens; default: as in train, 128", minimum=0
    )
    processes: int | None = option(
        None, "processes for tokenising; default: the cores this process may use", minimum=1
    )
    examples: int = option(5, "examples to list of each finding", minimum=0)
    html: str | None = option(None, "also write a page, in the form of plainloop report")
    json: bool = option(False, "print JSON instead of text")

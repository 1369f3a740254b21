"""`plainloop sweep`: a YAML file with lists of values stands for a run per combination."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from plainloop.trainer.config.options import TrainConfig, option
from plainloop.trainer.config.parse import check_yaml, flatten, option_names, parse
from plainloop.trainer.config.validate import range_faults
from plainloop.trainer.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """List the runs of a sweep file, or print the options of one: each option in it with a list is varied.

    Example:
        plainloop sweep sweep.yaml --list
        plainloop train --config squad.yaml $(plainloop sweep sweep.yaml --task 3 --run_dir runs/sweep)
    """

    file: str | None = option(
        None, "YAML file of options of train, some with lists of values; the first word"
    )
    list: bool = option(False, "print the number, the folder and the options of every run")
    task: int | None = option(None, "print the options of this run, one word per line", minimum=1)
    run_dir: str | None = option(
        None, "with task: print --run_dir too, a folder of the run's own in this one"
    )


@dataclass(frozen=True)
class Run:
    """A combination. name: a folder name, from the values that vary. options: words of the command line."""

    name: str
    options: list[str]


def sweep(config: SweepConfig) -> str:
    """What to print. Raises InputError."""
    if not config.file or config.list == (config.task is not None):
        raise InputError("sweep needs a file, and either --list or --task K: plainloop sweep FILE --list.")
    if config.list and config.run_dir:
        raise InputError("--run_dir: no effect with --list; leave it out.")
    runs = expand(Path(config.file))
    if config.list:
        width = max(len(run.name) for run in runs)
        lines = [
            f"{n:>4}  {run.name:<{width}}  {' '.join(run.options)}" for n, run in enumerate(runs, start=1)
        ]
        return "\n".join(
            [*lines, f"sbatch --array=1-{len(runs)} launch/train.sbatch --sweep {config.file} ..."]
        )
    if config.task is None or config.task > len(runs):
        raise InputError(f"--task {config.task}: {config.file} has {len(runs)} runs.")
    run = runs[config.task - 1]
    folder = [f"--run_dir={Path(config.run_dir) / run.name}"] if config.run_dir else []
    return "\n".join([*folder, *run.options])


def expand(path: Path) -> list[Run]:
    """All combinations; the last option varies fastest. Raises InputError."""
    names = option_names(TrainConfig)
    check_yaml(str(path), names)
    values = flatten(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    if "run_dir" in values:
        raise InputError(
            f"{path}: run_dir: give it on the command line; each run gets a folder of its own in it."
        )
    varied = {name: value for name, value in values.items() if isinstance(value, list)}
    if not varied:
        raise InputError(f"{path}: no option has a list of values, for example seed: [1, 2, 3].")
    if empty := [name for name, value in varied.items() if not value]:
        raise InputError(f"{path}: {empty[0]}: the list is empty.")
    fixed = [f"--{name}={_text(value)}" for name, value in values.items() if name not in varied]
    short = {name: name.rpartition(".")[2] for name in varied}
    if len(set(short.values())) < len(short):
        short = {name: name for name in varied}
    runs: dict[str, Run] = {}
    configs: list[TrainConfig] = []
    for chosen in itertools.product(*varied.values()):
        texts = [_text(value) for value in chosen]
        name = "_".join(f"{short[n]}-{_plain(t)}" for n, t in zip(varied, texts, strict=True))
        words = [f"--{n}={text}" for n, text in zip(varied, texts, strict=True)]
        config = parse(TrainConfig, [*fixed, *words], program="sweep")
        if faults := range_faults(config):  # now, not in a job
            raise InputError(f"{path}: {'; '.join(faults)}")
        if config in configs:
            raise InputError(f"{path}: {name}: is another run with the same options; is a value there twice?")
        configs.append(config)
        name += f"_{len(runs) + 1}" if name in runs else ""
        runs[name] = Run(name, [*fixed, *words])
    return list(runs.values())


def _text(value: Any) -> str:
    """The value as a word of the command line."""
    if "\n" in (text := str(value)):
        raise InputError(f"{text!r}: a value of a sweep must be one line.")
    plain = value is None or isinstance(value, (bool, list, dict))
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False) if plain else text


def _plain(text: str) -> str:
    """The text, fit for a folder name."""
    return re.sub(r"[^\w.+-]+", "_", Path(text).name if "/" in text else text).strip("_")

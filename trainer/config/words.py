"""Words of a command line that need no option name: `plainloop compare A B`, `plainloop track RUN RUN`."""

from __future__ import annotations

import itertools
import json

from plainloop.trainer.errors import InputError


def words_to_options(arguments: list[str], *options: str) -> list[str]:
    """Make options of the words before the first option: `RUN --out DIR` to `--run RUN --out DIR`."""
    given = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    if len(given) > len(options):
        raise InputError(f"too many words before the options: {' '.join(given)}; see --help.")
    named = [part for pair in zip(options, given, strict=False) for part in (f"--{pair[0]}", pair[1])]
    return [*named, *arguments[len(given) :]]


def leading_words(arguments: list[str], option: str) -> list[str]:
    """Make a list of the words before the first option: `A B --to X` to `--runs ["A", "B"] --to X`."""
    given = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    return [*([f"--{option}", json.dumps(given)] if given else []), *arguments[len(given) :]]


def as_list(arguments: list[str], option: str) -> list[str]:
    """Turn `--summary a b c`, as expanded by a shell glob, into the list that the option expects."""
    if option not in arguments:
        return arguments
    at = arguments.index(option) + 1
    end = next((i for i in range(at, len(arguments)) if arguments[i].startswith("--")), len(arguments))
    given = arguments[at:end]
    if len(given) == 1 and given[0].startswith("["):
        return arguments
    return [*arguments[:at], json.dumps(given), *arguments[end:]]

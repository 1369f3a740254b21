"""Parse the command line and a YAML file into a config object. A bad option gives a one-line error.

jsonargparse handles types and dotted names; the checks here name the file and the closest option.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from plainloop.trainer.errors import InputError

T = TypeVar("T")


def option_names(kind: type, prefix: str = "") -> dict[str, type]:
    """Map the dotted names of all options of a config class, sections included, to their types."""
    names: dict[str, type] = {}
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        names[prefix + spelled(item.name)] = hint
        if dataclasses.is_dataclass(hint):
            names |= option_names(typing.cast(type, hint), f"{prefix}{item.name}.")
    return names


def spelled(field: str) -> str:
    """Return the option name of a field: `async_` becomes `async`."""
    return field.removesuffix("_")


def parse(kind: type[T], arguments: list[str], *, program: str) -> T:
    """Parse the command line (with --config FILE and dotted overrides) into an instance of the config class.

    Raises a one-line InputError for an unknown, duplicate or ill-typed option; --help prints and exits.
    """
    from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

    class Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Keeps the lines of the description, which has an example."""

    names = option_names(kind)
    arguments = _spell_out_flags(_spell_out_modes(arguments, names), names)
    for i, argument in enumerate(arguments):
        name, _, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name not in {*names, "config", "help", "print_config"}:
            raise InputError(f"unknown option --{name}{_nearest(name, names)}")
        if name == "config" and argument.startswith("--"):
            check_yaml(value or next(iter(arguments[i + 1 :]), ""), names)
    parser = ArgumentParser(
        prog=program, description=inspect.getdoc(kind), exit_on_error=False, formatter_class=Help
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    _add_options(parser, kind)
    try:
        values = parser.parse_args(arguments)
    except ArgumentError as error:
        raise InputError(" ".join(str(error).removeprefix("Parser key ").split())) from None
    return from_dict(kind, values.as_dict())


def _spell_out_modes(arguments: list[str], names: dict[str, type]) -> list[str]:
    """Expand `--parallel fsdp` to `--parallel.mode fsdp`."""
    modes = {f"--{name.removesuffix('.mode')}": f"--{name}" for name in names if name.endswith(".mode")}
    parts = [argument.partition("=") for argument in arguments]
    return [modes.get(name, name) + sign + value for name, sign, value in parts]


def _spell_out_flags(arguments: list[str], names: dict[str, type]) -> list[str]:
    """Expand a bare `--strict` to `--strict true`."""
    spelled = []
    for argument, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        is_flag = argument.startswith("--") and names.get(argument[2:]) is bool
        spelled += [argument, "true"] if is_flag and following.startswith("--") else [argument]
    return spelled


def _add_options(parser: Any, kind: type, prefix: str = "") -> None:
    for item in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[item.name]
        if dataclasses.is_dataclass(hint):
            _add_options(parser, typing.cast(type, hint), f"{item.name}.")
        else:
            default = item.default_factory() if callable(item.default_factory) else item.default
            parser.add_argument(
                f"--{prefix}{spelled(item.name)}", type=hint, default=default, help=item.metadata["help"]
            )


def from_dict(kind: type[T], values: dict[str, Any]) -> T:
    """Build a config object from nested values. Unknown keys are dropped (they were checked before)."""
    hints = typing.get_type_hints(kind)
    known = {}
    for item in dataclasses.fields(typing.cast(Any, kind)):
        if (name := spelled(item.name)) in values:
            value, hint = values[name], hints[item.name]
            known[item.name] = (
                from_dict(typing.cast(type, hint), value) if dataclasses.is_dataclass(hint) else value
            )
    return kind(**known)


def to_yaml(config: Any) -> str:
    """Return the resolved config as YAML that `--config` can read back."""
    values = dataclasses.asdict(config)
    return yaml.safe_dump(plain(values), sort_keys=False, allow_unicode=True)


DICT_OPTIONS = {"columns", "data.columns"}  # options that are dictionaries, not sections


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'optim': {'lr': 1}} -> {'optim.lr': 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and prefix + key not in DICT_OPTIONS:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + spelled(key)] = plain(value)
    return flat


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {spelled(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _nearest(name: str, names: typing.Iterable[str]) -> str:
    names = list(names)
    close = [n for n in names if n.rpartition(".")[2] == name] or difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else "; see --help."


class _StrictLoader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys instead of silently keeping the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise InputError(f"line {node.start_mark.line + 1}: duplicate key '{key}'; keep one.")
        return super().construct_mapping(node, deep)


def check_yaml(path: str, names: dict[str, type]) -> None:
    """Raise an InputError that names the file and the key if a key is unknown or duplicate."""
    if not Path(path).is_file():
        raise InputError(f"--config {path}: no such file.")
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_StrictLoader)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if values is None:
        return
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a config: the top level must be 'option: value' lines.")
    for name, value in flatten(values).items():
        if dataclasses.is_dataclass(names.get(name)) and value is not None:
            raise InputError(f"{path}: '{name}' is a section: write its options below it, indented.")
        if name not in names:
            raise InputError(f"{path}: unknown option '{name}'{_nearest(name, names)}")

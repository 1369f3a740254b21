"""Find tasks and hooks by name: the package's tasks, or an import path (module:name) of your own code."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, cast

from plainloop.trainer.config.options import TrainConfig
from plainloop.trainer.config.parse import option_names
from plainloop.trainer.config.validate import TASK_OPTIONS
from plainloop.trainer.errors import InputError
from plainloop.trainer.tasks.base import Task
from plainloop.trainer.tasks.span import SpanTask
from plainloop.trainer.tasks.text import TextTask

TASKS: dict[str, type[Task]] = {"span": SpanTask, "text": TextTask}
METHODS = [name for name, value in vars(Task).items() if inspect.isfunction(value) and name[0] != "_"]
ATTRIBUTES = ("uses", "feature_options", "metric_names")


def find_task(name: str) -> type[Task]:
    """The class of a task: of TASKS, or module:Class. Raises InputError if it is not a task."""
    if name in TASKS:
        return TASKS[name]
    if ":" not in name:
        raise InputError(f"task {name}: must be {', '.join(TASKS)}, or module:Class for a task of your own.")
    found = import_path(name, option="task")
    if not inspect.isclass(found):
        raise InputError(f"task {name}: must be a class; see Task in trainer/tasks/base.py.")
    if missing := [n for n in (*METHODS, *ATTRIBUTES) if not hasattr(found, n)]:
        raise InputError(f"task {name}: has no {', '.join(missing)}; see Task in trainer/tasks/base.py.")
    for method in ("__init__", *METHODS):
        if fault := _signature_fault(method, found):
            raise InputError(f"task {name}: {method} {fault}.")
    for attribute, known in (("uses", TASK_OPTIONS), ("feature_options", option_names(TrainConfig))):
        if unknown := [n for n in getattr(found, attribute) if n not in known]:
            raise InputError(f"task {name}: {attribute} names {', '.join(unknown)}, which is no such option.")
    return cast("type[Task]", found)


def _signature_fault(method: str, found: type) -> str | None:
    """How the arguments of a method differ from those of Task; more are fine if they have a default."""
    wanted, given = (
        [p for p in inspect.signature(getattr(c, method)).parameters.values() if p.name != "self"]
        for c in (Task, found)
    )
    names = [p.name for p in given]
    required = [p.name for p in given[len(wanted) :] if p.default is p.empty]
    if names[: len(wanted)] == [p.name for p in wanted] and not required:
        return None
    return f"takes ({', '.join(names)}), but must take ({', '.join(p.name for p in wanted)})"


def find_hooks(names: Sequence[str]) -> list[Callable[..., Any]]:
    """The hooks behind module:name paths; a class is instantiated without arguments. Raises InputError."""
    hooks: list[Callable[..., Any]] = []
    for name in names:
        found = import_path(name, option="hooks")
        try:
            hook: Any = found() if inspect.isclass(found) else found
            inspect.signature(hook).bind("progress")
        except Exception as error:  # whatever the constructor raises
            raise InputError(
                f"hooks {name}: must be a function of one argument, the Progress, or a class without"
                f" constructor arguments whose instances are such functions ({_where(error)})."
            ) from None
        hooks.append(hook)
    return hooks


def import_path(name: str, *, option: str) -> Any:
    """Import module:name; the working directory is searched too. Raises InputError."""
    module, separator, attribute = name.partition(":")
    if not (module and separator and attribute):
        raise InputError(f"{option} {name}: must be module:name, for example my_module:MyClass.")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{option} {name}: {error}. Modules are searched in the working directory and in PYTHONPATH."
        ) from None
    except Exception as error:  # whatever the module's own code raises
        raise InputError(f"{option} {name}: importing {module} failed: {_where(error)}.") from None
    if not hasattr(imported, attribute):
        raise InputError(f"{option} {name}: {module} has no {attribute}.")
    return getattr(imported, attribute)


def _where(error: Exception) -> str:
    """An exception of the user's code in one line, with the last file and line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error}, in {last.filename}:{last.lineno}"

"""Find a task, and hooks, by name: a task of this package, or an import path of your own as module:name."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

from plainloop.trainer.errors import InputError
from plainloop.trainer.tasks.base import Task
from plainloop.trainer.tasks.span import SpanTask
from plainloop.trainer.tasks.text import TextTask

TASKS: dict[str, type[Task]] = {"span": SpanTask, "text": TextTask}
METHODS = [name for name, value in vars(Task).items() if inspect.isfunction(value) and name[0] != "_"]
ATTRIBUTES = ("uses", "feature_options")


def find_task(name: str) -> type[Task]:
    """The class of a task: of TASKS, or module:Class. Raises InputError if it is not a task."""
    if name in TASKS:
        return TASKS[name]
    if ":" not in name:
        raise InputError(f"task {name}: must be {', '.join(TASKS)}, or module:Class for a task of your own.")
    found = import_path(name, option="task")
    if missing := [n for n in (*METHODS, *ATTRIBUTES) if not hasattr(found, n)]:
        raise InputError(f"task {name}: has no {', '.join(missing)}; see Task in trainer/tasks/base.py.")
    for method in METHODS:
        wanted, given = (list(inspect.signature(getattr(c, method)).parameters) for c in (Task, found))
        if wanted != given:
            raise InputError(
                f"task {name}: {method} takes ({', '.join(given)}), but must take ({', '.join(wanted)})."
            )
    task: type[Task] = found
    return task


def find_hooks(names: Sequence[str]) -> list[Callable[..., Any]]:
    """The hooks behind module:name paths; a class is instantiated without arguments. Raises InputError."""
    hooks: list[Callable[..., Any]] = []
    for name in names:
        found = import_path(name, option="hooks")
        try:
            hook: Any = found() if inspect.isclass(found) else found
            inspect.signature(hook).bind("progress")
        except (TypeError, ValueError) as error:
            raise InputError(
                f"hooks {name}: must be a function of one argument, the Progress, or a class without"
                f" arguments whose instances can be called so ({error})."
            ) from None
        hooks.append(hook)
    return hooks


def import_path(name: str, *, option: str) -> Any:
    """Import module:name; the working directory is searched too. Raises InputError."""
    module, separator, attribute = name.partition(":")
    if not (module and separator and attribute):
        raise InputError(f"{option} {name}: must be module:name, as my_module:MyClass.")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise InputError(
            f"{option} {name}: {error}. Modules are searched in the working directory and in PYTHONPATH."
        ) from None
    except AttributeError:
        raise InputError(f"{option} {name}: {module} has no {attribute}.") from None

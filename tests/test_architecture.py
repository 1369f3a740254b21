"""The house as a test: which rooms import from which, no cycle, no bare names, small files, a small Task."""

import ast
import graphlib
import inspect
import subprocess
import sys
import textwrap
from collections import Counter

import house

ROOT = house.ROOT
# Room -> the rooms that it may import from. The order is that of the layers, from the bottom up.
ALLOWED = {
    "data": "",
    "data/readers": "data",
    "models": "data",
    "launch": "",
    "trainer": "",
    "trainer/errors": "data",
    "trainer/config": "trainer/errors",
    "trainer/run_folder": "trainer/errors",
    "trainer/distributed": "data trainer/errors trainer/run_folder",
    "trainer/optim": "trainer/config",
    "trainer/precision": "trainer/distributed trainer/errors",
    "trainer/state": "data trainer/distributed trainer/run_folder",
    "trainer/tasks": "data data/readers models trainer/config trainer/distributed trainer/errors"
    " trainer/precision trainer/run_folder",
    "trainer/checkpoint": "data trainer/config trainer/distributed trainer/errors trainer/run_folder"
    " trainer/state",
    "trainer/loop": "data trainer/distributed trainer/precision trainer/state",
    "trainer/hooks": "data trainer/config trainer/distributed trainer/errors trainer/loop trainer/run_folder"
    " trainer/state",
    "trainer/run": "data models trainer/checkpoint trainer/config trainer/distributed trainer/errors"
    " trainer/hooks trainer/loop trainer/optim trainer/precision trainer/run_folder trainer/state"
    " trainer/tasks",
    "trainer/trained": "data data/readers models trainer/checkpoint trainer/config trainer/distributed"
    " trainer/errors trainer/precision trainer/run_folder trainer/tasks",
    "trainer/publish": "data/readers models trainer/config trainer/errors trainer/run_folder trainer/trained",
    "trainer/report": "data data/readers trainer/config trainer/run_folder trainer/tasks trainer/trained",
    "trainer/commands": "data data/readers models trainer/checkpoint trainer/config trainer/distributed"
    " trainer/errors trainer/hooks trainer/loop trainer/optim trainer/precision"
    " trainer/report trainer/run trainer/run_folder trainer/state trainer/tasks",
    "trainer/cli": "data trainer/commands trainer/config trainer/errors trainer/publish trainer/report"
    " trainer/run trainer/trained",
    "trainer/__main__": "trainer/cli",
}


def test_rooms_import_only_from_the_rooms_below() -> None:
    for room, targets in house.arrows().items():
        assert targets <= set(ALLOWED[room].split()), f"{room} imports from {sorted(targets)}"
    for path in house.FILES:
        bare = {name.split(".")[0] for name in house.imports_of(path)} & set(house.PACKAGES)
        assert not bare, f"{path} imports {bare} by its bare name"


def test_few_rooms_few_arrows_and_no_cycle() -> None:
    graph = house.arrows()
    assert len(graph) <= 21 and sum(map(len, graph.values())) <= 97
    tuple(graphlib.TopologicalSorter(graph).static_order())
    modules = {house.module_name(path): path for path in house.FILES}
    imports = {name: house.imports_of(path) & modules.keys() - {name} for name, path in modules.items()}
    tuple(graphlib.TopologicalSorter(imports).static_order())


def test_no_folder_is_wide_and_no_file_long() -> None:
    assert max(Counter(path.parent for path in house.FILES).values()) <= 12
    tests = [path for path in (ROOT / "tests").rglob("*.py")]
    lines = {str(path): len(path.read_text().splitlines()) for path in [*house.FILES, *tests]}
    assert {path: n for path, n in lines.items() if n > 300} == {}
    assert lines[str(ROOT / "tests/house.py")] <= 60


def test_the_program_is_two_pages() -> None:
    lines = {name: (ROOT / f"trainer/{name}.py").read_text() for name in ("run", "loop")}
    assert sum(len(text.splitlines()) for text in lines.values()) < 350
    (train,) = [
        n for n in ast.parse(lines["run"]).body if isinstance(n, ast.FunctionDef) and n.name == "train"
    ]
    assert train.end_lineno is not None and train.end_lineno - train.lineno + 1 <= 90
    assert "task" not in lines["loop"].lower() and "squad" not in lines["loop"].lower()


def test_a_task_is_small() -> None:
    from plainloop.trainer.tasks.find import METHODS, TASKS

    assert len(METHODS) <= 8
    for task in TASKS.values():
        for method in METHODS:  # mypy compares the types; no argument may be ignored
            tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(task, method))))
            function = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
            used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
            arguments = function.args.args[1:] + function.args.kwonlyargs
            assert not {a.arg for a in arguments} - used, f"{task.__name__}.{method} ignores an argument"


# Import each module in a process without any of ours; other libraries are imported once, before the fork.
IMPORT_ALONE = """
import os, sys, torch, transformers
for module in sys.argv[1:]:
    if not (child := os.fork()):
        try:
            __import__(module)
        except BaseException as error:
            print(f"{module}: {error!r}", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_every_module_can_be_imported_alone() -> None:
    modules = [house.module_name(path) for path in house.FILES if path.stem != "__main__"]
    command = [sys.executable, "-c", IMPORT_ALONE, *modules]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not result.stdout

"""The house as a test: who may import whom, no circle, no bare names, short files, every module alone."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("data", "models", "trainer", "launch")
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
# What a room may import besides itself: rooms, or single modules.
ALLOWED = {"data": set(), "models": {"data.types"}, "trainer": {"data", "models", "launch"}, "launch": set()}


def name_of(path: Path) -> str:
    return "plainloop." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_rooms_import_only_what_they_may() -> None:
    for path in MODULES:
        room = path.relative_to(ROOT).parts[0]
        for imported in imports_of(path):
            if imported == "plainloop" or not imported.startswith("plainloop."):
                assert imported.split(".")[0] not in ROOMS, f"{path} imports {imported} by its bare name"
                continue
            target = imported.removeprefix("plainloop.")
            fine = target.split(".")[0] in {room} | ALLOWED[room] or any(
                target == module or target.startswith(module + ".") for module in ALLOWED[room]
            )
            assert fine, f"{path} must not import {imported}"


def test_no_circle() -> None:
    known = {name_of(path): path for path in MODULES}
    graph = {name: imports_of(path) & set(known) - {name} for name, path in known.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_the_loop_names_no_task() -> None:
    text = (ROOT / "trainer/loop.py").read_text().lower()
    assert "task" not in text and "span" not in text and "squad" not in text


def test_lengths() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in MODULES}
    assert {str(path): n for path, n in lines.items() if n > 300} == {}
    assert lines[ROOT / "trainer/run.py"] + lines[ROOT / "trainer/loop.py"] < 400
    tests = [path for path in (ROOT / "tests").rglob("*.py") if len(path.read_text().splitlines()) > 300]
    assert not tests


# Each module in a process that has none of ours; what others made is imported once, before the fork.
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
    modules = [name_of(path) for path in MODULES if path.stem != "__main__"]
    command = [sys.executable, "-c", IMPORT_ALONE, *modules]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not result.stdout

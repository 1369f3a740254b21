"""Count the rooms of the house and the arrows between them: python tests/house.py

A room is a folder of Python files; in trainer/, each file outside the subfolders is a room of its own. An
arrow is an import from one room to another.
"""

from __future__ import annotations

import ast
import graphlib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "models", "trainer", "launch")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    return "plainloop." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(path: Path) -> str:
    folder = path.relative_to(ROOT).parent
    own = folder == Path("trainer") and path.stem != "__init__"
    return str(folder / path.stem if own else folder)


def imports_of(path: Path) -> set[str]:
    """Dotted names of the modules, or of the names in them, that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def arrows() -> dict[str, set[str]]:
    """Room -> the rooms that it imports from."""
    home = {module_name(path): room_of(path) for path in FILES if path.stem != "__init__"}
    graph: dict[str, set[str]] = {room: set() for room in home.values()}
    for path in FILES:
        targets = {home[name] for name in imports_of(path) & home.keys()} - {room_of(path)}
        graph.setdefault(room_of(path), set()).update(targets)
    return {room: targets for room, targets in graph.items() if targets or room in home.values()}


if __name__ == "__main__":
    graph = arrows()
    sizes = Counter(str(path.parent.relative_to(ROOT)) for path in FILES)
    print(f"{len(graph)} rooms, {sum(map(len, graph.values()))} arrows, {sum(sizes.values())} files")
    print(f"widest folder: {max(sizes, key=lambda f: sizes[f])} with {max(sizes.values())} files")
    for room in graphlib.TopologicalSorter(graph).static_order():
        print(f"{room:24} -> {', '.join(sorted(graph[room]))}")

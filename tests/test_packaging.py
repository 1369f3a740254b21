"""The wheel holds plainloop/ and nothing else, installs without -e, and runs from any folder."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_wheel_holds_plainloop_only_and_runs(tmp_path: Path) -> None:
    """Built from a copy of the tracked files, so that nothing is left behind here."""
    source = tmp_path / "source"
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(".pkg"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "-w", tmp_path / "dist", source], check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"plainloop", wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}
    for wanted in ("trainer/__main__.py", "launch/recipes/demo.yaml", "data/py.typed"):
        assert f"plainloop/{wanted}" in names
    target = tmp_path / "installed"
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", target, wheel], check=True)
    code = (
        "import plainloop.trainer.run as r, plainloop.trainer.cli as c; print(r.__file__); c.main(['--help'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(target), "PATH": ""},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.startswith(str(target)) and "usage: plainloop" in result.stdout

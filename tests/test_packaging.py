"""The wheel contains only plainloop/, installs without -e, and runs from any folder."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.mark.slow
def test_wheel_contains_only_plainloop_and_runs(installed_wheel: tuple[Path, Path], tmp_path: Path) -> None:
    """For the wheel in a Slurm job, see tests/launch/test_training.py."""
    wheel, target = installed_wheel
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"plainloop", wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}
    for wanted in ("trainer/__main__.py", "launch/recipes/demo.yaml", "launch/train.sbatch", "data/py.typed"):
        assert f"plainloop/{wanted}" in names
    code = (
        "import plainloop.trainer.run as r, plainloop.trainer.cli as c; print(r.__file__); c.main(['--help'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(target), "PATH": ""},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.startswith(str(target)) and "usage: plainloop" in result.stdout

"""Shared by the tests of what is done with a run."""

from pathlib import Path
from typing import Any

import pytest

from plainloop.trainer.cli import main


def as_arguments(options: dict[str, Any]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


@pytest.fixture
def run(options: Any, squad_file: Path) -> str:
    """A run with two evaluations that was stopped once and resumed."""
    options |= {"data.dev": str(squad_file), "evaluation.every_steps": 6, "max_steps": 12}
    options |= {"evaluation.num_best": 5, "checkpoint.every_steps": 4}
    assert main(["train", *as_arguments(options | {"stop_at_step": 5})]) == 75
    assert main(["train", *as_arguments(options)]) == 0
    return str(options["run_dir"])

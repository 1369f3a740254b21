"""Shared fixtures: a tiny encoder with a real tokenizer, a small SQuAD file, torchrun, and the real data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may access the network

sys.path.insert(0, str(Path(__file__).parent))  # for helpers/

from helpers.tiny_models import tiny_bert, tiny_t5_for  # noqa: E402

from plainloop.data.demo import make_part  # noqa: E402

REAL_DATA = os.environ.get("PLAINLOOP_REAL_DATA")


@pytest.fixture(autouse=True)
def same_signal_handlers() -> Iterator[None]:
    """A run ignores signals once its outcome is saved; processes of later tests would inherit that."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield
    for number, handler in before.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real SQuAD files and vocabularies; if it is not set, tests that need it are skipped."""
    if not REAL_DATA:
        pytest.skip("PLAINLOOP_REAL_DATA is not set")
    return Path(REAL_DATA).resolve()


@pytest.fixture(scope="session")
def squad_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 contexts, 120 questions."""
    path = tmp_path_factory.mktemp("squad") / "train.json"
    path.write_text(json.dumps(make_part("train", 40, seed=1)))
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, squad_file: Path) -> Path:
    """A two-layer BERT with random weights and its own WordPiece vocabulary: 35,000 parameters."""
    return tiny_bert(tmp_path_factory.mktemp("tiny-bert"), squad_file)


@pytest.fixture(scope="session")
def minilm() -> str:
    from plainloop.trainer.commands.demo import packaged_encoder

    return packaged_encoder()


@pytest.fixture
def options(tiny_model: Path, squad_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Options of a run on the tiny model: 2 epochs of 15 steps. Dotted names; tests override them."""
    return {
        "run_dir": str(tmp_path / "run"), "batch_size": 8, "epochs": 2, "tokens_per_device": 200,
        "model.path": str(tiny_model), "data.train": str(squad_file), "data.bucket": 3, "precision": "fp32",
        "data.max_length": 96, "data.stride": 24, "data.cache_dir": str(tmp_path / "cache"), "optim.lr": 1e-3,
        "log.every_steps": 1, "log.tensorboard": "false", "checkpoint.every_steps": 0,
    }  # fmt: skip


@pytest.fixture(scope="session")
def text_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two files in CausalQA's format, with 120 and 40 rows; target lengths vary widely."""
    import csv

    from plainloop.data.demo import write_text_demo

    paths = write_text_demo(tmp_path_factory.mktemp("causalqa"), rows=120, dev_rows=40)
    for path in paths:
        with open(path, newline="") as stream:
            header, *rows = csv.reader(stream)
        for number, row in enumerate(rows):
            row[5] = row[6] = " ".join([row[5]] * (20 if number % 5 == 0 else 1))
        with open(path, "w", newline="") as stream:
            csv.writer(stream).writerows([header, *rows])
    return paths


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory, text_files: tuple[Path, Path]) -> Path:
    """A T5 with 2 + 2 layers and random weights: 60,000 parameters."""
    return tiny_t5_for(tmp_path_factory.mktemp("tiny-t5"), text_files[0])


@pytest.fixture
def text_options(tiny_t5: Path, text_files: tuple[Path, Path], tmp_path: Path) -> dict[str, Any]:
    """Options of a text run: 2 epochs of 15 steps. Dotted names; tests override them."""
    return {
        "task": "text", "run_dir": str(tmp_path / "run"), "batch_size": 8, "epochs": 2,
        "tokens_per_device": 200, "model.path": str(tiny_t5), "data.train": str(text_files[0]),
        "data.bucket": 3, "precision": "fp32",
        "data.cache_dir": str(tmp_path / "cache"), "optim.lr": 1e-2, "text.max_new_tokens": 8,
        "log.every_steps": 1, "log.tensorboard": "false", "checkpoint.every_steps": 0,
    }  # fmt: skip


@pytest.fixture(scope="session")
def installed_wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, folder it is installed into, for PYTHONPATH). Built from a copy of the tracked files to keep
    the working tree clean.
    """
    root, folder = Path(__file__).parents[1], tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (root / name).is_file() and not name.startswith(".pkg"):
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((root / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "-w", folder / "dist", folder / "source"]
    subprocess.run(build, check=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    target = folder / "installed"
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", target, wheel], check=True)
    return wheel, target


Launch = Callable[..., "subprocess.CompletedProcess[str]"]


def as_arguments(options: dict[str, Any]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Run plainloop in a subprocess: launch(2, "train", options) uses torchrun's agent with two forked ranks
    (helpers/forking_torchrun.py), launch(0, ...) a single process without torchrun.
    """

    def run(
        processes: int, command: str, options: dict[str, Any], *, expect: int | None = 0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        forking = str(Path(__file__).parent / "helpers/forking_torchrun.py")
        start = [forking, str(processes), "0"] if processes else ["-m", "plainloop.trainer"]
        line = [sys.executable, *start, command]
        result = subprocess.run(
            [*line, *as_arguments(options)], cwd=tmp_path, capture_output=True, text=True, timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip
        if expect is not None:
            assert result.returncode == expect, result.stderr[-3000:]
        return result

    return run


@pytest.fixture
def train(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Run `plainloop train` in this process: train(**{"seed": 1}) overrides `options` (or `text_options`, if
    the test uses that fixture). Returns the Verdict.
    """
    text = "text_options" in request.fixturenames
    options = request.getfixturevalue("text_options" if text else "options")

    def run(**changes: Any) -> Any:
        from plainloop.trainer.config.options import TrainConfig
        from plainloop.trainer.config.parse import parse
        from plainloop.trainer.run import train as run_train

        return run_train(parse(TrainConfig, as_arguments(options | changes), program="test")).verdict

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An 8 MB file system."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def read_metrics(run_dir: str | Path, kind: str) -> list[dict[str, Any]]:
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture
def metrics() -> Callable[[str | Path, str], list[dict[str, Any]]]:
    return read_metrics


@pytest.fixture
def tensors() -> Callable[[str | Path, int], dict[str, Any]]:
    """All tensors of a checkpoint: weights and optimizer state, of a sharded one by file."""

    def read(run_dir: str | Path, step: int) -> dict[str, Any]:
        from safetensors.torch import load_file

        folder = Path(run_dir) / "checkpoints" / f"step-{step:08d}"
        if shards := sorted(folder.glob("shard-*")):
            return {f"{file.name} {name}": t for file in shards for name, t in load_file(file).items()}
        return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")

    return read


@pytest.fixture
def assert_same_bits() -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def check(left: dict[str, Any], right: dict[str, Any]) -> None:
        import torch

        assert left.keys() == right.keys() and len(left) > 10
        different = [name for name in left if not torch.equal(left[name], right[name])]
        assert not different, f"{len(different)} tensors differ, first {different[0]}"

    return check

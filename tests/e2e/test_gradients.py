"""The same global batch gives the same gradient for any split into micro-batches and ranks."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parents[1] / "helpers/gradient_worker.py"


def gradients(
    folder: Path, processes: int, batch_size: int, tokens: int, task: str, *paths: Path, more: str = ""
) -> dict[str, torch.Tensor]:
    """more: "SHARD_SIZE [recompute]" for FSDP."""
    out = folder / f"{processes}-{batch_size}-{tokens}.safetensors"
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    line = [
        sys.executable,
        *(torchrun if processes > 1 else []),
        str(WORKER),
        str(out),
        str(batch_size),
        str(tokens),
    ]
    result = subprocess.run(
        [*line, task, *map(str, paths), str(folder / "cache"), *more.split()],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    if tokens == 100:
        assert "micro_batches=1\n" not in result.stdout
    elif processes == 1:
        assert "micro_batches=1\n" in result.stdout
    return load_file(out)


def relative_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of the gradient, all parameters together.

    Per parameter it would divide by zero: the gradients of the head's bias and of the key biases are zero up
    to rounding, since softmax is invariant to these biases.
    """
    assert left.keys() == right.keys() and len(left) > 20
    difference = sum(float((left[name] - right[name]).double().square().sum()) for name in left)
    return (difference / sum(float(right[name].double().square().sum()) for name in right)) ** 0.5


@pytest.mark.parametrize("task", ["span", pytest.param("text", marks=pytest.mark.slow)])
def test_gradients_do_not_depend_on_micro_batches_or_ranks(
    tmp_path: Path,
    task: str,
    tiny_model: Path,
    squad_file: Path,
    tiny_t5: Path,
    text_files: tuple[Path, Path],
) -> None:
    paths = (tiny_model, squad_file) if task == "span" else (tiny_t5, text_files[0])
    whole = gradients(tmp_path, 1, 16, 100_000, task, *paths)
    for processes, tokens in ((1, 100), (2, 100_000), (2, 100)):
        difference = relative_difference(gradients(tmp_path, processes, 16, tokens, task, *paths), whole)
        print(f"{task}, {processes} process(es), {tokens} tokens: {difference:.1e}")
        assert difference < 1e-6
    few = gradients(tmp_path, 1, 2, 100_000, task, *paths)
    difference = relative_difference(gradients(tmp_path, 3, 2, 100_000, task, *paths), few)
    print(f"{task}, 3 processes, one without rows: {difference:.1e}")
    assert difference < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("task", ["span", "text"])
def test_gradients_of_sharded_models(
    tmp_path: Path,
    task: str,
    tiny_model: Path,
    squad_file: Path,
    tiny_t5: Path,
    text_files: tuple[Path, Path],
) -> None:
    """FSDP on 2 and 4 ranks, hybrid on 2 x 2, with micro-batches, with recomputed activations; 3 ranks of
    which one has no rows.
    """
    paths = (tiny_model, squad_file) if task == "span" else (tiny_t5, text_files[0])
    whole = gradients(tmp_path, 1, 16, 100_000, task, *paths)
    for ranks, more in ((2, "2"), (4, "4"), (4, "2"), (2, "2 recompute"), (4, "2 recompute")):
        found = gradients(tmp_path, ranks, 16, 100, task, *paths, more=more)
        difference = relative_difference(found, whole)
        print(f"{task}, {ranks} processes, shard size {more}: {difference:.1e}")
        assert difference < 1e-6
    few = gradients(tmp_path, 1, 2, 100_000, task, *paths)
    difference = relative_difference(gradients(tmp_path, 3, 2, 100_000, task, *paths, more="3"), few)
    print(f"{task}, 3 sharded processes, one without rows: {difference:.1e}")
    assert difference < 1e-6

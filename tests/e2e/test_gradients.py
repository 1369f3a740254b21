"""The same global batch gives the same gradient for any split into micro-batches and ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FEW = 100  # tokens, so that a rank has several micro-batches
WORKER = Path(__file__).parents[1] / "helpers/gradient_worker.py"


Gradients = dict[str, torch.Tensor]


def gradients(
    folder: Path, processes: int, cases: list[dict[str, int]], task: str, *paths: Path
) -> list[Gradients]:
    """Of one optimizer step each. A case: batch_size, tokens, and for FSDP shard_size, recompute."""
    files = [folder / f"{processes}-{number}.safetensors" for number in range(len(cases))]
    given = [{**case, "out": str(file)} for case, file in zip(cases, files, strict=True)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    line = [sys.executable, *(torchrun if processes > 1 else []), str(WORKER), json.dumps(given), task]
    result = subprocess.run(
        [*line, *map(str, paths), str(folder / "cache")], capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for case, file in zip(cases, files, strict=True):
        one_micro_batch = f"{file}: micro_batches=1\n" in result.stdout
        assert not (one_micro_batch and case["tokens"] == FEW), result.stdout
        assert one_micro_batch or case["tokens"] == FEW or processes > 1, result.stdout
    return [load_file(file) for file in files]


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
    batch, two_rows = {"batch_size": 16, "tokens": 100_000}, {"batch_size": 2, "tokens": 100_000}
    split = {"batch_size": 16, "tokens": FEW}
    whole, one_split, few = gradients(tmp_path, 1, [batch, split, two_rows], task, *paths)
    two, two_split = gradients(tmp_path, 2, [batch, split], task, *paths)
    for name, found in {"1, split": one_split, "2": two, "2, split": two_split}.items():
        difference = relative_difference(found, whole)
        print(f"{task}, ranks {name}: {difference:.1e}")
        assert difference < 1e-6
    difference = relative_difference(gradients(tmp_path, 3, [two_rows], task, *paths)[0], few)
    print(f"{task}, 3 ranks, one without rows: {difference:.1e}")
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
    two_rows = {"batch_size": 2, "tokens": 100_000}
    whole, few = gradients(tmp_path, 1, [{"batch_size": 16, "tokens": 100_000}, two_rows], task, *paths)
    layouts = {2: [(2, 0), (2, 1)], 4: [(4, 0), (2, 0), (2, 1)]}
    for ranks, given in layouts.items():
        cases = [{"batch_size": 16, "tokens": FEW, "shard_size": n, "recompute": again} for n, again in given]
        for (size, again), found in zip(given, gradients(tmp_path, ranks, cases, task, *paths), strict=True):
            difference = relative_difference(found, whole)
            print(f"{task}, {ranks} ranks, shard size {size}, recomputed {again}: {difference:.1e}")
            assert difference < 1e-6
    found = gradients(tmp_path, 3, [two_rows | {"shard_size": 3}], task, *paths)[0]
    difference = relative_difference(found, few)
    print(f"{task}, 3 sharded ranks, one without rows: {difference:.1e}")
    assert difference < 1e-6

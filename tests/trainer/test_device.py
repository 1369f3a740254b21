"""Device checks before training, and handling of out-of-memory errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plainloop.data.errors import InputError
from plainloop.trainer.distributed.device import require_kernels, require_own_gpus, set_up_device
from plainloop.trainer.distributed.world import World, world_from_env
from plainloop.trainer.errors import explain, is_out_of_memory
from plainloop.trainer.tasks.evaluation import halved

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_gpus_supported_by_the_installed_torch(capability: tuple[int, int]) -> None:
    require_kernels(capability, CUDA_13, "GPU")
    require_kernels((13, 0), [*CUDA_13, "compute_120"], "GPU")
    require_kernels((9, 0), ["sm_90a"], "GPU")


@pytest.mark.parametrize("capability", [(7, 0), (6, 0), (11, 0)])
def test_unsupported_gpu_is_rejected_with_a_remedy(capability: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="V100 is sm_.*has code for sm_75.*an older CUDA"):
        require_kernels(capability, CUDA_13, "V100")


def test_two_ranks_on_one_gpu_are_rejected() -> None:
    require_own_gpus([3, 1, 2])
    with pytest.raises(InputError, match="ranks 0 and 2 have the same GPU"):
        require_own_gpus([3, 1, 3])


@pytest.mark.parametrize(("visible", "local_rank", "index"), [(1, 3, 0), (4, 3, 3), (1, 0, 0), (2, 3, None)])
def test_gpu_of_each_rank(
    visible: int, local_rank: int, index: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With srun --gpus-per-task=1, each rank sees only its own GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    for name, value in (("RANK", 3), ("WORLD_SIZE", 4), ("LOCAL_RANK", local_rank)):
        monkeypatch.setenv(name, str(value))
    if index is None:
        with pytest.raises(InputError, match="local rank 3, but this node has 2 GPU"):
            world_from_env("cuda")
    else:
        assert world_from_env("cuda").device == torch.device("cuda", index)


def test_deterministic_mode_is_set_and_reset() -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    set_up_device(world, tf32=True, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    set_up_device(world, tf32=True, deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_out_of_memory_is_one_line_and_exit_code_2() -> None:
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried ..."),
    ):  # fmt: skip
        message, code = explain(error)
        assert code == 2 and "out of memory: lower --tokens_per_device" in message
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    lost = RuntimeError("Pin memory thread exited unexpectedly")
    assert explain(lost)[1] == 70 and "a loader process was killed" in explain(lost)[0]


def test_a_batch_that_does_not_fit_is_halved(capsys: Any) -> None:
    done: list[list[int]] = []

    def action(rows: np.ndarray) -> None:
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.append(rows.tolist())

    halved(action, np.arange(10))
    assert done == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]
    assert "an evaluation batch of 10 rows does not fit into memory" in capsys.readouterr().err

    def never(rows: np.ndarray) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        halved(never, np.arange(4))
    with pytest.raises(KeyError):
        halved(lambda rows: {}[0], np.arange(4))  # only out-of-memory errors are retried


@pytest.mark.parametrize("task", ["span", "text"])
def test_evaluation_with_too_little_memory_gives_the_same_metrics(
    task: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    """The model runs out of memory on more than 5 rows, like a full GPU."""
    from plainloop.models.seq2seq import Seq2SeqModel
    from plainloop.models.spans import SpanModel
    from plainloop.trainer.config.trained_options import ScoreConfig
    from plainloop.trainer.trained.evaluate import score

    options = request.getfixturevalue("options" if task == "span" else "text_options")
    dev = options["data.train"]
    if task == "span":
        from plainloop.trainer.config.options import TrainConfig
        from plainloop.trainer.config.parse import parse
        from plainloop.trainer.run import train

        lines = [f"--{name}={value}" for name, value in options.items()]
        train(parse(TrainConfig, [*lines, "--max_steps", "3"], program="test"))
        model = options["run_dir"]
    else:
        model = options["model.path"]
    config = {"model": str(model), "data": dev, "precision": "fp32", "cache_dir": str(tmp_path / "scores")}
    before = score(ScoreConfig(**config))
    kind: Any = SpanModel if task == "span" else Seq2SeqModel
    forward = kind.forward

    def small(self: Any, *arguments: Any, **inputs: Any) -> Any:
        rows = inputs["input_ids"] if inputs else arguments[0]
        if len(rows) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *arguments, **inputs)

    monkeypatch.setattr(kind, "forward", small)
    after = score(ScoreConfig(**config))
    assert before == pytest.approx(after, rel=1e-5) and "does not fit into memory" in capsys.readouterr().err

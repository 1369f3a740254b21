"""The host copy for asynchronous saves; saving with a full disk or a planted symlink."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from plainloop.trainer import loop
from plainloop.trainer.checkpoint.host_copy import HostCopy
from plainloop.trainer.errors import RunError
from plainloop.trainer.run_folder.log import Log


def check_host_copy(device: str) -> None:
    weight = torch.arange(6.0, device=device).reshape(2, 3)
    copy = HostCopy()
    first = copy({"a": weight, "tied": weight, "empty": torch.zeros(0, device=device)})
    assert first["a"] is first["tied"] and first["a"].device.type == "cpu"
    weight += 1
    assert first["a"].tolist() == [[0, 1, 2], [3, 4, 5]]  # the writer's copy does not change
    second = copy({"a": weight, "tied": weight, "empty": torch.zeros(0, device=device)})
    assert second["a"].data_ptr() == first["a"].data_ptr() and second["a"].tolist() == weight.tolist()


def test_host_copy_is_a_snapshot_keeps_ties_and_reuses_its_memory() -> None:
    check_host_copy("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_host_copy_from_a_gpu() -> None:
    check_host_copy("cuda")


def test_tied_weights_are_saved_once(text_options: Any, train: Any, tensors: Any) -> None:
    """T5 shares its embedding between encoder, decoder and output."""
    train(stop_at_step=1)
    names = [name for name in tensors(text_options["run_dir"], 1) if "shared" in name or "lm_head" in name]
    assert "shared.weight" in names and not [name for name in names if "embed_tokens" in name]


def test_symlink_at_the_temporary_name_is_not_followed(
    options: Any, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/mine").touch()
    folder = Path(options["run_dir"]) / "checkpoints"

    def plant() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".tmp-step-00000002-{os.getpid()}").symlink_to(tmp_path / "victim")

    plant()
    train(stop_at_step=1)  # removed at start-up
    assert not list(folder.glob(".tmp-*"))
    step = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *a: (step(*a), plant()))  # planted during the run
    with pytest.raises(RunError, match="could not be written.*File exists"):
        train(stop_at_step=2)
    assert [path.name for path in (tmp_path / "victim").iterdir()] == ["mine"]
    assert (folder / "step-00000001").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
def test_full_disk_loses_log_lines_but_not_the_run(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Log(small_disk, enabled=True, tensorboard=True)
    log.start(0, 10, [])
    log.record("train", 1, {"loss": 1.0})
    (small_disk / "ballast").write_bytes(b"x" * shutil.disk_usage(small_disk).free)
    for step in range(2, 300):
        log.record("train", step, {f"loss_{i}": 1.0 for i in range(20)})
    log.close()
    assert "WARNING" in capsys.readouterr().err

"""Any damage to any file of a checkpoint is detected, and the previous checkpoint is used."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plainloop.data.errors import InputError
from plainloop.trainer.checkpoint import retention
from plainloop.trainer.checkpoint.folder import (
    counters,
    newest_good,
    restore,
    save_checkpoint,
    verify,
)
from plainloop.trainer.checkpoint.retention import retain
from plainloop.trainer.distributed.parallel import Parallel
from plainloop.trainer.errors import RunError
from plainloop.trainer.run_folder.files import write_atomically
from plainloop.trainer.state import TrainState


def state_at(step: int) -> TrainState:
    torch.manual_seed(step)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = TrainState(
        model, Parallel(model), optimizer, torch.amp.GradScaler("cpu", enabled=False), torch.device("cpu")
    )
    state.step = step
    return state


def save(folder: Path, step: int) -> TrainState:
    from safetensors.torch import save_file

    state = state_at(step)

    def save_model(path: Path) -> None:
        (path / "config.json").write_text("{}")
        save_file(state.model.state_dict(), path / "model.safetensors")

    more = {"loss_sum": 1.5, "fingerprint": {}, "environment": {}, "config": {"precision": "fp32"}}
    save_checkpoint(folder, save_model, state.optimizer_tensors(), counters(state) | more, size=1000)
    return state


FILES = ["config.json", "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def remove(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip_one_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [remove, truncate, flip_one_bit])
@pytest.mark.parametrize("name", FILES)
def test_damaged_newest_checkpoint_is_reported_and_the_previous_one_is_used(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    for step in (5, 12):
        save(tmp_path, step)
    damage(tmp_path / "step-00000012" / name)
    said: list[str] = []
    found = newest_good(tmp_path, said.append)
    assert found is not None and found.state["step"] == 5
    assert len(said) == 1 and "step-00000012" in said[0]
    if name != "manifest.json":
        assert name in said[0]
    assert not (tmp_path / "step-00000012").exists()


def test_all_checkpoints_damaged_is_an_error_that_lists_them(tmp_path: Path) -> None:
    for step in (5, 12):
        save(tmp_path, step)
        truncate(tmp_path / f"step-{step:08d}" / "model.safetensors")
    for _ in range(2):  # a second start must not train from scratch either
        with pytest.raises(InputError, match="(?s)step-00000012: model.safetensors has .*step-00000005"):
            newest_good(tmp_path, lambda _: None)
    assert newest_good(tmp_path / "empty", lambda _: None) is None


def test_restored_state_is_bitwise_identical(tmp_path: Path) -> None:
    saved = save(tmp_path, 7)
    found = newest_good(tmp_path, lambda _: None)
    assert found is not None
    fresh = state_at(8)
    restore(fresh, found, is_main=True)
    assert fresh.step == 7 and fresh.loss_sum.item() == 1.5
    left, right = saved.optimizer_tensors(), fresh.optimizer_tensors()
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_retention_by_step_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    os.utime(tmp_path / "step-00000001", (2**31, 2**31))  # a wrong clock must not matter
    saving = tmp_path / ".tmp-step-00000009-1"
    saving.mkdir()
    (tmp_path / ".tmp-delete-step-00000000").mkdir()  # a kill during deletion
    retain(tmp_path, keep_last=1, best_step=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [saving.name, "step-00000002", "step-00000004"]


def test_retention_makes_room_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for step in (1, 2, 3):
        save(tmp_path, step)
    monkeypatch.setattr(retention, "write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        retain(tmp_path, keep_last=1, best_step=1, keep_optimizer=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_the_best_without_its_optimizer_is_good_but_not_resumed_from(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    retain(tmp_path, keep_last=2, best_step=4, keep_optimizer=False)
    assert len(list(tmp_path.glob("*/optimizer.safetensors"))) == 2  # those that are kept to resume from
    save(tmp_path, 5)
    retain(tmp_path, keep_last=1, best_step=3, keep_optimizer=False)
    best, newest = tmp_path / "step-00000003", tmp_path / "step-00000005"
    assert sorted(path.name for path in tmp_path.iterdir()) == [best.name, newest.name]
    assert not (best / "optimizer.safetensors").exists() and (newest / "optimizer.safetensors").exists()
    assert verify(best) is None and verify(newest) is None
    (best / "optimizer.safetensors").touch()  # killed after the manifest was written
    assert verify(best) is None
    retain(tmp_path, keep_last=1, best_step=3, keep_optimizer=False)
    assert not (best / "optimizer.safetensors").exists()
    found = newest_good(tmp_path, lambda _: None)
    assert found is not None and found.path == newest
    flip_one_bit(newest / "optimizer.safetensors")
    with pytest.raises(
        InputError, match="(?s)step-00000005: .*step-00000003: was kept without its optimizer"
    ):
        newest_good(tmp_path, lambda _: None)
    assert best.exists() and newest.exists()
    flip_one_bit(best / "model.safetensors")
    assert "model.safetensors has a different SHA-256" in str(verify(best))


def test_interrupted_save_leaves_no_files(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def fail(_: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, fail, {}, {"step": 2}, size=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_permissions_follow_the_umask_and_no_file_is_a_pickle(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for file in (tmp_path / "step-00000001").iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()
        assert file.suffix in (".json", ".safetensors")


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_full_disk_ends_the_run_with_one_line_and_keeps_the_old_checkpoint(
    small_disk: Path, options: dict[str, Any], train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from plainloop.trainer.loop import Verdict

    small = {"run_dir": small_disk / "run", "max_steps": 6}
    assert train(**small, stop_at_step=2) == Verdict.STOPPED
    (small_disk / "ballast").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 300_000))
    with pytest.raises(RunError, match="(?s)could not be written.*(No space left|MB free)"):
        train(**small)
    assert "checkpoint NOT saved" in capsys.readouterr().err
    checkpoints = small_disk / "run/checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000002"]
    assert verify(checkpoints / "step-00000002") is None
    (small_disk / "ballast").unlink()
    assert train(**small) == Verdict.COMPLETED


def test_small_files_are_replaced_atomically(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.json", "1")
    write_atomically(tmp_path / "a.json", json.dumps({"b": 2}))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_files_are_synced_before_the_rename_that_publishes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power cut could leave a complete-looking checkpoint with empty files."""
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def noting_fsync(descriptor: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noting_rename(source: Path, target: Path) -> None:
        events.append(("rename", str(source)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    save(tmp_path, 3)
    (published,) = [i for i, (what, _) in enumerate(events) if what == "rename"]
    temporary = events[published][1]
    written = [f"{temporary}/{name}" for name in FILES]
    before = [path for _, path in events[:published]]
    assert set(before) == {*written, temporary}
    assert before[-1] == temporary  # its entries, when all files are on the disk
    assert events[published + 1 :] == [("sync", str(tmp_path))]  # the new name

"""Ownership of a run folder; planted symlinks and foreign checkpoints do no harm."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from plainloop.data.errors import InputError
from plainloop.trainer.checkpoint.folder import newest_good, verify
from plainloop.trainer.distributed.watchdog import blame
from plainloop.trainer.distributed.world import process_group, world_from_env
from plainloop.trainer.errors import RunError
from plainloop.trainer.hooks import odd_ones
from plainloop.trainer.run_folder import lock as locks
from plainloop.trainer.run_folder.files import write_atomically
from plainloop.trainer.run_folder.lock import Lock
from plainloop.trainer.run_folder.status import hold, read_status


def holder(**changes: Any) -> str:
    return json.dumps(
        {"token": "t", "host": "node7", "machine": "another", "pid": 1, "job": "4711"} | changes
    )


def test_lock_is_released_and_status_records_the_outcome(tmp_path: Path) -> None:
    with hold(tmp_path / "run", 0, print) as folder:
        assert read_status(folder.path)["status"] == "running"
        assert (folder.path / "lock").exists()
        folder.ended("completed", step=7)
    assert read_status(tmp_path / "run")["step"] == 7
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["status.json"]


def test_first_failure_is_recorded_with_its_reason_and_rank(tmp_path: Path) -> None:
    with pytest.raises(RunError), hold(tmp_path, 0, print) as folder:
        folder.rank = 1
        folder.failed("rank 1: its own reason", 70)
        raise RunError("lost another rank")
    assert read_status(tmp_path)["reason"] == "rank 1: its own reason" and read_status(tmp_path)["rank"] == 1


def test_lock_holder_on_another_machine_is_alive_while_its_timestamp_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PATIENCE_S", 1.5)
    path, ended = tmp_path / "lock", threading.Event()
    path.write_text(holder())

    def beat() -> None:
        while not ended.wait(0.3):
            os.utime(path, (1, time.time()))  # a wrong clock does not matter, only that it changes

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(InputError, match=r"host node7, process 1, job 4711"):
        Lock(path).acquire(print)
    ended.set()
    thread.join()
    said: list[str] = []
    lock = Lock(path)
    lock.acquire(said.append)
    assert "node7" in said[0]
    lock.check()
    path.write_text(holder(token="other"))
    with pytest.raises(RunError, match="now belongs to host node7"):
        lock.check()
    lock.release()
    assert json.loads(path.read_text())["token"] == "other"


def test_stale_lock_of_this_machine_is_taken_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "from plainloop.trainer.run_folder.lock import Lock; from pathlib import Path; import os, sys;"
        "Lock(Path(sys.argv[1])).acquire(print); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "lock")])
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    Lock(tmp_path / "lock").acquire(print)
    assert not waits
    (tmp_path / "empty").touch()  # killed between creating and writing it
    Lock(tmp_path / "empty").acquire(print)


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "status.json", "lock"])
def test_symlinks_in_a_run_folder_are_rejected(tmp_path: Path, name: str) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "victim")
    with pytest.raises(InputError, match=f"{name} is a symbolic link"), hold(tmp_path / "run", 0, print):
        pass
    assert not list((tmp_path / "victim").iterdir())


def test_symlink_at_a_temporary_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / f".tmp-status.json-{os.getpid()}").symlink_to(tmp_path / "victim")
    write_atomically(tmp_path / "status.json", "new")
    assert (tmp_path / "victim").read_text() == "mine" and not (tmp_path / "status.json").is_symlink()


def test_planted_checkpoints_are_rejected(options: Any, train: Any, tmp_path: Path) -> None:
    """A symlink, another user's folder, and a pickle in place of each file, with a matching manifest."""
    import hashlib
    import pickle
    import shutil

    train(stop_at_step=1)
    good = Path(options["run_dir"]) / "checkpoints/step-00000001"
    assert verify(good) is None
    marker = tmp_path / "marker"

    class Payload:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {marker}",)

    folder = tmp_path / "planted"
    for number, file in enumerate(sorted(good.iterdir()), 2):
        copy = folder / f"step-{number:08d}"
        shutil.copytree(good, copy)
        (copy / file.name).write_bytes(pickle.dumps(Payload()))
        if file.name != "manifest.json":
            manifest = json.loads((copy / "manifest.json").read_text())
            content = (copy / file.name).read_bytes()
            manifest[file.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            (copy / "manifest.json").write_text(json.dumps(manifest))
        if file.suffix == ".safetensors" or file.name in ("state.json", "manifest.json"):
            assert verify(copy), file.name
            shutil.rmtree(copy)
        else:  # config and tokenizer: only transformers reads them, as JSON
            with pytest.raises(InputError):
                train(run_dir=tmp_path / "run2", **{"model.path": copy})
            shutil.rmtree(copy)
    (folder / "step-00000090").symlink_to(good)
    shutil.copytree(good, folder / "step-00000091")
    if os.getuid() == 0:
        os.chown(folder / "step-00000091", 12345, 12345)
        assert "belongs to user 12345" in str(verify(folder / "step-00000091"))
        with pytest.raises(InputError, match="(?s)belongs to user.*is a symbolic link"):
            newest_good(folder, print)
    assert verify(good) is None and not marker.exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "half set"),
        ({"GLOO_SOCKET_IFNAME": "ib7"}, "no such interface, only"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR or MASTER_PORT is not set"),
    ],
)
def test_invalid_distributed_environment_is_rejected(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message), process_group(world_from_env("cpu"), timeout_s=5):
        pass


def test_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        taken = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in taken.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match=f"port {port} is taken.*set MASTER_PORT"):
            with process_group(world_from_env("cpu"), timeout_s=5):
                pass


def test_blame() -> None:
    def place(beats: int, step: int, order: float, doing: str) -> dict[str, Any]:
        return {"beats": beats, "step": step, "order": order, "doing": doing, "host": "n", "pid": 5}

    now = [
        place(9, 7, 2.0, "micro-batch 1 of 1"),
        place(9, 7, 0.4, "Evaluate"),
        place(9, 7, 2.0, "micro-batch 1 of 1"),
    ]
    before = [p | {"beats": 5} for p in now]
    assert "rank 1 (host n, process 5) at step 7, Evaluate; blocking rank 0" in blame(before, now, 60)
    before[2] = now[2]
    assert "no heartbeat from rank 2" in blame(before, now, 60)
    assert "rank 1 (never reported)" in blame([now[0], None], [place(10, 7, 2.0, "x"), None], 60)


def test_odd_ones() -> None:
    assert odd_ones([5, 5, 6], range(3)) == "outside the majority: 2"
    assert odd_ones([6, 5, 6, 6, 7], range(5)) == "outside the majority: 1, 4"
    assert odd_ones([5, 6], [0, 1]) == "no majority"

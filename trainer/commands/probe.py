"""Probes of `plainloop doctor`: versions, file system, job, and communication between two ranks."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from plainloop.data.processes import exit_rank
from plainloop.trainer.distributed.world import World, process_group, sum_over_ranks
from plainloop.trainer.errors import InputError
from plainloop.trainer.run_folder.files import no_follow


def try_file_system(folder: Path) -> float:
    """Try in `folder` what a run folder needs; return the speed of a write with fsync, in bytes per second.

    Raises OSError, or InputError that says what does not work.
    """
    block = os.urandom(1 << 20) * 32
    started = time.perf_counter()
    with open(folder / "written", "xb", opener=no_follow) as stream:
        stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    speed = len(block) / (time.perf_counter() - started)
    (folder / "a").mkdir()
    os.rename(folder / "written", folder / "a/written")
    os.rename(folder / "a", folder / "b")
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    (folder / "link").symlink_to("b")
    os.replace(folder / "link", folder / "best")
    (folder / "lock").touch(exist_ok=False)
    before = (folder / "lock").stat().st_mtime_ns
    try:
        (folder / "lock").touch(exist_ok=False)
    except FileExistsError:
        pass
    else:
        raise InputError("exclusive file creation does not work: two runs could write here at once")
    os.utime(folder / "lock", ns=(before + 10**9, before + 10**9))
    moved = (folder / "best/written").stat().st_size == len(block)
    if not moved or (folder / "lock").stat().st_mtime_ns == before:
        raise InputError("renames or timestamps do not work")
    return speed


class TwoRanks:
    """Two processes that all-reduce 4 MB over the interface training would use. They start immediately."""

    def __init__(self, device: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")},
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "plainloop.trainer.commands.probe", device],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip

    def wait(self, timeout_s: float) -> None:
        for rank in self.ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.wait(timeout_s)

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()

    def seconds(self, timeout_s: float) -> float:
        """Return the time of the all-reduce alone. Raises InputError with a rank's error message."""
        until = time.monotonic() + timeout_s
        try:
            output = [rank.communicate(timeout=max(1, until - time.monotonic())) for rank in self.ranks]
        except subprocess.TimeoutExpired:
            raise InputError(f"two ranks could not connect within {timeout_s:.0f} s") from None
        finally:
            self.close()
        for rank, (_, errors) in zip(self.ranks, output, strict=True):
            if rank.returncode:
                raise InputError((errors.strip().splitlines() or [f"exit code {rank.returncode}"])[-1][:300])
        return float(json.loads(output[0][0].splitlines()[-1])["seconds"])


def rendezvous() -> str:
    """Return the rendezvous host, chosen as in the batch scripts."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    head = os.environ.get("MASTER_ADDR") or socket.gethostname()
    if nodes and "MASTER_ADDR" not in os.environ and shutil.which("scontrol"):
        output = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
        head = (output.stdout.split() or [head])[0]
    return head


def set_job_end() -> None:
    """Set SLURM_JOB_END_TIME from squeue if it is unset: Slurm before 23.11 does not set it."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job or "SLURM_JOB_END_TIME" in os.environ or not shutil.which("squeue"):
        return
    output = subprocess.run(["squeue", "-h", f"--jobs={job}", "--format=%e"], capture_output=True, text=True)
    with contextlib.suppress(ValueError):  # no limit: "NONE"
        end = datetime.datetime.fromisoformat(output.stdout.strip())
        os.environ["SLURM_JOB_END_TIME"] = str(int(end.timestamp()))


def versions() -> str:
    """Compare the installed packages with the requirements."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in importlib.metadata.requires("plainloop") or []]
    except importlib.metadata.PackageNotFoundError:
        raise InputError("plainloop is not installed here: pip install -e . in its folder.") from None
    faults = []
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = "none"
        if version == "none" or not requirement.specifier.contains(version, prereleases=True):
            faults.append(f"{requirement.name} {version}, wanted {requirement.specifier}")
    if faults:
        raise InputError(f"{'; '.join(faults)}: pip install -e . in the package's folder.")
    shown = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    return f"Python {platform.python_version()}, {shown}, and all other requirements"


def nearest_existing(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    return path if path.exists() else nearest_existing(path.parent)


def _rank(device: str) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    world = World(rank, size, rank, torch.device("cuda", rank) if device == "cuda" else torch.device("cpu"))
    if device == "cuda":
        torch.cuda.set_device(rank)
    with process_group(world, timeout_s=40):
        tensor = torch.ones(1 << 20, device=world.device)
        sum_over_ranks(tensor)
        started = time.perf_counter()
        total = sum_over_ranks(tensor).sum().item()
        seconds = time.perf_counter() - started
    if total != 4 << 20:
        raise SystemExit(f"the sum over two ranks is {total}, not {4 << 20}")
    print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    _rank(sys.argv[1])
    exit_rank()

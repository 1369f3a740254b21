"""What `plainloop doctor` measures: a pass of the model, the disk, and two ranks that find each other."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from plainloop.data.types import InputError, MicroBatch
from plainloop.trainer.checkpoint import no_follow
from plainloop.trainer.config import TrainConfig
from plainloop.trainer.distributed import World, process_group, sum_over_ranks
from plainloop.trainer.errors import is_out_of_memory
from plainloop.trainer.loop import StepOptions, add_gradients, clear_gradients
from plainloop.trainer.optim import make_optimizer
from plainloop.trainer.precision import make_scaler
from plainloop.trainer.state import TrainState
from plainloop.trainer.tasks import Task

RESERVE = 1 << 30  # bytes: of a CUDA context, or of Python and its libraries
BACKWARD = 1.25  # activations' gradients and workspaces on top of what forward keeps


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass, measured: padded tokens in it, seconds, bytes that forward keeps for
    backward (activations, and casts of the weights to 16 bits), and how many parameters there are.
    """

    tokens: int
    seconds: float
    activations: int
    casts: int
    parameters: int

    def memory(self, tokens: int, optimizer: str) -> int:
        """Bytes of a rank with micro-batches of so many padded tokens: weights and gradients in fp32, AdamW's
        two moments, what forward keeps for backward (measured), and a reserve.
        """
        state = 8 if optimizer == "adafactor" else 16
        activations = BACKWARD * self.activations / self.tokens * tokens
        return int(state * self.parameters + self.casts + activations) + RESERVE

    def fitting(self, memory: int, optimizer: str) -> int:
        """The largest tokens_per_device for this memory, in whole 256; 0 when not even that fits."""
        per_token = BACKWARD * self.activations / self.tokens
        return max(0, int((memory - self.memory(0, optimizer)) / per_token / 256)) * 256


class _Casts(TorchDispatchMode):
    """Notes the storages of what autocast makes of the weights: their size does not grow with the tokens."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.weights, self.storages = weights, set[int]()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten._to_copy.default and _storage(args[0]) in self.weights:
            self.storages.add(_storage(result))
        return result


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def measure_pass(
    model: torch.nn.Module, task: Task, micro_batch: MicroBatch, world: World, config: TrainConfig
) -> Pass:
    """Two forward and backward passes, without an optimizer step. Raises InputError if memory runs out."""
    device = world.device
    try:
        model.to(device).train()
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"not even the weights fit into memory: is another program there? ({error})"
        ) from None
    optimizer, scaler = make_optimizer(model, config.optim), make_scaler(config.precision, device)
    state = TrainState(model, model, optimizer, scaler, device)
    options = StepOptions(task.loss_sum, lambda _: 0.0, world, config.seed, config.precision, 0.0)
    weights = {_storage(p) for p in model.parameters()}
    kept: dict[int, int] = {}  # bytes of each storage: a tensor may be kept for several operations

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in weights:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself would be a circle, left in memory by an error in forward

    with saved_tensors_hooks(note, lambda tensor: tensor), _Casts(weights) as casts:
        _pass(state, micro_batch, options)
    _wait(device)
    started = time.perf_counter()
    _pass(state, micro_batch, options)
    _wait(device)
    seconds = time.perf_counter() - started
    tokens = sum(t.numel() for name, t in micro_batch[0].items() if name.endswith("input_ids"))
    cast = sum(size for storage, size in kept.items() if storage in casts.storages)
    parameters = sum(p.numel() for p in model.parameters())
    return Pass(tokens, seconds, sum(kept.values()) - cast, cast, parameters)


def _pass(state: TrainState, micro_batch: MicroBatch, options: StepOptions) -> None:
    try:
        add_gradients(state, micro_batch, 1.0, options)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise InputError(f"the largest micro-batch does not fit into memory: {error}") from None
        raise
    clear_gradients(state)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_of(world: World) -> tuple[int, str]:
    """Bytes that a rank may have, and where that is known from."""
    if world.device.type == "cuda":
        found = torch.cuda.get_device_properties(world.device)
        return found.total_memory, found.name
    node, cpu, cpus = (
        int(value) if (value := os.environ.get(f"SLURM_{name}", "")).isdigit() else 0
        for name in ("MEM_PER_NODE", "MEM_PER_CPU", "CPUS_ON_NODE")
    )
    if given := node or cpu * cpus:
        return given << 20, "the job has on a node, for all its ranks"
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) << 10, "this machine has free"


def try_file_system(folder: Path) -> float:
    """What a run folder must be able to do, tried in `folder`; bytes per second of a synced write.

    Raises OSError, or InputError with what does not work.
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
        raise InputError("an exclusive file was made twice: two runs could write here at once")
    os.utime(folder / "lock", ns=(before + 10**9, before + 10**9))
    moved = (folder / "best/written").stat().st_size == len(block)
    if not moved or (folder / "lock").stat().st_mtime_ns == before:
        raise InputError("renaming or time stamps do not work")
    return speed


class TwoRanks:
    """Two processes that sum 4 MB over the interface that training would use. They start at once."""

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
                [sys.executable, "-m", "plainloop.trainer.probe", device],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()

    def seconds(self, timeout_s: float) -> float:
        """Of the sum alone. Raises InputError with what a rank says."""
        until = time.monotonic() + timeout_s
        try:
            told = [rank.communicate(timeout=max(1, until - time.monotonic())) for rank in self.ranks]
        except subprocess.TimeoutExpired:
            raise InputError(f"two ranks did not find each other within {timeout_s:.0f} s") from None
        finally:
            self.close()
        for rank, (_, errors) in zip(self.ranks, told, strict=True):
            if rank.returncode:
                raise InputError((errors.strip().splitlines() or [f"exit code {rank.returncode}"])[-1][:300])
        return float(json.loads(told[0][0].splitlines()[-1])["seconds"])


def rendezvous() -> str:
    """The host that ranks meet at, as the batch scripts choose it."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    head = os.environ.get("MASTER_ADDR") or socket.gethostname()
    if nodes and "MASTER_ADDR" not in os.environ and shutil.which("scontrol"):
        told = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
        head = (told.stdout.split() or [head])[0]
    return head


def job_end() -> None:
    """Before 23.11 Slurm does not tell a job's end: ask for it, and set SLURM_JOB_END_TIME."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job or "SLURM_JOB_END_TIME" in os.environ or not shutil.which("squeue"):
        return
    told = subprocess.run(["squeue", "-h", f"--jobs={job}", "--format=%e"], capture_output=True, text=True)
    with contextlib.suppress(ValueError):  # no limit: "NONE"
        end = datetime.datetime.fromisoformat(told.stdout.strip())
        os.environ["SLURM_JOB_END_TIME"] = str(int(end.timestamp()))


def versions() -> str:
    """What the package asks for and what is there."""
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
    return f"Python {platform.python_version()}, {shown}, and what else it asks for"


def existing(path: Path) -> Path:
    """It, or the nearest folder above that is there."""
    return path if path.exists() else existing(path.parent)


def parameters_of(config: Any) -> int:
    """Of a transformers config, without its weights: the network is built on the meta device."""
    from transformers import AutoModel

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModel.from_config(config).parameters())


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
    os._exit(0)  # see cli.main_of_process

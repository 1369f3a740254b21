"""World (rank and size), the process group, and collectives, which are no-ops in a single process."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from plainloop.trainer.errors import InputError, RunError


@dataclass(frozen=True)
class World:
    """This process in the job: rank (0 ... size - 1), world size, local_rank on its node, device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world_from_env(device: str = "auto") -> World:
    """Read RANK, WORLD_SIZE, LOCAL_RANK (set by torchrun); unset: one process. Opens no process group."""
    given = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    if len({value is None for value in given.values()}) > 1:
        raise InputError(f"environment: {given} is half set; start with torchrun, or unset both.")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        check_interface(name, os.environ.get(name))
    rank, size = int(given["RANK"] or 0), int(given["WORLD_SIZE"] or 1)
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise InputError("device cuda: PyTorch sees no GPU here; use --device cpu, or check nvidia-smi.")
        count = torch.cuda.device_count()
        # A single visible GPU (srun --gpus-per-task=1) is this rank's own; require_own_gpus checks that. Make
        # no device current yet: the data is tokenised first, which forks.
        if local_rank >= count and count != 1:
            raise InputError(
                f"local rank {local_rank}, but this node has {count} GPU(s): "
                "start one process per GPU (torchrun --nproc-per-node)."
            )
        return World(rank, size, local_rank, torch.device("cuda", local_rank if local_rank < count else 0))
    return World(rank, size, local_rank, torch.device("cpu"))


def check_interface(variable: str, value: str | None) -> None:
    """Raise InputError if no network interface has that name: the ranks would hang waiting for each other."""
    names = [name for _, name in socket.if_nameindex()]
    wanted = (value or "").removeprefix("=").split(",")
    if value and not value.startswith("^") and not any(n.startswith(w) for n in names for w in wanted):
        raise InputError(f"{variable}={value}: this node has no such interface, only {', '.join(names)}.")


@contextlib.contextmanager
def process_group(world: World, *, timeout_s: float) -> Iterator[str]:
    """All ranks. Gloo for CPU tensors, NCCL for CUDA tensors. Destroyed on exit only if nothing failed.

    Yields the store prefix that this start of the group uses.
    """
    if world.size == 1:
        yield ""
        return
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    store: dist.Store = dist.PrefixStore("plainloop", connect(world, timeout_s=timeout_s, may_host=True))
    prefix = agree_on_prefix(store, world, timeout_s=timeout_s)
    store = dist.PrefixStore(prefix, store)
    dist.init_process_group(
        backend, store=store, rank=world.rank, world_size=world.size, timeout=timedelta(seconds=timeout_s)
    )
    # Freeing a group (torch 2.13) joins its threads while holding the GIL. A thread still releasing the last
    # collective's tensor needs the GIL: the rank would deadlock on exit. So the group is never freed.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
    yield prefix
    dist.barrier()
    dist.destroy_process_group()


def agree_on_prefix(store: dist.Store, world: World, *, timeout_s: float) -> str:
    """All ranks. Agree on a new store prefix for each start of the group. With --max-restarts torchrun's
    store outlives the ranks, and the addresses of dead ranks would be mistaken for those of new ones.

    Rank 0 publishes a new random ID. Every other rank answers with a random ID of its own and proceeds once
    rank 0 has echoed it: keys left by dead ranks never match. (TORCHELASTIC_RESTART_COUNT can't serve as
    the ID: only the dead rank's node increments it.)
    """
    mine, until = uuid.uuid4().hex, time.monotonic() + timeout_s
    if world.is_main:
        keys = [f"accept/{mine}/{rank}" for rank in range(1, world.size)]
        store.set("invite", mine)
        try:
            store.wait(keys, timedelta(seconds=timeout_s))
        except dist.DistStoreError:
            raise RunError(f"not all {world.size} ranks joined within {timeout_s:.0f} s.") from None
        store.set(f"go/{mine}", json.dumps([store.get(key).decode() for key in keys]))
        return mine
    while time.monotonic() < until:
        if store.check(["invite"]):
            invitation = store.get("invite").decode()
            store.set(f"accept/{invitation}/{world.rank}", mine)
            if store.check([f"go/{invitation}"]) and mine in json.loads(store.get(f"go/{invitation}")):
                return invitation
        time.sleep(0.1)
    raise RunError(f"rank 0 did not ask rank {world.rank} to join within {timeout_s:.0f} s.")


def connect(world: World, *, timeout_s: float, may_host: bool = False) -> dist.Store:
    """Open a separate connection to the store at MASTER_ADDR:MASTER_PORT, hosted by torchrun's agent or,
    without one, by rank 0.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdigit():
        raise InputError(f"environment: {world.size} processes, but MASTER_ADDR or MASTER_PORT is not set.")
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    timeout_s = min(timeout_s, 60) if hosted else timeout_s  # the agent started us, so its store is up
    try:
        return dist.TCPStore(
            address,
            int(port),
            is_master=may_host and not hosted and world.is_main,
            multi_tenant=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise InputError(f"port {port} is taken by another program; set MASTER_PORT to a free one.") from None


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """All ranks. All-reduce (sum) in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """All ranks. Gather a CPU tensor of the same shape from every rank, stacked in rank order."""
    if not dist.is_initialized():
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


def broadcast_json(value: Any) -> Any:
    """All ranks. Return rank 0's value (JSON-serializable) on every rank, so that decisions are made once."""
    if not dist.is_initialized():
        return value
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    size = torch.tensor([len(payload)])
    dist.broadcast(size, src=0)
    if dist.get_rank() != 0:
        payload = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(payload, src=0)
    return json.loads(payload.numpy().tobytes())


def gather_arrays(arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]] | None:
    """All ranks. Gather the arrays of every rank on rank 0, in rank order; None elsewhere. No pickle."""
    if not dist.is_initialized():
        return [arrays]
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    payload = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(payload)]))
    longest = int(max(sizes))
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(payload)] = payload
    if dist.get_rank() != 0:
        dist.gather(padded, dst=0)
        return None
    received = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.gather(padded, received, dst=0)
    return [
        dict(np.load(io.BytesIO(part[: int(size)].numpy().tobytes()), allow_pickle=False))
        for part, size in zip(received, sizes, strict=True)
    ]


class SharedFlag:
    """All ranks. Has any rank raised the flag? Checked at step boundaries and between evaluation batches.

    With fast steps the all-reduce is asynchronous: the hot path never waits for it, and its result is one
    boundary old. If any rank took longer than SLOW_S since its last check, all ranks wait for the result of
    this boundary, because one more slow step could use up the grace period. (For the first slow step after
    fast ones, the result is still one boundary old.) All ranks get the same answer at the same boundary,
    whichever rank was signalled and when.
    """

    SLOW_S = 0.5

    def __init__(self) -> None:
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._slow = True  # the same on all ranks
        self._asked = time.monotonic()

    def exchange(self, raised: bool) -> bool:
        if not dist.is_initialized():
            return raised
        answer = self.settle()
        now = time.monotonic()
        tensor = torch.tensor([int(raised), int(now - self._asked > self.SLOW_S)])
        self._asked = now
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._pending = (work, tensor)
        return (self._slow and self.settle()) or answer

    def settle(self) -> bool:
        """Wait for the pending all-reduce and return its result."""
        if self._pending is None:
            return False
        work, tensor = self._pending
        work.wait()
        self._pending = None
        raised, slow = tensor.tolist()
        self._slow = bool(slow)
        return bool(raised)

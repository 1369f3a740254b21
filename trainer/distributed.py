"""World (who am I), the process group, and the few collectives there are. Alone, each is a no-op."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from plainloop.data.types import InputError


@dataclass(frozen=True)
class World:
    """This process among all: rank in 0 ... size - 1, local_rank on its node."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world_from_env(device: str = "auto") -> World:
    """Read what torchrun set (RANK, WORLD_SIZE, LOCAL_RANK); without: one process. No group is opened."""
    given = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    if len({value is None for value in given.values()}) > 1:
        raise InputError(f"environment: {given} is half set; start with torchrun, or unset both.")
    rank, size = int(given["RANK"] or 0), int(given["WORLD_SIZE"] or 1)
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise InputError(
                "device cuda: PyTorch sees no GPU here; use --device cpu, or look at nvidia-smi."
            )
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"local rank {local_rank}, but this node has {torch.cuda.device_count()} GPU(s): "
                "start as many processes as GPUs (torchrun --nproc-per-node)."
            )
        torch.cuda.set_device(local_rank)
        return World(rank, size, local_rank, torch.device("cuda", local_rank))
    return World(rank, size, local_rank, torch.device("cpu"))


@contextlib.contextmanager
def process_group(world: World, *, timeout_s: float) -> Iterator[None]:
    """All ranks. CPU tensors go by gloo, CUDA tensors by NCCL. Left in order only when nothing failed."""
    if world.size == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    yield
    dist.barrier()
    dist.destroy_process_group()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """All ranks. In place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast_json(value: Any) -> Any:
    """All ranks: rank 0's value (JSON-able) for everyone, so that a decision is made once."""
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
    """All ranks: the arrays of every rank, in rank order, on rank 0; None elsewhere. No pickle."""
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
    """All ranks: has any rank raised the flag? Asked at step boundaries; the answer is one boundary old.

    The reduction runs beside the step, so the hot path never waits for it. All ranks get the same answer at
    the same boundary, whichever of them was signalled and when.
    """

    def __init__(self) -> None:
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def exchange(self, raised: bool) -> bool:
        if not dist.is_initialized():
            return raised
        answer = self.settle()
        tensor = torch.tensor([int(raised)])
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._pending = (work, tensor)
        return answer

    def settle(self) -> bool:
        """Wait for the question that is under way."""
        if self._pending is None:
            return False
        work, tensor = self._pending
        work.wait()
        self._pending = None
        return bool(tensor.item())

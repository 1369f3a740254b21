"""The device of this rank: which one, can the installed torch use it, and how it is set up for training."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
from pathlib import Path
from typing import Any

import torch

from plainloop.data.store import cache_folder
from plainloop.data.types import InputError
from plainloop.trainer.distributed import World, all_ranks
from plainloop.trainer.precision import cpu_capabilities, cpu_features


def set_up_device(world: World, *, tf32: bool, deterministic: bool) -> None:
    """All ranks, together, before anything is computed: make the device current, and choose its algorithms.

    tf32: fp32 products on a GPU in TF32. deterministic: only algorithms that give the same bits every time;
    torch raises where it has none. Raises InputError for a GPU that the ranks or the installed torch can't
    use.
    """
    # oneDNN keeps 1,024 compiled products, and each shape needs its own. Read at the first product.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    # What `deterministic` needs; torch looks once a process, and a later run in it may ask for that.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic:
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs
    torch.use_deterministic_algorithms(deterministic)
    if world.device.type != "cuda":
        return
    require_kernels(torch.cuda.get_device_capability(world.device), torch.cuda.get_arch_list(),
                    torch.cuda.get_device_name(world.device))  # fmt: skip
    torch.cuda.set_device(world.device)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    # cuDNN's attention, the first choice on H100 and B200, plans anew for each shape, 20 ms or more each; a
    # run has a hundred shapes.
    torch.backends.cuda.enable_cudnn_sdp(False)
    require_own_gpus(all_ranks(torch.tensor([_gpu_digest(world.device)])).flatten().tolist())


def require_kernels(capability: tuple[int, int], built_for: list[str], name: str) -> None:
    """Raises InputError when the installed torch has no code for a GPU of this compute capability.

    built_for: as torch.cuda.get_arch_list() tells it. Machine code (sm_86) runs on the same major version and
    an equal or higher minor one; intermediate code (compute_90) on everything newer.
    """
    major, minor = capability
    for entry in built_for:
        kind, _, digits = entry.rstrip("af").partition("_")
        built = (int(digits[:-1]), int(digits[-1]))
        if built <= capability and (kind == "compute" or built[0] == major):
            return
    raise InputError(
        f"{name} is sm_{major}{minor}; torch {torch.__version__} has code for {', '.join(built_for)} only."
        " Install a build for an older CUDA (torch's wheels for CUDA 13 leave out Volta; those for 12.6 have"
        " it), or use --device cpu."
    )


def require_own_gpus(digests: list[int]) -> None:
    """Raises InputError when two ranks have the same GPU."""
    for rank, digest in enumerate(digests):
        if (first := digests.index(digest)) != rank:
            raise InputError(
                f"ranks {first} and {rank} have the same GPU: start as many processes as there are GPUs"
                " (torchrun --nproc-per-node; srun --ntasks-per-node)."
            )


def _gpu_digest(device: torch.device) -> int:
    """A number for this GPU or slice of one, by node, its UUID, and which ones this process may see."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", device.index)
    text = f"{socket.gethostname()} {uuid} {os.environ.get('CUDA_VISIBLE_DEVICES')} {device.index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def keep_compiled_code(cache_dir: str | None, device: torch.device) -> None:
    """Have torch.compile keep its code beside the tokenised data, for the next start, on whatever node.

    Code for a CPU is of this kind of CPU alone, which torch's own keys do not tell.
    """
    name = "compiled"
    if device.type == "cpu":
        features = f"{device_name(device)} {sorted(cpu_capabilities())}"
        name += f"-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder(cache_dir) / name))


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def what_affects_rounding(world: World, *, tf32: bool, deterministic: bool) -> dict[str, Any]:
    """All ranks. Where these are the same, a step gives the same bits (on a GPU: with deterministic)."""
    import numpy
    import transformers

    gpu = world.device.type == "cuda"
    hosts = hashlib.sha256(socket.gethostname().encode()).digest()[:7]
    nodes = all_ranks(torch.tensor([int.from_bytes(hosts, "big")])).flatten().tolist()
    found: dict[str, Any] = {
        "ranks": world.size,
        "ranks_of_node": [nodes.count(node) for node in dict.fromkeys(nodes)],
        "device": device_name(world.device),
        "threads": None if gpu else torch.get_num_threads(),
        "deterministic": deterministic,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
    }
    if not gpu:
        return found | {"instructions": " ".join([torch.backends.cpu.get_cpu_capability(), *cpu_features()])}
    nccl = torch.cuda.nccl.version() if world.size > 1 else None
    return found | {
        "tf32": tf32,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, nccl)) if isinstance(nccl, tuple) else nccl,
    }


def peak_memory_gb(device: torch.device) -> float:
    """Highest use so far: of the GPU's allocator, or on the CPU of the whole process."""
    import resource

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

"""Set up this rank's device: check that the installed torch can use it and choose its algorithms."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
from pathlib import Path
from typing import Any

import torch

from plainloop.data.store import cache_folder
from plainloop.trainer.distributed.world import World, all_ranks
from plainloop.trainer.errors import InputError

FEATURES = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
# Values of ONEDNN_MAX_CPU_ISA, which limits the instruction sets of oneDNN (matmuls on a CPU).
WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
WITHOUT_AMX = {"AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"}


def set_up_device(world: World, *, tf32: bool, deterministic: bool) -> None:
    """All ranks, together, before any computation: make the device current and choose its algorithms.

    tf32: compute fp32 matmuls on a GPU in TF32. deterministic: use only algorithms that give the same bits
    every time; torch raises an error where it has none. Raises InputError if two ranks have the same GPU or
    the installed torch can't use it.
    """
    # oneDNN caches 1,024 compiled matmuls by default, one per shape. It reads this at the first matmul.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    # Required by `deterministic`. Always set: torch reads it once per process, a later run may need it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic:
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # slow
    torch.use_deterministic_algorithms(deterministic)
    if world.device.type != "cuda":
        return
    require_kernels(
        torch.cuda.get_device_capability(world.device),
        torch.cuda.get_arch_list(),
        torch.cuda.get_device_name(world.device),
    )
    torch.cuda.set_device(world.device)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    # cuDNN attention, the default on H100 and B200, builds a plan for each shape (20 ms or more each); a run
    # has a hundred shapes.
    torch.backends.cuda.enable_cudnn_sdp(False)
    require_own_gpus(all_ranks(torch.tensor([_gpu_digest(world.device)])).flatten().tolist())


def require_kernels(capability: tuple[int, int], built_for: list[str], name: str) -> None:
    """Raise InputError if the installed torch has no code for a GPU of this compute capability.

    built_for: the result of torch.cuda.get_arch_list(). Machine code (sm_86) runs on the same major version
    with an equal or higher minor version; PTX (compute_90) also on everything newer.
    """
    major, minor = capability
    for entry in built_for:
        kind, _, digits = entry.rstrip("af").partition("_")
        built = (int(digits[:-1]), int(digits[-1]))
        if built <= capability and (kind == "compute" or built[0] == major):
            return
    raise InputError(
        f"{name} is sm_{major}{minor}; torch {torch.__version__} has code for {', '.join(built_for)} only."
        " Install a build for an older CUDA (torch's CUDA 13 wheels drop Volta; the CUDA 12.6 wheels include"
        " it), or use --device cpu."
    )


def require_own_gpus(digests: list[int]) -> None:
    """Raise InputError if two ranks have the same GPU."""
    for rank, digest in enumerate(digests):
        if (first := digests.index(digest)) != rank:
            raise InputError(
                f"ranks {first} and {rank} have the same GPU: start one process per GPU"
                " (torchrun --nproc-per-node; srun --ntasks-per-node)."
            )


def _gpu_digest(device: torch.device) -> int:
    """Hash that identifies this GPU or MIG slice: node, UUID, and the devices visible to this process."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", device.index)
    text = f"{socket.gethostname()} {uuid} {os.environ.get('CUDA_VISIBLE_DEVICES')} {device.index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def require_precision(precision: str, device: torch.device) -> None:
    """Raise InputError if the device lacks support: a silent fallback would change the loss curve."""
    if (
        precision == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        name = torch.cuda.get_device_name(device)
        raise InputError(
            f"precision bf16: {name} has no bf16; use --precision fp16 or fp32 (to resume a run started in"
            ' bf16, add --checkpoint.allow_changes "[precision]").'
        )


def cpu_features() -> list[str]:
    """Which of AMX and AVX512-BF16 this CPU has and oneDNN may use. All other modules call this function."""
    limit = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()
    if limit in WITHOUT_BF16:
        return []
    found = cpu_capabilities()
    return [FEATURES[f] for f in FEATURES if f in found and not (f == "amx_bf16" and limit in WITHOUT_AMX)]


def cpu_capabilities() -> set[str]:
    """Names of this CPU's instruction sets."""
    if hasattr(torch.cpu, "get_capabilities"):
        return {name for name, there in torch.cpu.get_capabilities().items() if there is True}
    cpuinfo = Path("/proc/cpuinfo")  # torch before 2.13
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def keep_compiled_code(cache_dir: str | None, device: torch.device) -> None:
    """Keep torch.compile's cache next to the tokenised data, for later starts on any node.

    CPU code gets a folder per CPU type, because torch's own cache keys don't include that.
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
    """All ranks. If these values are equal, a step gives the same bits (on a GPU: with `deterministic`)."""
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
    """Peak memory so far: of the GPU allocator or, on a CPU, of the whole process."""
    import resource

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

"""The number format that a run computes in, autocast, loss scaling. Weights and optimizer state are fp32."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import torch

from plainloop.data.types import InputError
from plainloop.trainer.distributed import all_ranks

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Where one of these can be computed, so can those behind it.
FROM_FASTEST = ("bf16", "fp16", "fp32")
FEATURES = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
# What oneDNN, which multiplies matrices on a CPU, can be held to by an environment variable.
WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
WITHOUT_AMX = {"AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"}


def cpu_features() -> list[str]:
    """Which of AMX and AVX512-BF16 this CPU has and oneDNN may use. The rest of the package asks here."""
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


def choose_precision(device: torch.device, *, overflows_in_fp16: bool) -> tuple[str, str]:
    """The fastest format that this device computes in hardware and the model can bear; and why."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", f"{name} computes in bf16"
        if overflows_in_fp16:
            return "fp32", f"{name} has no bf16, and this model overflows in fp16"
        return "fp16", f"{name} has no bf16"
    if found := cpu_features():
        return "bf16", f"this CPU has {' and '.join(found)}"
    return "fp32", "this CPU has neither AMX nor AVX512-BF16"


def resolve_precision(
    wanted: str, device: torch.device, *, overflows_in_fp16: bool, recorded: str | None = None
) -> tuple[str, str]:
    """All ranks: one precision for all of them, and why. recorded: that of the checkpoint to continue from.

    Raises InputError where this device cannot compute in it.
    """
    choice, reason = choose_precision(device, overflows_in_fp16=overflows_in_fp16)
    ranks = all_ranks(torch.tensor([FROM_FASTEST.index(choice)]))
    common = FROM_FASTEST[int(ranks.max())]
    if common != choice:
        reason = "the ranks differ in what they can compute"
    if wanted != "auto":
        check_precision(wanted, device)
        return wanted, "as asked for"
    if recorded is not None and recorded != "auto":
        check_precision(recorded, device)
        return recorded, "as in the checkpoint"
    return common, reason


def check_precision(precision: str, device: torch.device) -> None:
    """Raises InputError where the device can't do it: a silent change would change the loss curve."""
    if (
        precision == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        name = torch.cuda.get_device_name(device)
        raise InputError(
            f"precision bf16: {name} has no bf16; use --precision fp16 or fp32 (to continue a run that was"
            ' begun in bf16: with --checkpoint.allow_changes "[precision]").'
        )


def slow_precision(precision: str, device: torch.device) -> str | None:
    """A warning, with the factor to expect, when a CPU emulates the format; None when it does not."""
    if device.type != "cpu" or precision == "fp32" or (precision == "bf16" and cpu_features()):
        return None
    factor = product_seconds(DTYPES[precision]) / product_seconds(torch.float32)
    return (
        f"WARNING: precision {precision}: this CPU does not compute in it; a matrix product takes"
        f" {factor:.0f} times as long as in fp32. Use --precision fp32."
    )


def product_seconds(dtype: torch.dtype, device: torch.device | str = "cpu", *, size: int = 512) -> float:
    """Of a product of two size x size matrices: the fastest of three."""
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        left @ right
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The forward pass's context."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """fp16 alone needs one: its smallest gradients would vanish. Disabled, it passes everything through."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def step_if_finite(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, nonfinite: torch.Tensor
) -> None:
    """optimizer.step() on unscaled gradients, except when `nonfinite` (0-dim bool on the device) is set.

    The optimizers of optim.py skip on the device, told by the attribute that GradScaler uses too: no host
    sync.
    """
    if scaler.is_enabled():
        scaler.step(optimizer)  # looks at the gradients itself, and adjusts the scale in update()
        scaler.update()
    else:
        optimizer.found_inf = nonfinite.float()  # type: ignore[attr-defined]
        optimizer.step()

"""Precision of the computation, autocast, loss scaling. Weights and optimizer state are always fp32."""

from __future__ import annotations

import contextlib
import time

import torch

from plainloop.trainer.distributed.device import cpu_features, require_precision
from plainloop.trainer.distributed.world import all_ranks

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# A device that supports one of these supports all that follow it.
FROM_FASTEST = ("bf16", "fp16", "fp32")


def choose_precision(device: torch.device, *, overflows_in_fp16: bool) -> tuple[str, str]:
    """Return the fastest precision with hardware support in which the model does not overflow, and why."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", f"{name} supports bf16"
        if overflows_in_fp16:
            return "fp32", f"{name} has no bf16, and this model overflows in fp16"
        return "fp16", f"{name} has no bf16"
    if found := cpu_features():
        return "bf16", f"this CPU has {' and '.join(found)}"
    return "fp32", "this CPU has neither AMX nor AVX512-BF16"


def resolve_precision(
    wanted: str, device: torch.device, *, overflows_in_fp16: bool, recorded: str | None = None
) -> tuple[str, str]:
    """All ranks. Return one precision for all of them, and why. recorded: precision of the checkpoint.

    Raises InputError if this device does not support it.
    """
    choice, reason = choose_precision(device, overflows_in_fp16=overflows_in_fp16)
    ranks = all_ranks(torch.tensor([FROM_FASTEST.index(choice)]))
    common = FROM_FASTEST[int(ranks.max())]
    if common != choice:
        reason = "the fastest that all ranks support"
    if wanted != "auto":
        require_precision(wanted, device)
        return wanted, "as requested"
    if recorded is not None and recorded != "auto":
        require_precision(recorded, device)
        return recorded, "as in the checkpoint"
    return common, reason


def warnings(precision: str, device: torch.device, *, overflows_in_fp16: bool) -> list[str]:
    """What to know about this precision here: a CPU that emulates it (with the measured factor), a model that
    overflows in it.
    """
    found = []
    if device.type == "cpu" and precision != "fp32" and not (precision == "bf16" and cpu_features()):
        factor = product_seconds(DTYPES[precision]) / product_seconds(torch.float32)
        found.append(
            f"WARNING: precision {precision}: this CPU only emulates it; a matrix product takes"
            f" {factor:.0f} times as long as in fp32. Use --precision fp32."
        )
    if precision == "fp16" and overflows_in_fp16:
        found.append(
            "WARNING: precision fp16: this model overflows in it; such steps are skipped and counted. Use"
            " --precision bf16 or fp32."
        )
    return found


def product_seconds(dtype: torch.dtype, device: torch.device | str = "cpu", *, size: int = 512) -> float:
    """Time a matmul of two size x size matrices: seconds, the fastest of three."""
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
    """Return the context manager for the forward pass."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Only fp16 needs loss scaling: small gradients would underflow. A disabled scaler is a no-op."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def step_if_finite(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, nonfinite: torch.Tensor
) -> None:
    """optimizer.step() on unscaled gradients, unless `nonfinite` (0-dim bool on the device) is set.

    The optimizers of optim.py skip the step on the device if `found_inf` is set, the attribute that
    GradScaler uses too: no host sync.
    """
    if scaler.is_enabled():
        scaler.step(optimizer)  # checks the gradients itself; update() adjusts the scale
        scaler.update()
    else:
        optimizer.found_inf = nonfinite.float()  # type: ignore[attr-defined]
        optimizer.step()

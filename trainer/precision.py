"""Autocast and loss scaling. Parameters and optimizer state are fp32 in every mode."""

from __future__ import annotations

import contextlib

import torch

from plainloop.data.types import InputError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str, device: torch.device) -> None:
    """Raises InputError where the device can't do it: a silent change would change the loss curve."""
    if (
        precision == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        name = torch.cuda.get_device_name(device)
        raise InputError(f"precision bf16: {name} has no bf16; use --precision fp16 or fp32.")


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The forward pass's context."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """fp16 alone needs one: its smallest gradients would vanish. Disabled, it passes everything through."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def guarded_step(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, nonfinite: torch.Tensor
) -> None:
    """optimizer.step() on unscaled gradients, except when `nonfinite` (0-dim bool on the device) is set.

    A fused optimizer skips on the device, told by the attribute that GradScaler uses too: no host sync.
    """
    if scaler.is_enabled():
        scaler.step(optimizer)  # looks at the gradients itself, and adjusts the scale in update()
        scaler.update()
    elif getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = nonfinite.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif not nonfinite.item():  # one host sync
        optimizer.step()

"""A span model as an ONNX file: written by transformers.exporters, run by onnxruntime. Extra: [onnx]."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plainloop.data.errors import InputError

ONNX_FILE = "model.onnx"
INSTALL = 'install the extra: pip install "plainloop[onnx]"'


def write_onnx(model: Any, inputs: dict[str, Tensor], folder: Path) -> None:
    """Write model.onnx and model.onnx.data for batches of any size and windows of any length, in fp32.

    model: a SpanModel on the CPU. inputs: a batch for tracing, (B, L) with B and L of 2 or more. Raises
    InputError if the network can't be exported.
    """
    try:
        import onnxscript  # noqa: F401
        from transformers.exporters import OnnxConfig, OnnxExporter
    except ImportError as error:
        raise InputError(f"--onnx: {error}; {INSTALL}.") from None
    known = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of libraries, about what is not installed
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            exported = OnnxExporter().export(model.network, dict(inputs), config=OnnxConfig(dynamic=True))
            exported.save_pretrained(folder)
    except Exception as error:  # whatever tracing raises
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--onnx: a {model.network.config.model_type} network can't be exported: {type(error).__name__}:"
            f" {reason}; leave --onnx out."
        ) from None
    finally:
        logging.disable(known)


class OnnxSpanModel(nn.Module):
    """Takes the place of a SpanModel: inputs (B, L) int64 -> start and end logits (B, L, 2), fp32."""

    def __init__(self, folder: str, device: torch.device) -> None:
        """Raises InputError."""
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError(f"{folder} is an ONNX model: {error}; {INSTALL}.") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        provider = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}[device.type]
        if provider not in onnxruntime.get_available_providers():
            raise InputError(
                f"{folder}: onnxruntime has no {provider}; install onnxruntime-gpu, or --device cpu."
            )
        providers = list(dict.fromkeys([provider, "CPUExecutionProvider"]))
        try:
            self.session = onnxruntime.InferenceSession(
                str(Path(folder) / ONNX_FILE), options, providers=providers
            )
        except Exception as error:  # its errors have no common class of their own
            raise InputError(
                f"{folder}/{ONNX_FILE}: can't be loaded: {' '.join(str(error).split())[:200]}"
            ) from None
        self.device, self.names = device, [given.name for given in self.session.get_inputs()]

    def forward(self, **inputs: Tensor) -> Tensor:
        visible = inputs["attention_mask"] != 0
        given = {name: inputs[name].cpu().numpy() for name in self.names}
        outputs = [torch.from_numpy(array) for array in self.session.run(None, given)]
        logits = torch.stack(outputs, dim=-1) if len(outputs) == 2 else outputs[0]
        logits = logits.to(self.device)
        return logits.masked_fill(~visible.unsqueeze(-1), torch.finfo(torch.float32).min)

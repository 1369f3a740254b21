"""Options of the model: which one, how it is spread over the ranks, adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from plainloop.trainer.config.option import option


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to train."""

    path: str = option("roberta-base", "model folder or Hugging Face Hub name")
    dropout: float | None = option(
        None, "override the hidden dropout of the model config", minimum=0, below=1
    )
    attention_dropout: float | None = option(
        None, "override the attention dropout of the model config", minimum=0, below=1
    )
    attention: str | None = option(
        None, "attention of transformers: eager, sdpa, flash_attention_2, ...; default: its choice"
    )
    activation_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, a third slower"
    )
    compile: bool = option(
        False, "use torch.compile: minutes to compile at the first start; for GPUs (see data.num_widths)"
    )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over the ranks: docs/sharding.md.

    `--parallel fsdp` is short for `--parallel.mode fsdp`.
    """

    mode: Literal["ddp", "fsdp"] = option(
        "ddp",
        "ddp: each rank holds the whole model; fsdp: each holds a share of it and of its optimizer state",
    )
    shard_size: int | None = option(
        None, "fsdp: ranks that share one copy of the model, such as those of a node; default: all", minimum=2
    )
    gather_dtype: Literal["fp32", "bf16"] = option(
        "fp32", "fsdp: dtype in which weights are sent; bf16 halves the traffic, gradients stay fp32"
    )


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """Adapters by PEFT, trained in place of the model's own weights: docs/adapters.md."""

    rank: int = option(0, "rank of the adapters; 0: no adapters, all weights are trained", minimum=0)
    targets: list[str] = option(
        list, "names of the linear layers that get one, such as [q, v]; default: PEFT's choice for the model"
    )
    alpha: float | None = option(
        None, "adapters are scaled by alpha / rank (rslora: / sqrt(rank)); default: 2 x rank", above=0
    )
    dropout: float = option(0.0, "dropout of the adapters' inputs", minimum=0, below=1)
    method: Literal["lora", "dora", "rslora"] = option(
        "lora", "dora: directions and magnitudes apart; rslora: scaled for high ranks"
    )
    base_dtype: Literal["fp32", "bf16"] = option(
        "fp32",
        "dtype of the frozen linear layers; bf16, with precision bf16: half the memory, and with lora the"
        " same bits",
    )

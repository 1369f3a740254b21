"""The tables of docs/scaling.md: bytes sent, memory and time of a step on 1 to 64 GPUs, on paper.

usage: python tests/bench/paper.py
Nothing is measured: memory is plainloop's estimate from a model's config, the rest is computed by
trainer/distributed/traffic.py.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from common import setup

from plainloop.trainer.distributed.traffic import Cluster, Network, ddp_bytes, fsdp_bytes, step_seconds

TINY = "TINY" in os.environ  # smoke test: one round
GPUS = (1, 8) if TINY else (1, 4, 8, 16, 64)
# Data sheets: 312 and 989 TFLOP/s in bf16, NVLink 300 and 450 GB/s in each direction, InfiniBand 200 and
# 400 Gb/s per GPU. Of these, 40 % of the TFLOP/s and 80 % of the bandwidths.
KINDS = {"A100": (312, 300e9, 25e9), "H100": (989, 450e9, 50e9)}


def make_models(folder: Path, tokenizer: str) -> dict[str, tuple[str, int]]:
    """Model folders without weights, of the published sizes. Name -> task, tokens of a micro-batch."""
    from transformers import RobertaConfig, T5Config

    t5 = dict(
        vocab_size=32128, d_model=1024, d_kv=128, num_layers=2 if TINY else 24, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    configs: dict[str, tuple[Any, str, int]] = {
        "RoBERTa-large": (
            RobertaConfig(
                vocab_size=50265, hidden_size=1024, num_hidden_layers=2 if TINY else 24,
                num_attention_heads=16, intermediate_size=4096, max_position_embeddings=514,
                type_vocab_size=1, pad_token_id=1,
            ), "span", 8192,
        ),
        "T5-3b": (T5Config(d_ff=16384, num_heads=32, **t5), "text", 4096),
        "T5-11b": (T5Config(d_ff=65536, num_heads=128, **t5), "text", 4096),
    }  # fmt: skip
    for name, (config, _, _) in configs.items():
        (folder / name).mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            if (Path(tokenizer) / file).exists():
                shutil.copy(Path(tokenizer) / file, folder / name)
        config.save_pretrained(folder / name)
    return {name: (task, tokens) for name, (_, task, tokens) in configs.items()}


def main() -> None:
    from plainloop.trainer.config.options import ModelConfig, PeftConfig, TrainConfig
    from plainloop.trainer.tasks.find import find_task
    from plainloop.trainer.tasks.footprint import footprint, made_up_data

    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        tokenizer = setup(root, limit=16).path
        for name, (kind, tokens) in make_models(folder, tokenizer).items():
            lora = PeftConfig(
                rank=16, base_dtype="bf16", targets=["query", "value"] if kind == "span" else ["q", "v"]
            )
            found = {}
            for layout, peft, recompute in (
                ("ddp", PeftConfig(), False),
                ("fsdp", PeftConfig(), True),
                ("lora", lora, False),
            ):
                model = ModelConfig(path=str(folder / name), activation_checkpointing=recompute)
                config = TrainConfig(task=kind, model=model, peft=peft, precision="bf16", batch_size=64)
                task = find_task(kind)(config)
                (folder / f"{name}-{layout}").mkdir()
                data = made_up_data(task, config, folder / f"{name}-{layout}")
                found[layout] = footprint(task, data, config, tokens)
            print(f"\n{name}, {found['ddp'].parameters / 1e6:,.0f} M parameters, {tokens} tokens per GPU\n")
            print("| layout | GPUs | memory | sent per step | A100 | H100 |")
            print("| --- | --- | --- | --- | --- | --- |")
            for layout, gpus, shards in rows():
                key = layout.split(",")[0]
                size = found[key]
                outside = sum(size.outside)
                network = Network(size.parameters, size.trained, outside, gather_bytes=2)
                memory = size.memory(tokens, shards=shards, gather_dtype="bf16")
                sent = ddp_bytes(network, gpus)
                if key == "fsdp":
                    sent = sum(fsdp_bytes(network, gpus, shards=shards))
                times = []
                for tflops, within, between in KINDS.values():
                    cluster = Cluster(gpus, 8, 0.4 * tflops, 0.8 * within, 0.8 * between)
                    mode = "fsdp" if key == "fsdp" else "ddp"
                    seconds = step_seconds(
                        network, cluster, tokens, mode=mode, shards=shards, recompute=key == "fsdp"
                    )
                    times.append(f"{seconds:.2f} s")
                cells = [layout, str(gpus), f"{memory / 1e9:.1f} GB", f"{sent / 1e9:.2f} GB", *times]
                print(f"| {' | '.join(cells)} |")


def rows() -> list[tuple[str, int, int]]:
    """Layout, GPUs, shards."""
    found = [("ddp", gpus, 1) for gpus in GPUS]
    found += [("fsdp", gpus, gpus) for gpus in GPUS if gpus > 1]
    found += [("fsdp, shard_size 8", gpus, 8) for gpus in GPUS if gpus > 8]
    return found + [("lora", gpus, 1) for gpus in GPUS]


if __name__ == "__main__":
    main()

"""Peak memory of a rank with a model of 409 M parameters: whole on one rank, or sharded over 2 and 4.

usage: python tests/bench/sharding.py
Peak resident memory above that of the imports, beside plainloop's estimate from the config alone (for a CPU,
so without what is added for CUDA): after two steps, after a save during which training goes on, and in new
processes that resume. Every step has the largest micro-batch of the data twice. Freed memory goes back to
the system at once; by default, glibc keeps some of it. Before that, loading: the peak including pages of the
file, of which the kernel maps some beyond the rows that are read, and what is left without them.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from common import Bench, setup

from plainloop.trainer.tasks.footprint import RESERVE, Footprint

TINY = "TINY" in os.environ  # smoke test: one round
LAYERS = 2 if TINY else 30
TOKENS = 384  # of a micro-batch; the longest row of the real data has as many


def peak_gb() -> float:
    """Peak resident memory of this process, in 1e9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def private_gb() -> float:
    """Resident memory of this process now, without pages of files, in 1e9 bytes."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024 / 1e9


def make_model(folder: Path, tokenizer: str) -> None:
    import torch
    from transformers import BertConfig, BertForQuestionAnswering

    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        if (file := Path(tokenizer) / name).exists():
            shutil.copy(file, folder)
    config = BertConfig(
        hidden_size=1024, num_hidden_layers=LAYERS, num_attention_heads=16, intermediate_size=4096
    )
    torch.manual_seed(0)
    BertForQuestionAnswering(config).save_pretrained(folder)


def estimate(bench: Bench, model_path: str) -> Footprint:
    """From the config alone."""
    from plainloop.trainer.tasks import footprint

    config = replace(bench.config, precision="fp32", batch_size=4)
    config = replace(config, model=replace(config.model, path=model_path))
    return footprint.footprint(bench.task, bench.data, config, TOKENS, device="cpu")


def measure(cache: str, path: str, folder: Path, ranks: int) -> None:
    """All ranks. Train the model of this path and save into a folder; or resume, if it has a checkpoint.
    Rank 0 prints, as JSON, the peak of its memory after each phase.
    """
    import torch

    from plainloop.trainer.checkpoint.host_copy import HostCopy
    from plainloop.trainer.checkpoint.sharded import shard_tensors, write_shard
    from plainloop.trainer.config.options import ParallelConfig
    from plainloop.trainer.distributed.world import process_group
    from plainloop.trainer.hooks import warm_up
    from plainloop.trainer.loop import StepOptions, train_step
    from plainloop.trainer.run import new_state
    from plainloop.trainer.run_folder.tensors import open_shards
    from plainloop.trainer.tasks import base as tasks
    from plainloop.trainer.tasks.model import load_model

    bench = setup(cache, threads=1, limit=64)
    mode = ParallelConfig(mode="fsdp" if ranks > 1 else "ddp")
    config = replace(bench.config, parallel=mode, precision="fp32", batch_size=4)
    world, task = bench.world, bench.task
    steps = tasks.make_steps(task, bench.data, config, world, max_tokens=TOKENS)
    with process_group(world, timeout_s=600):
        base, before, peaks = peak_gb(), private_gb(), {}
        model = load_model(task, path, config, world, new_head=False, sharded=ranks > 1).train()
        state = new_state(model, config, world)
        if shards := open_shards(folder):
            state.load_optimizer_tensors(shards.below("optimizer/"))
            torch.distributed.barrier() if ranks > 1 else None
            if world.is_main:
                print(json.dumps({"resume": peak_gb() - base}), flush=True)
            return
        peaks |= {"load with pages": peak_gb() - base, "load": private_gb() - before}
        options = StepOptions(task.loss_sum, lambda _: 1e-5, world, 1, "fp32", 1.0)
        largest = steps.largest()[:1]
        batch = steps[0]._replace(micro_batches=2 * largest)
        warm_up(state, largest, options)
        for _ in range(2):
            train_step(state, batch, options)
        peaks["step"] = peak_gb() - base
        tensors = HostCopy()(shard_tensors(state, first=world.rank == 0))
        with ThreadPoolExecutor(1) as thread:
            written = thread.submit(write_shard, folder, tensors, world.rank, ranks)
            train_step(state, batch, options)
            written.result()
        peaks["save"] = peak_gb() - base
        torch.distributed.barrier() if ranks > 1 else None
        if world.is_main:
            print(json.dumps(peaks), flush=True)


def launch(root: str, path: Path, folder: Path, ranks: int) -> dict[str, float]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    line = [sys.executable, *launcher, __file__, "--child", root, str(path), str(folder), str(ranks)]
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    result = subprocess.run(line, capture_output=True, text=True, env=os.environ | settings)
    if result.returncode:
        raise SystemExit(result.stderr[-3000:])
    lines = [text for text in result.stdout.splitlines() if text.startswith("{")]
    return dict(json.loads(lines[-1]))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        from plainloop.data.processes import exit_rank

        measure(sys.argv[2], sys.argv[3], Path(sys.argv[4]), int(sys.argv[5]))
        exit_rank()
    with tempfile.TemporaryDirectory() as root:
        bench = setup(root, limit=64)
        model = Path(root) / "model"
        model.mkdir()
        make_model(model, bench.path)
        expected = estimate(bench, str(model))
        for ranks in (2,) if TINY else (1, 2, 4):
            folder = Path(root) / f"step-{ranks}"
            shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
            found = launch(root, model, folder, ranks) | launch(root, folder, folder, ranks)
            shutil.rmtree(folder)
            weights, moments = expected.weights / ranks / 1e9, expected.moments / ranks / 1e9
            step = (expected.memory(expected.tokens, shards=ranks) - RESERVE) / 1e9
            # While the moments are read, pages of their file count too.
            guess = {"step": step, "save": step + weights + moments, "resume": weights + 2 * moments}
            guess |= {"load": weights} if ranks > 1 else {}
            shares = ", ".join(
                f"{name} {value:.2f} GB"
                + (f" (estimated {guess[name]:.2f}, {guess[name] / value - 1:+.0%})" if name in guess else "")
                for name, value in found.items()
            )
            size = f"{expected.parameters / 1e6:.0f} M parameters, {expected.tokens} tokens"
            print(f"{size}, rank 0 of {ranks}: {shares}", flush=True)


if __name__ == "__main__":
    main()

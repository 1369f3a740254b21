"""Run by test_traffic.py: some optimizer steps; rank 0 prints how many bytes the ranks sent.

usage: MODEL DATA CACHE MODE SHARD_SIZE MAX_TOKENS
Prints JSON: bytes per step of all ranks, micro-batches per step, parameters, those outside the blocks.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from plainloop.data.processes import exit_rank
from plainloop.trainer.config.options import DataConfig, ModelConfig, ParallelConfig, TrainConfig
from plainloop.trainer.distributed.parallel import blocks
from plainloop.trainer.distributed.world import all_ranks, process_group, world_from_env
from plainloop.trainer.loop import StepOptions, train_step
from plainloop.trainer.run import new_state
from plainloop.trainer.tasks import base as tasks
from plainloop.trainer.tasks.find import find_task
from plainloop.trainer.tasks.model import load_model

STEPS = 3


def sent() -> int:
    """Bytes that this process has written, to sockets and files, since it began. It writes no files here."""
    lines = dict(text.split(": ") for text in Path("/proc/self/io").read_text().splitlines())
    return int(lines["wchar"])


model_path, data_path, cache, mode, shard_size, max_tokens = sys.argv[1:]
world = world_from_env("cpu")
sharded = mode == "fsdp"
config = TrainConfig(
    model=ModelConfig(path=model_path), batch_size=16, seed=1, precision="fp32",
    parallel=ParallelConfig(mode="fsdp" if sharded else "ddp", shard_size=int(shard_size) or None),
    data=DataConfig(max_length=96, stride=24, cache_dir=cache, bucket=0),
)  # fmt: skip
task = find_task("span")(config)
data = tasks.load_split(task, "train", data_path, config, world)
with process_group(world, timeout_s=100):
    model = load_model(task, model_path, config, world, new_head=True, sharded=sharded).train()
    outside = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for block in blocks(model) for p in block.parameters()
    )
    state = new_state(model, config, world)
    steps = tasks.make_steps(task, data, config, world, max_tokens=int(max_tokens))
    options = StepOptions(task.loss_sum, lambda _: 1e-4, world, 0, "fp32", 1.0)
    train_step(state, steps[0], options)  # sets up connections and buckets
    dist.barrier()
    before = sent()
    for _ in range(STEPS):
        train_step(state, steps[0], options)
    dist.barrier()
    counts = all_ranks(torch.tensor([sent() - before]))
    if world.is_main:
        found = {
            "bytes": counts.sum().item() / STEPS, "micro_batches": len(steps[0].micro_batches),
            "parameters": sum(p.numel() for p in model.parameters()), "outside": outside,
        }  # fmt: skip
        print(json.dumps(found), flush=True)
exit_rank()

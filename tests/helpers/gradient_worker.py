"""Run by test_gradients.py: one optimizer step for each case; rank 0 saves the gradients.

usage: CASES TASK MODEL DATA CACHE
CASES: JSON, a list of {"out", "batch_size", "tokens"}, and for FSDP "shard_size", "recompute".
"""

import json
import sys
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import save_file

from plainloop.data.processes import exit_rank
from plainloop.trainer.config.options import DataConfig, ModelConfig, ParallelConfig, TrainConfig
from plainloop.trainer.distributed.world import process_group, world_from_env
from plainloop.trainer.loop import StepOptions, train_step
from plainloop.trainer.run import new_state
from plainloop.trainer.tasks import base as tasks
from plainloop.trainer.tasks.find import find_task
from plainloop.trainer.tasks.model import load_model

cases, kind, model_path, data_path, cache = sys.argv[1:]
world = world_from_env("cpu")
dropout = {"dropout": 0.0, "attention_dropout": 0.0} if kind == "span" else {"dropout": 0.0}
base = TrainConfig(
    task=kind, model=ModelConfig(path=model_path, **dropout), seed=1, precision="fp32",
    data=DataConfig(max_length=96, stride=24, cache_dir=cache, bucket=0),
)  # fmt: skip
task = find_task(kind)(base)
data = tasks.load_split(task, "train", data_path, base, world)


def one_step(out: str, batch_size: int, tokens: int, shard_size: int = 0, recompute: bool = False) -> None:
    sharded = ParallelConfig(mode="fsdp", shard_size=shard_size) if shard_size else ParallelConfig()
    config = replace(
        base, batch_size=batch_size, parallel=sharded,
        model=replace(base.model, activation_checkpointing=recompute),
    )  # fmt: skip
    torch.manual_seed(0)
    model = load_model(task, model_path, config, world, new_head=True, sharded=shard_size > 0).train()
    state = new_state(model, config, world)
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        for name, parameter in model.named_parameters():
            gradient: Any = parameter.grad
            if gradient is not None:
                gradients[name] = (
                    gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient.clone()
                )

    state.optimizer.register_step_pre_hook(keep)
    batch = tasks.make_steps(task, data, config, world, max_tokens=tokens)[0]
    train_step(state, batch, StepOptions(task.loss_sum, lambda _: 1e-3, world, 0, "fp32", max_grad_norm=0.0))
    if world.is_main:
        print(f"{out}: micro_batches={len(batch.micro_batches)}")
        save_file(gradients, out)
    if world.size > batch.examples and world.rank == world.size - 1:
        assert all((label == -100).all() for label in batch.micro_batches[0].labels.values()), (
            "this rank's share should be empty"
        )


with process_group(world, timeout_s=60):
    for case in json.loads(cases):
        one_step(**case)
exit_rank()

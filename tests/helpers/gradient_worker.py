"""Run by test_gradients.py: one optimizer step; rank 0 saves the gradients.

usage: OUT BATCH_SIZE MAX_TOKENS TASK MODEL DATA CACHE [SHARD_SIZE [recompute]]
"""

import sys

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

out, batch_size, max_tokens, kind, model_path, data_path, cache, *more = sys.argv[1:]
world = world_from_env("cpu")
dropout = {"dropout": 0.0, "attention_dropout": 0.0} if kind == "span" else {"dropout": 0.0}
config = TrainConfig(
    task=kind, model=ModelConfig(path=model_path, activation_checkpointing=len(more) > 1, **dropout),
    parallel=ParallelConfig(mode="fsdp", shard_size=int(more[0])) if more else ParallelConfig(),
    batch_size=int(batch_size), seed=1,
    data=DataConfig(max_length=96, stride=24, cache_dir=cache, bucket=0), precision="fp32",
)  # fmt: skip
task = find_task(kind)(config)
data = tasks.load_split(task, "train", data_path, config, world)
with process_group(world, timeout_s=60):
    torch.manual_seed(0)
    model = load_model(task, model_path, config, world, new_head=True, sharded=bool(more)).train()
    state = new_state(model, config, world)
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        for name, parameter in model.named_parameters():
            if (gradient := parameter.grad) is not None:
                whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient  # type: ignore[operator]
                gradients[name] = whole.clone()

    state.optimizer.register_step_pre_hook(keep)
    batch = tasks.make_steps(task, data, config, world, max_tokens=int(max_tokens))[0]
    train_step(state, batch, StepOptions(task.loss_sum, lambda _: 1e-3, world, 0, "fp32", max_grad_norm=0.0))
    if world.is_main:
        print(f"micro_batches={len(batch.micro_batches)}")
        save_file(gradients, out)
    if world.size > batch.examples and world.rank == world.size - 1:
        assert all((label == -100).all() for label in batch.micro_batches[0].labels.values()), (
            "this rank's share should be empty"
        )
exit_rank()

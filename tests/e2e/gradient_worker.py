"""Run by test_gradients.py: one optimizer step, gradients saved by rank 0. usage: OUT BATCH_SIZE TOKENS
TASK MODEL DATA CACHE
"""

import sys

import torch
from safetensors.torch import save_file

from plainloop.trainer.config import DataConfig, ModelConfig, OptimConfig, TextConfig
from plainloop.trainer.distributed import process_group, world_from_env
from plainloop.trainer.loop import StepOptions, train_step
from plainloop.trainer.optim import make_optimizer
from plainloop.trainer.precision import make_scaler
from plainloop.trainer.run import wrap
from plainloop.trainer.state import TrainState
from plainloop.trainer.tasks import make_task

out, batch_size, tokens, kind, model_path, data_path, cache = sys.argv[1:]
world = world_from_env("cpu")
data = DataConfig(max_length=96, stride=24, cache_dir=cache, bucket=0)
dropout = {"dropout": 0.0, "attention_dropout": 0.0} if kind == "span" else {"dropout": 0.0}
task = make_task(kind, ModelConfig(path=model_path, **dropout), data, TextConfig(), world)
windows = task.prepare("train", data_path)
with process_group(world, timeout_s=60):
    torch.manual_seed(0)
    model = task.load_model(model_path, new_head=True).train()
    optimizer = make_optimizer(model, OptimConfig())
    state = TrainState(
        model,
        wrap(model, world, compile_it=False),
        optimizer,
        make_scaler("fp32", world.device),
        world.device,
    )
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    optimizer.register_step_pre_hook(keep)
    batch = task.steps(windows, batch_size=int(batch_size), seed=1, tokens=int(tokens))[0]
    train_step(state, batch, StepOptions(task.loss_sum, lambda _: 1e-3, world, 0, "fp32", max_grad_norm=0.0))
    if world.is_main:
        print(f"micro_batches={len(batch.micro_batches)}")
        save_file(gradients, out)
    if world.size > batch.examples and world.rank == world.size - 1:
        assert all((label == -100).all() for label in batch.micro_batches[0].labels.values()), (
            "this rank's share should be empty"
        )

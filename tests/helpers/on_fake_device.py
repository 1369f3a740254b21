"""Run by tests/trainer/test_fake_device.py: do each phase of training on the fake device; report as JSON.

python on_fake_device.py span|text fp32|bf16 adamw|adafactor MODEL_FOLDER SCRATCH [FAULT]

FAULT: item (train_step reads the loss), resume (a tensor stays on the CPU), blocking (copies of inputs are
synchronous).
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fake_device import DEVICE, NOTED, Memory, OnFakeDevice

from plainloop.data.types import MicroBatch, StepBatch
from plainloop.models.position_bias import share_position_bias
from plainloop.models.seq2seq import (
    generate,
    load_seq2seq_model,
    sequence_log_probs,
    token_loss_sum,
)
from plainloop.models.spans import load_span_model, span_loss_sum
from plainloop.trainer import hooks, loop
from plainloop.trainer.checkpoint import folder as checkpoints
from plainloop.trainer.checkpoint.host_copy import HostCopy
from plainloop.trainer.config.options import OptimConfig
from plainloop.trainer.distributed.parallel import Parallel
from plainloop.trainer.distributed.world import World
from plainloop.trainer.optim import make_optimizer
from plainloop.trainer.precision import make_scaler
from plainloop.trainer.state import TrainState

task, precision, optimizer_name, folder, scratch, *fault = sys.argv[1:]
CPU = torch.device("cpu")


def micro_batch(random: torch.Generator) -> MicroBatch:
    ids = torch.randint(5, 90, (2, 16), generator=random)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][1, 9:] = 0
    if task == "span":
        return MicroBatch(inputs, {"start": torch.tensor([1, 2]), "end": torch.tensor([1, 2])})
    inputs |= {"decoder_input_ids": torch.tensor([[0, 5, 6], [0, 7, 0]]), "scored": torch.arange(5)}
    return MicroBatch(inputs, {"target": torch.tensor([5, 6, 1, 7, 1])})


def load() -> Any:
    if task == "span":
        return load_span_model(folder, new_head=True, dropout=0.0, attention_dropout=0.0)
    return load_seq2seq_model(folder, dropout=0.0)


torch.manual_seed(0)
TEMPLATE = load()


def make(device: torch.device) -> tuple[TrainState, loop.StepOptions]:
    model = copy.deepcopy(TEMPLATE)
    if task == "text" and device != CPU:
        share_position_bias(model.network)
    model = model.to(device).train()
    optimizer = make_optimizer(model, OptimConfig(name=optimizer_name))
    state = TrainState(model, Parallel(model), optimizer, make_scaler("fp32", CPU), device)
    loss: Any = span_loss_sum if task == "span" else token_loss_sum
    return state, loop.StepOptions(loss, lambda _: 1e-3, World(0, 1, 0, device), 1, precision, 1.0)


def steps(state: TrainState, options: loop.StepOptions, first: int, last: int) -> None:
    for step in range(first, last):
        random = torch.Generator().manual_seed(step)
        parts = [micro_batch(random), micro_batch(random)]
        loop.train_step(
            state,
            StepBatch(parts, num_targets=4, examples=4, tokens=50, padded_tokens=64, rows=np.arange(4)),
            options,
        )
        state.step += 1


def save_and_restore(state: TrainState) -> TrainState:
    """Save and restore through the host copy and a real checkpoint folder."""
    weights, optimizer = HostCopy()(state.model.state_dict()), HostCopy()(state.optimizer_tensors())
    assert all(type(t) is torch.Tensor and t.device == CPU for t in [*weights.values(), *optimizer.values()])
    record = {**checkpoints.counters(state), "loss_sum": state.loss_sum.item()}
    from safetensors.torch import save_file

    def save_model(to: Path) -> None:
        save_file({name: tensor.clone() for name, tensor in weights.items()}, to / "model.safetensors")

    path = checkpoints.save_checkpoint(Path(scratch), save_model, optimizer, record, size=0)
    resumed, _ = make(DEVICE)
    with torch.no_grad():
        for name, parameter in resumed.model.state_dict().items():
            parameter.copy_(weights[name])
    checkpoints.restore(resumed, checkpoints.Checkpoint(path, record), is_main=True)
    if "resume" in fault:
        first = next(iter(resumed.model.parameters()))
        kept = resumed.optimizer.state[first]
        kept.update({name: tensor.to(CPU) for name, tensor in kept.items()})
    return resumed


def use(state: TrainState) -> list[Any]:
    """Outputs of evaluation and, for text, generation. (Inference mode can't handle tensors like Fake.)"""
    model: Any = state.model.eval()
    inputs, _ = micro_batch(torch.Generator().manual_seed(9))
    inputs = {name: tensor.to(state.device) for name, tensor in inputs.items()}
    with torch.no_grad(), loop.autocast(precision, state.device):
        logits = model(**inputs).float().cpu()
        if task == "span":
            return [logits.argmax(dim=1).tolist()]
        ids = generate(model, inputs, max_new_tokens=4)
        return [ids.cpu().tolist(), sequence_log_probs(model, inputs, ids).cpu().tolist()]


def noted() -> list[str]:
    found = sorted(f"{' '.join(filter(None, key))} x{count}" for key, count in NOTED.items())
    NOTED.clear()
    return found


if "item" in fault:
    add_gradients = loop.add_gradients

    def with_item(*arguments: Any) -> Any:
        loss = add_gradients(*arguments)
        loss.item()
        return loss

    loop.add_gradients = with_item
if "blocking" in fault:
    to = torch.Tensor.to
    torch.Tensor.to = lambda self, *a, non_blocking=False, **k: to(self, *a, **k)  # type: ignore[method-assign, assignment]

reference, options = make(CPU)
hooks.warm_up(reference, [micro_batch(torch.Generator().manual_seed(0))], options)
steps(reference, options, 0, 4)
found: dict[str, Any] = {}
with OnFakeDevice():
    state, options = make(DEVICE)
    NOTED.clear()
    hooks.warm_up(state, [micro_batch(torch.Generator().manual_seed(0))], options)
    found["warm-up"], found["warm-up peak"] = noted(), Memory.peak
    steps(state, options, 0, 2)
    found["two steps"], found["peak"] = noted(), Memory.peak
    state = save_and_restore(state)
    NOTED.clear()
    steps(state, options, 2, 4)
    found["two steps after a resume"] = noted()
    found["devices"] = sorted(
        {str(t.device) for t in [*state.model.parameters(), *state.optimizer_tensors().values()]}
    )
    found["loss"] = [state.loss_sum.item(), reference.loss_sum.item()]
    found["norm"] = [state.grad_norm.item(), reference.grad_norm.item()]
    found["digest"] = isinstance(hooks.weights_digest(state.model), int)
    found["used"] = use(state)
found["used on the CPU"] = use(reference)
print(json.dumps(found))

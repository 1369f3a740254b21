"""The memory of a training step, from the config of a model alone: no weights, no GPU, no computation.

A forward and a backward pass run on fake tensors, which have shapes but no memory (torch's FakeTensorMode).
What they would have allocated is counted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plainloop.trainer.config.options import MOMENTS, TrainConfig
from plainloop.trainer.distributed.parallel import blocks
from plainloop.trainer.distributed.world import World
from plainloop.trainer.errors import InputError
from plainloop.trainer.precision import autocast
from plainloop.trainer.tasks import base as tasks
from plainloop.trainer.tasks.base import Dataset, Task
from plainloop.trainer.tasks.model import shape_model

RESERVE = 1 << 30  # bytes for the CUDA context, and for what the allocator can't use


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank that holds the whole model: weights and moments. block, outside: parameters of the
    largest block and of what is outside the blocks, in fp32 and in bf16. passing: what forward and backward
    allocate besides, at their peak, with micro-batches of `tokens` padded tokens; per_token: how much more
    for each further token. casts: the part of it that is weights rounded by autocast.
    """

    parameters: int
    trained: int
    weights: int
    block: tuple[int, int]
    outside: tuple[int, int]
    moments: int
    tokens: int
    passing: int
    per_token: float
    casts: int

    def memory(self, tokens: int, *, shards: int = 1, gather_dtype: str = "fp32") -> int:
        """Bytes that a rank needs on its device. shards: ranks that share the model with FSDP."""
        share = self.weights + 4 * self.trained + self.moments
        passing = self.passing + self.per_token * (tokens - self.tokens)
        if shards == 1:
            return int(share + passing) + RESERVE
        # Gathered weights: those outside the blocks during the whole pass, and two blocks, of which one is
        # being gathered. In backward also their gradients in fp32, whole and being reduced.
        casts = 0 if gather_dtype == "bf16" else self.casts
        whole, half = (self.outside[i] + 2 * self.block[i] for i in (0, 1))
        gathered = (2 if gather_dtype == "bf16" else 4) * whole + 2 * half
        gradients = 4 * (whole + half) * self.trained / self.parameters
        return int(share / shards + gathered + gradients + passing - self.casts + casts) + RESERVE

    def fitting(self, memory: float, **layout: Any) -> int:
        """The largest multiple of 256 for tokens_per_device that fits into this memory; 0 if none does."""
        free = memory - self.memory(0, **layout)
        return max(0, int(free / self.per_token / 256)) * 256


def footprint(
    task: Task, data: Dataset, config: TrainConfig, max_tokens: int, *, device: str = "cuda"
) -> Footprint:
    """Of the largest micro-batch of this data with max_tokens padded tokens. device: "cuda" or "cpu", where
    dropout and attention keep more for backward. Raises InputError.
    """
    model = shape_model(task, config, device).train()
    whole, sizes = _counts(model), [_counts(block) for block in blocks(model)]
    outside = whole[0] - sum(size[0] for size in sizes), whole[1] - sum(size[1] for size in sizes)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    batches = [largest(task, data, config, factor * max_tokens) for factor in (1, 2)]
    attention = attention_of_gpus() if device == "cuda" else contextlib.nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), attention, _errors_once():
        _materialise(model)
        try:
            (tokens, passing, casts), (more, with_more, _) = (
                _pass(task, model, batch, config) for batch in batches
            )
        except RuntimeError as error:  # the network or the loss looks at a value, which is not there
            reason = str(error).strip().partition("\n")[0][:200].rstrip(".")
            raise InputError(f"model.path {config.model.path}: can't be estimated: {reason}.") from None
    per_token = (with_more - passing) / (more - tokens) if more > tokens else passing / tokens
    return Footprint(
        sum(whole), trained, 4 * whole[0] + 2 * whole[1], max(sizes, key=sum, default=(0, 0)), outside,
        int(MOMENTS[config.optim.name] * trained), tokens, passing, per_token, casts,
    )  # fmt: skip


@contextlib.contextmanager
def _errors_once() -> Iterator[None]:
    """torch logs errors of fake tensors at length before it raises them."""
    logger = logging.getLogger(FakeTensorMode.__module__)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _counts(module: nn.Module) -> tuple[int, int]:
    """Parameters in fp32 and in bf16."""
    found = Counter[int]()
    for parameter in module.parameters():
        found[parameter.element_size()] += parameter.numel()
    return found[4], found[2]


def largest(task: Task, data: Dataset, config: TrainConfig, max_tokens: int) -> Any:
    """The micro-batch with the most tokens. Its rows may repeat those of the data."""
    world = World(0, 1, 0, torch.device("cpu"))
    steps = tasks.make_steps(task, data, config, world, max_tokens=max_tokens)
    lengths = steps.sampler.lengths
    total = lengths.sum(axis=1) if lengths.ndim == 2 else lengths
    row = int(total.argmax())
    rows = max(1, max_tokens // int(total[row]))
    return steps.collate(np.full(rows, row))


def _pass(task: Task, model: Any, micro_batch: Any, config: TrainConfig) -> tuple[int, int, int]:
    """Padded tokens, bytes at the peak of forward and backward, and how many of them are casts of weights.
    The gradients of the weights are there before, as from the second micro-batch on.
    """
    inputs, labels = ({n: torch.empty_like(t) for n, t in part.items()} for part in micro_batch)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    with Meter(list(model.parameters())) as meter:
        with autocast(config.precision, torch.device("cpu")):
            logits = model(**inputs)
        task.loss_sum(logits, labels).backward()
        del logits
    tokens = sum(t.numel() for name, t in inputs.items() if name.endswith("input_ids"))
    return tokens, meter.peak, meter.casts


class Meter(TorchDispatchMode):
    """Counts the bytes of the storages that operations allocate, until they are freed. casts: those of
    weights rounded by autocast, at the peak.
    """

    def __init__(self, weights: list[nn.Parameter]) -> None:
        super().__init__()
        self.weights = {p.untyped_storage()._cdata for p in weights}
        gradients = {p.grad.untyped_storage()._cdata for p in weights if p.grad is not None}
        self.known = self.weights | gradients
        self.now = self.peak = self.casts = self.casts_now = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self.known:
                continue
            self.known.add(key)
            cast = operation is torch.ops.aten._to_copy.default and self._is_weight(args[0])
            self._count(size, cast)
            weakref.finalize(storage, self._free, key, size, cast)
        return result

    def _count(self, size: int, cast: bool) -> None:
        self.now += size
        self.casts_now += size if cast else 0
        if self.now > self.peak:
            self.peak, self.casts = self.now, self.casts_now

    def _free(self, key: int, size: int, cast: bool) -> None:
        self.known.discard(key)
        self._count(-size, False)
        self.casts_now -= size if cast else 0

    def _is_weight(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.weights


@contextlib.contextmanager
def attention_of_gpus() -> Iterator[None]:
    """Let attention keep what its kernels on GPUs keep for backward: inputs, output, and one fp32 number per
    query. On a CPU, those for dropout and trained biases keep all scores.
    """
    replaced = functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **_: Any) -> Tensor:
        result: Tensor = _Attention.apply(query, key, value, attn_mask)
        return result

    functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = replaced


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        result = query.new_empty((*query.shape[:-1], value.shape[-1]))
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        context.save_for_backward(query, key, value, mask, result, sums)
        return result

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        inputs = context.saved_tensors[:4]
        return tuple(
            torch.empty_like(t) if needed else None
            for t, needed in zip(inputs, context.needs_input_grad, strict=True)
        )


def _materialise(model: nn.Module) -> None:
    """Replace the tensors on the meta device by fake ones on the CPU. Tied parameters stay tied."""
    done: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        for values in (module._parameters, module._buffers):
            for name, tensor in values.items():
                if tensor is None:
                    continue
                if id(tensor) not in done:
                    new: Tensor = torch.empty_like(tensor, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, tensor.requires_grad)
                    done[id(tensor)] = tensor, new
                values[name] = done[id(tensor)][1]  # type: ignore[assignment]


def made_up_data(task: Task, config: TrainConfig, folder: Path) -> Dataset:
    """Rows as long as the options allow, for an estimate without data. Raises InputError."""
    if ":" in config.task:
        raise InputError("a task of your own: give --data.train for an estimate.")
    config = replace(config, text=replace(config.text, target_column="answer"))
    length = config.data.max_length if config.task == "span" else config.text.max_source_length
    word = task.tokenizer.decode([len(task.tokenizer) // 2]).strip() or "word"
    context = " ".join([word] * (2 * length))
    answer = {"text": " ".join([word] * min(200, 2 * length)), "answer_start": 0}
    questions = [{"id": "0", "question": word, "answers": [answer], "is_impossible": False}]
    article = {"title": "", "paragraphs": [{"context": context, "qas": questions}]}
    path = folder / "made-up.json"
    path.write_text(json.dumps({"version": "v2.0", "data": [article]}), encoding="utf-8")
    data = replace(config.data, cache_dir=str(folder), processes=1, columns={}, limit=None)
    one = World(0, 1, 0, torch.device("cpu"))
    return tasks.load_split(task, "train", str(path), replace(config, data=data), one)

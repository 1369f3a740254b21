"""Tasks: the one place where data meets models. A task makes batches and a loss, and evaluates."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from plainloop.data import features, squad, store
from plainloop.data.loader import SpanCollate, Steps
from plainloop.data.samplers import Sampler
from plainloop.data.squad import read_squad
from plainloop.data.store import Store
from plainloop.data.types import Example, InputError
from plainloop.models.cpu import speed_up_dropout
from plainloop.models.load import load_tokenizer
from plainloop.models.spans import SpanModel, load_span_model, position_limit, span_loss_sum
from plainloop.trainer.config import DataConfig, EvaluationConfig, ModelConfig
from plainloop.trainer.distributed import World
from plainloop.trainer.evaluate import decode, evaluate_spans, write_predictions


class SpanTask:
    """Extractive QA: windows of SQuAD-like data, an encoder with a start/end head."""

    loss_sum = staticmethod(span_loss_sum)

    def __init__(self, model: ModelConfig, data: DataConfig, world: World) -> None:
        self.model_config = model
        self.data = data
        self.world = world
        self.tokenizer = load_tokenizer(model.path)
        if self.tokenizer.cls_token_id is None:
            raise InputError(f"model.path {model.path}: its tokenizer has no CLS token; use an encoder's.")
        # Taken before it is used: a tokenizer that has truncated once says so in its description.
        description = json.loads(self.tokenizer.backend_tokenizer.to_str())
        self.tokenizer_digest = store.digest({**description, "truncation": None, "padding": None})
        features.question_limit(self.tokenizer, max_length=data.max_length, stride=data.stride)

    def prepare(self, path: str, *, limit: int | None = None) -> Store:
        """All ranks, outside any process group: rank 0 tokenises, once; the others wait."""
        folder = store.cache_folder(self.data.cache_dir) / f"spans-{self._digest(path, limit)}"
        if not self.world.is_main:
            return store.wait_for(folder)
        return store.build(folder, lambda: self._make(path, limit))

    def load_model(self, path: str, *, new_head: bool) -> SpanModel:
        """new_head: the start/end head may be missing and starts at random; else that is an error."""
        config = self.model_config
        model = load_span_model(
            path, new_head=new_head, dropout=config.dropout, attention_dropout=config.attention_dropout
        )
        limit = position_limit(model.network.config)
        if self.data.max_length > limit:
            raise InputError(f"data.max_length {self.data.max_length}: {path} has {limit} positions.")
        if config.activation_checkpointing:
            network = model.network  # transformers 5.2x gave the method a new name
            enable = getattr(
                network, "activation_checkpointing_enable", network.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})
        if self.world.device.type == "cpu":
            speed_up_dropout(model.network)
        return model

    def save_model(self, model: nn.Module, folder: Path) -> None:
        """Rank 0 only. What transformers' from_pretrained reads."""
        assert isinstance(model, SpanModel)
        model.network.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def steps(self, windows: Store, *, batch_size: int, seed: int, tokens: int) -> Steps:
        """This rank's share of every optimizer step; every window counts one."""
        sampler = Sampler(windows.lengths, batch_size, seed, self.data.bucket)
        ones = np.ones(len(windows), dtype=np.int64)
        collate, world = self.collate(windows), self.world
        return Steps(sampler, collate, ones, world_size=world.size, rank=world.rank, tokens=tokens)

    def collate(self, windows: Store) -> SpanCollate:
        segments = "token_type_ids" in self.tokenizer.model_input_names
        return SpanCollate(windows, self.tokenizer.pad_token_id, self.data.max_length, segments)

    def evaluate(
        self,
        model: nn.Module,
        windows: Store | None,
        path: str,
        *,
        precision: str,
        tokens: int,
        config: EvaluationConfig,
        folder: Path | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, float] | None:
        """All ranks. Metrics on rank 0 ({} elsewhere), predictions in folder; None when stopped half-way."""
        assert windows is not None
        decoded = decode(
            model, windows, self.collate(windows), span_loss_sum,
            world=self.world, precision=precision, tokens=tokens, config=config, should_stop=should_stop,
        )  # fmt: skip
        if decoded is None:
            return None
        examples = read_squad(path) if self.world.is_main else []
        result = evaluate_spans(decoded, examples, windows, config=config)
        if result is None:
            return {}
        metrics, predictions = result
        if folder is not None:
            try:
                write_predictions(folder, examples, predictions, metrics)
            except OSError as error:  # the figures are worth more than the files
                print(f"WARNING: {folder}: predictions not written: {error.strerror}", file=sys.stderr)
        return metrics

    def _digest(self, path: str, limit: int | None) -> str:
        """Of all that makes the features: data, tokenizer, options, and the code itself."""
        if not Path(path).exists():
            raise InputError(f"{path}: no such file. Give a SQuAD JSON file or a folder saved by datasets.")
        code = [Path(str(module.__file__)) for module in (squad, features, store)]
        options = [self.data.max_length, self.data.stride, limit, self.tokenizer.cls_token_id]
        return store.digest(Path(path), self.tokenizer_digest, options, *code)

    def _make(self, path: str, limit: int | None) -> tuple[features.Arrays, dict[str, Any]]:
        examples = read_squad(path)
        if limit is not None:
            examples = draw(examples, limit)
        arrays = features.span_windows(
            examples,
            self.tokenizer,
            max_length=self.data.max_length,
            stride=self.data.stride,
            processes=self.data.processes or len(os.sched_getaffinity(0)),
        )
        answered = np.zeros(len(examples), dtype=bool)
        answered[arrays["example"][arrays["label"][:, 0] != arrays["cls"]]] = True
        answerable = sum(bool(e.answers) for e in examples)
        meta = {
            "examples": len(examples),
            "unanswerable": len(examples) - answerable,
            "answers_cut": answerable - int(answered.sum()),
            "questions_cut": int(arrays.pop("capped").sum()),
        }
        return arrays, meta


def draw(examples: list[Example], limit: int) -> list[Example]:
    """A random subset in the original order, the same for every seed of training."""
    chosen = np.random.Generator(np.random.Philox(key=0)).permutation(len(examples))[:limit]
    return [examples[i] for i in sorted(chosen)]


def data_report(name: str, path: str, windows: Store, steps: Steps | None = None) -> str:
    """What there is to train or to evaluate on, in lines; warns of what was cut."""
    meta, lengths = windows.meta, windows.lengths
    line = (
        f"{name}: {path}: {meta['examples']} questions ({meta['unanswerable']} unanswerable) ->"
        f" {len(windows)} windows of {lengths.min()} to {lengths.max()} tokens,"
        f" median {int(np.median(lengths))}"
    )
    if steps is not None:
        line += f", {steps.sampler.steps_per_epoch} steps an epoch, {steps.padding_share():.1%} padding"
    lines = [line]
    if meta["answers_cut"]:
        lines.append(
            f"warning: {name}: {meta['answers_cut']} answers are whole in no window and count as no answer"
        )
    if meta["questions_cut"]:
        lines.append(
            f"warning: {name}: {meta['questions_cut']} questions are too long for a window and were cut"
        )
    return "\n".join(lines)

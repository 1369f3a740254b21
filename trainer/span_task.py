"""Task span: extractive question answering. Windows of SQuAD-like data, an encoder with a start/end head."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from plainloop.data import features, squad, store, tokenise
from plainloop.data.loader import SpanCollate, Steps
from plainloop.data.samplers import MULTIPLES, Sampler, Widths, few_widths, subset
from plainloop.data.squad import read_squad
from plainloop.data.store import Store
from plainloop.data.types import Example, InputError
from plainloop.models.cpu import speed_up_dropout
from plainloop.models.load import checkpoint_activations, load_tokenizer, save_network
from plainloop.models.spans import SpanModel, load_span_model, position_limit, span_loss_sum
from plainloop.trainer.checks import METRICS
from plainloop.trainer.config import DataConfig, EvaluationConfig, ModelConfig, TextConfig
from plainloop.trainer.distributed import World
from plainloop.trainer.evaluate import Interrupted, decode, evaluate_spans, write_predictions


class SpanTask:
    """See tasks.Task."""

    loss_sum = staticmethod(span_loss_sum)

    def __init__(self, model: ModelConfig, data: DataConfig, _: TextConfig, world: World) -> None:
        self.model_config = model
        self.data = data
        self.world = world
        self.dev_examples: list[Example] = []  # rank 0: read once, so that the file may move while training
        self.tokenizer = load_tokenizer(model.path)
        if self.tokenizer.cls_token_id is None:
            raise InputError(f"model.path {model.path}: its tokenizer has no CLS token; use an encoder's.")
        # Taken before it is used: a tokenizer that has truncated once says so in its description.
        description = json.loads(self.tokenizer.backend_tokenizer.to_str())
        self.tokenizer_digest = store.digest({**description, "truncation": None, "padding": None})
        features.question_limit(self.tokenizer, max_length=data.max_length, stride=data.stride)

    def prepare(self, part: str, path: str | Sequence[str], *, limit: int | None = None) -> Store:
        if not isinstance(path, str):
            raise InputError(f"{', '.join(path)}: a span model takes one file or folder.")
        folder = store.cache_folder(self.data.cache_dir) / f"spans-{self._digest(path, limit)}"
        if part == "dev" and self.world.is_main:
            self.dev_examples = read_squad(path)
        if self.world.is_main:
            rows = store.build(
                folder, lambda: self._make(self.dev_examples if part == "dev" else read_squad(path), limit)
            )
        else:
            rows = store.wait_for(folder)
        if part == "train":
            self.trained_on = (path, limit, rows)
        return rows

    def load_model(self, path: str, *, new_head: bool) -> SpanModel:
        config = self.model_config
        model = load_span_model(
            path, new_head=new_head, dropout=config.dropout, attention_dropout=config.attention_dropout
        )
        limit = position_limit(model.network.config)
        if self.data.max_length > limit:
            raise InputError(f"data.max_length {self.data.max_length}: {path} has {limit} positions.")
        if config.activation_checkpointing:
            checkpoint_activations(model.network)
        if self.world.device.type == "cpu":
            speed_up_dropout(model.network)
        return model

    def save_model(self, model: nn.Module, folder: Path, weights: dict[str, Tensor]) -> None:
        save_network(model.network, folder, weights)
        self.tokenizer.save_pretrained(folder)

    def steps(self, windows: Store, *, batch_size: int, seed: int, tokens: int) -> Steps:
        """Every window counts one."""
        sampler = Sampler(windows.lengths, batch_size, seed, self.data.bucket)
        ones = np.ones(len(windows), dtype=np.int64)
        widths = MULTIPLES
        if self.data.num_widths:
            widths = few_widths(windows.lengths, [self.data.num_widths], self.data.max_length)
        collate, world = self.collate(windows, widths), self.world
        return Steps(sampler, collate, ones, world_size=world.size, rank=world.rank, tokens=tokens)

    def collate(self, windows: Store, widths: Widths = MULTIPLES) -> SpanCollate:
        segments = "token_type_ids" in self.tokenizer.model_input_names
        return SpanCollate(windows, self.tokenizer.pad_token_id, self.data.max_length, segments, widths)

    def evaluate(
        self,
        model: nn.Module,
        rows: Store,
        *,
        name: str,
        precision: str,
        tokens: int,
        config: EvaluationConfig,
        folder: Path | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        training: bool = False,
        bootstrap: bool = False,
    ) -> dict[str, float] | None:
        windows, examples = rows, self.dev_examples
        try:
            decoded = decode(
                model, windows, self.collate(windows), span_loss_sum,
                world=self.world, precision=precision, tokens=tokens, config=config, should_stop=should_stop,
            )  # fmt: skip
        except Interrupted:
            return None
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
        code = [Path(str(module.__file__)) for module in (squad, features, tokenise, store)]
        options = [self.data.max_length, self.data.stride, limit, self.tokenizer.cls_token_id]
        return store.digest(Path(path), self.tokenizer_digest, options, *code)

    def record_ids(self, rows: np.ndarray) -> list[str]:
        path, limit, windows = self.trained_on
        examples = read_squad(path)
        kept = [examples[i] for i in subset(len(examples), limit)]
        return list(dict.fromkeys(kept[i].id for i in windows.arrays["example"][rows]))

    def metric_names(self) -> list[str]:
        return METRICS["span"]

    def report(self, part: str, rows: Store, precision: str) -> list[str]:
        meta, lengths = rows.meta, rows.lengths
        lines = [
            f"{meta['examples']} questions ({meta['unanswerable']} unanswerable) -> {len(rows)} windows of"
            f" {lengths.min()} to {lengths.max()} tokens, median {int(np.median(lengths))}"
        ]
        if meta["answers_cut"]:
            lines.append(
                f"warning: {meta['answers_cut']} answers are whole in no window and count as no answer"
            )
        if meta["questions_cut"]:
            lines.append(f"warning: {meta['questions_cut']} questions are too long for a window and were cut")
        return lines

    def _make(self, examples: list[Example], limit: int | None) -> tuple[features.Arrays, dict[str, Any]]:
        examples = [examples[i] for i in subset(len(examples), limit)]
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

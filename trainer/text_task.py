"""Task text: generative question answering with T5, UnifiedQA, BART and the like, on CausalQA or SQuAD."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from plainloop.data import causalqa, pairs, squad, store, tokenise
from plainloop.data.causalqa import TextOptions, data_files, is_squad, read_text, row_of_each_target
from plainloop.data.loader import Steps, TextCollate
from plainloop.data.samplers import MULTIPLES, Sampler, Widths, few_widths, subset
from plainloop.data.store import Store
from plainloop.data.types import Answer, Example, InputError, TextExample
from plainloop.models.cpu import speed_up_dropout
from plainloop.models.load import (
    OVERFLOWS_IN_FP16,
    checkpoint_activations,
    load_config,
    load_tokenizer,
    save_network,
)
from plainloop.models.position_bias import share_position_bias
from plainloop.models.seq2seq import (
    Seq2SeqModel,
    load_seq2seq_model,
    source_limit,
    start_token,
    token_loss_sum,
)
from plainloop.trainer.config import DataConfig, EvaluationConfig, ModelConfig, TextConfig
from plainloop.trainer.distributed import World
from plainloop.trainer.evaluate import Interrupted
from plainloop.trainer.generate import Setting, generate_texts, mean_loss, write_texts
from plainloop.trainer.metrics import causalqa_scores, squad_scores

MAX_NEW_TOKENS = {True: 32, False: 100}  # SQuAD's answers are short


class TextTask:
    """See tasks.Task."""

    def __init__(self, model: ModelConfig, data: DataConfig, text: TextConfig, world: World) -> None:
        self.model_config, self.data, self.text, self.world = model, data, text, world
        self.options = TextOptions(**{f.name: getattr(text, f.name) for f in dataclasses.fields(TextOptions)})
        self.tokenizer = load_tokenizer(model.path, fast=False)
        self.config = load_config(model.path)
        if not self.config.is_encoder_decoder:
            raise InputError(
                f"model.path {model.path}: a {self.config.model_type} is no encoder-decoder; task text wants"
                " T5, BART or the like (an encoder goes with --task span)."
            )
        self.start_token = start_token(self.config, model.path)
        limit = source_limit(self.config)
        for name in ("max_source_length", "max_target_length", "max_new_tokens"):
            if (getattr(text, name) or 0) > limit:
                raise InputError(f"text.{name} {getattr(text, name)}: {model.path} has {limit} positions.")
        # On rank 0: read once, so that the file may move while training.
        self.dev_examples: list[TextExample] = []
        self.squad = False  # the dev data is SQuAD's, and scored as such

    def loss_sum(self, logits: Tensor, labels: dict[str, Tensor]) -> Tensor:
        return token_loss_sum(logits, labels, label_smoothing=self.text.label_smoothing)

    def prepare(self, part: str, path: str | Sequence[str], *, limit: int | None = None) -> Store:
        files = data_files(path, {"train": "train", "dev": "valid"}[part], self.options)
        training = part == "train"
        if training:
            self._check_options(is_squad(files[0]))
        else:
            self.squad = is_squad(files[0])
        windows = self.text.stride if self.squad and not training else None
        digest = store.digest(
            *map(Path, files), self._tokenizer_files(), dataclasses.asdict(self.options),
            [self.text.max_source_length, self.text.max_target_length, windows, limit, training],
            *(Path(str(module.__file__)) for module in (causalqa, pairs, squad, tokenise, store)),
        )  # fmt: skip
        folder = store.cache_folder(self.data.cache_dir) / f"pairs-{digest}"
        if self.world.is_main:
            if not training:
                self.dev_examples = read_text(files, self.options)
            rows = store.build(
                folder,
                lambda: self._make(
                    read_text(files, self.options) if training else self.dev_examples,
                    limit,
                    windows,
                    training,
                ),
            )
        else:
            rows = store.wait_for(folder)
        if training:
            self.trained_on = (files, limit, rows)
        return rows

    def record_ids(self, rows: np.ndarray) -> list[str]:
        files, limit, built = self.trained_on
        examples = read_text(files, self.options)
        kept = row_of_each_target([examples[i] for i in subset(len(examples), limit)])
        return list(dict.fromkeys(kept[i].id for i in built.arrays["example"][rows]))

    def _check_options(self, squad: bool) -> None:
        """Options that this kind of training data would ignore in silence."""
        default = TextOptions()
        for name in ("target_column",) if squad else ("format", "null_target"):
            if getattr(self.options, name) != getattr(default, name):
                kind = "SQuAD" if squad else "CausalQA"
                raise InputError(f"text.{name} has no effect on {kind} data; leave it out.")

    def metric_names(self) -> list[str]:
        figures = squad_scores([Example("", "", "", answers) for answers in ((), (Answer("", 0),))], {})
        return [*(figures if self.squad else causalqa_scores([""], [[""]])), "loss"]

    def load_model(self, path: str, *, new_head: bool) -> Seq2SeqModel:
        model = load_seq2seq_model(path, dropout=self.model_config.dropout)
        if self.model_config.activation_checkpointing:
            checkpoint_activations(model.network)
        if self.world.device.type == "cpu":
            speed_up_dropout(model.network)
        else:
            share_position_bias(model.network)
        return model

    def save_model(self, model: nn.Module, folder: Path, weights: dict[str, Tensor]) -> None:
        save_network(model.network, folder, weights)
        self.tokenizer.save_pretrained(folder)

    def steps(self, rows: Store, *, batch_size: int, seed: int, tokens: int) -> Steps:
        """Every target token counts one."""
        count = np.asarray(rows.arrays["target_length"]).astype(np.int64)
        sampler = Sampler(np.stack([rows.lengths, count], axis=1), batch_size, seed, self.data.bucket)
        widths = MULTIPLES
        if self.data.num_widths:  # targets are short: two widths for them
            widths = few_widths(sampler.lengths, [self.data.num_widths, 2], source_limit(self.config))
        collate, world = self.collate(rows, widths), self.world
        return Steps(sampler, collate, count, world_size=world.size, rank=world.rank, tokens=tokens)

    def collate(self, rows: Store, widths: Widths = MULTIPLES) -> TextCollate:
        limit = source_limit(self.config)
        return TextCollate(rows, self.tokenizer.pad_token_id, self.start_token, limit, widths)

    def report(self, part: str, rows: Store, precision: str) -> list[str]:
        meta, source, target = rows.meta, rows.lengths, rows.arrays["target_length"]
        lines = [
            f"{meta['examples']} questions -> {len(rows)} rows of {source.min()} to {source.max()} tokens,"
            f" median {int(np.median(source))}; targets of {target.min()} to {target.max()},"
            f" median {int(np.median(target))}"
        ]
        if meta["contexts_cut"]:
            what = "became several windows" if self.squad and part == "dev" else "were cut"
            lines.append(
                f"warning: {meta['contexts_cut']} contexts are longer than text.max_source_length and {what}"
            )
        if meta["targets_cut"]:
            lines.append(
                f"warning: {meta['targets_cut']} targets are longer than text.max_target_length and were cut"
            )
        if precision == "fp16" and self.config.model_type in OVERFLOWS_IN_FP16:
            lines.append(
                f"warning: a {self.config.model_type} overflows in fp16; such steps are skipped and counted."
                " Use --precision bf16, or fp32"
            )
        return lines

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
        setting = Setting(self.world, precision, tokens, should_stop)
        owner, network = np.asarray(rows.arrays["example"]), cast(Seq2SeqModel, model)
        first = np.flatnonzero(np.diff(owner, prepend=-1))  # the loss is that of the first window, as trained
        nulls = self._nulls() if self.squad else set()
        chosen = subset(len(first), self.text.generate if training else None)
        length = self.text.max_new_tokens or MAX_NEW_TOKENS[self.squad]
        try:
            metrics = {"loss": mean_loss(network, rows, self.collate(rows), first, setting)}
            texts = generate_texts(
                network, rows, self.collate(rows), np.flatnonzero(np.isin(owner, chosen)), setting,
                decode=self._decode, nulls=nulls, max_new_tokens=length, num_beams=self.text.num_beams,
            )  # fmt: skip
        except Interrupted:
            return None
        if texts is None:
            return {}
        if len(chosen):
            examples = [self.dev_examples[i] for i in chosen]
            predictions = ["" if texts[int(i)] in nulls else texts[int(i)] for i in chosen]
            metrics = score_texts(examples, predictions, squad=self.squad, bootstrap=bootstrap) | metrics
            if folder is not None:
                ids = [example.id for example in examples]
                try:
                    write_texts(
                        folder, name=name, ids=ids, predictions=predictions, metrics=metrics, squad=self.squad
                    )
                except OSError as error:  # the figures are worth more than the files
                    print(f"WARNING: {folder}: predictions not written: {error.strerror}", file=sys.stderr)
        return metrics

    def _decode(self, ids: np.ndarray) -> list[str]:
        texts = self.tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _nulls(self) -> set[str]:
        """The null target, and what the vocabulary makes of it (`<no answer>` -> `no answer>`)."""
        null = self.options.null_target
        return {null.strip(), *self._decode(np.array(self.tokenizer(text_target=[null])["input_ids"]))}

    def _make(
        self, examples: list[TextExample], limit: int | None, windows: int | None, training: bool
    ) -> tuple[tokenise.Arrays, dict[str, Any]]:
        examples = [examples[i] for i in subset(len(examples), limit)]
        questions = len(examples)
        if training:
            examples = row_of_each_target(examples)
        arrays = pairs.pair_rows(
            examples,
            self.tokenizer,
            max_source_length=self.text.max_source_length,
            max_target_length=self.text.max_target_length,
            stride=windows,
            processes=self.data.processes or len(os.sched_getaffinity(0)),
        )
        meta = {
            "examples": questions,
            "contexts_cut": int(arrays.pop("cut").sum()),
            "targets_cut": int(arrays.pop("target_cut").sum()),
        }
        return arrays, meta

    def _tokenizer_files(self) -> dict[str, Any]:
        """What decides about ids, JSON-able, without what a use of the tokenizer leaves in it."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return {"class": type(self.tokenizer).__name__, "vocabulary": self.tokenizer.get_vocab()}
        return {**json.loads(backend.to_str()), "truncation": None, "padding": None}


def score_texts(
    examples: Sequence[TextExample], predictions: Sequence[str], *, squad: bool, bootstrap: bool = False
) -> dict[str, float]:
    """SQuAD's official figures (percent), or CausalQA's (fractions)."""
    if not squad:
        return causalqa_scores(predictions, [e.references for e in examples], bootstrap=bootstrap)
    golds = [Example(e.id, "", "", tuple(Answer(text, 0) for text in e.references)) for e in examples]
    return squad_scores(golds, {e.id: text for e, text in zip(examples, predictions, strict=True)})

"""Task text: generative question answering with T5, UnifiedQA, BART and the like, on CausalQA or SQuAD."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, cast

import numpy as np
from torch import Tensor, nn

from plainloop.data.loader import TextCollate
from plainloop.data.readers.causalqa import (
    TextExamples,
    TextOptions,
    data_files,
    is_causalqa,
    row_of_each_target,
)
from plainloop.data.readers.examples import require_use
from plainloop.data.samplers import subset
from plainloop.data.store import Store
from plainloop.data.text_features import pair_rows
from plainloop.data.types import Answer, Example, TextExample
from plainloop.models.families import input_limit, require_usable, target_limit
from plainloop.models.load import load_config, load_tokenizer
from plainloop.models.seq2seq import (
    Seq2SeqModel,
    load_seq2seq_model,
    start_token,
    token_loss_sum,
)
from plainloop.trainer.config.options import TrainConfig
from plainloop.trainer.errors import InputError
from plainloop.trainer.tasks.base import Dataset, Encoded
from plainloop.trainer.tasks.evaluation import EvaluationSettings, Scores, forward_rows
from plainloop.trainer.tasks.generation import generate_texts
from plainloop.trainer.tasks.metrics import (
    CAUSALQA_METRICS,
    SQUAD_METRICS,
    causalqa_scores,
    question_counts,
    squad_metrics,
    squad_scores,
)
from plainloop.trainer.tasks.normalize import SQUAD, Rules, metric_rules

MAX_NEW_TOKENS = {True: 32, False: 100}  # SQuAD's answers are short


class TextTask:
    """See base.Task."""

    uses: ClassVar[tuple[str, ...]] = ("text", "data.columns", "evaluation.metric", "evaluation.language")
    metric_names: ClassVar[tuple[str, ...]] = (*SQUAD_METRICS, *CAUSALQA_METRICS, "loss")
    feature_options: ClassVar[tuple[str, ...]] = (
        "text.format", "text.null_target", "text.target", "text.target_column", "text.max_source_length",
        "text.max_target_length", "text.stride", "data.columns",
    )  # fmt: skip

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.text, path = config, config.text, config.model.path
        names = [field.name for field in dataclasses.fields(TextOptions)]
        self.options = TextOptions(**{name: getattr(config.text, name) for name in names})
        self.tokenizer = load_tokenizer(path, fast=False)
        self.network_config = load_config(path)
        if not self.network_config.is_encoder_decoder:
            raise InputError(
                f"model.path {path}: a {self.network_config.model_type} is not an encoder-decoder; task text"
                " needs T5, BART or similar (use an encoder with --task span)."
            )
        require_usable(self.network_config, path)
        self.start_token = start_token(self.network_config, path)
        source, target = input_limit(self.network_config), target_limit(self.network_config)
        limits = {"max_source_length": source, "max_target_length": target, "max_new_tokens": target}
        for name, limit in limits.items():
            if (getattr(config.text, name) or 0) > limit:
                raise InputError(
                    f"text.{name} {getattr(config.text, name)}: {path} has only {limit} positions."
                )
        if config.text.generate == 0 and config.data.dev and config.evaluation.best_metric != "loss":
            raise InputError(
                "with text.generate 0, only the loss is computed: set evaluation.best_metric to loss"
            )

    def files(self, path: str | Sequence[str], split: str) -> list[str]:
        files = data_files(path, {"train": "train", "dev": "valid"}[split], self.options)
        causalqa = is_causalqa(files[0])
        if split == "train":
            self._require_effect(not causalqa)
            require_use(self.config.data.columns, files, "data.columns")
        elif causalqa and self.config.evaluation.metric != "squad":
            raise InputError("evaluation.metric has no effect on CausalQA data; leave it out.")
        return files

    def read(self, files: list[str]) -> TextExamples:
        return TextExamples(files, self.options, self.config.data.columns)

    def metrics(self, store: Store) -> list[str]:
        counts = store.meta["counts"]
        return [*(squad_metrics(counts) if counts["squad"] else CAUSALQA_METRICS), "loss"]

    def encode(self, examples: Sequence[TextExample], split: str) -> Encoded:
        training, squad = split == "train", examples[0].is_squad
        rows = row_of_each_target(examples) if training else examples
        windows = squad and not training  # an evaluation on SQuAD sees the whole context
        arrays = pair_rows(
            rows,
            self.tokenizer,
            max_source_length=self.text.max_source_length,
            max_target_length=self.text.max_target_length,
            stride=self.text.stride if windows else None,
        )
        if training:
            owner = np.repeat(np.arange(len(examples), dtype=np.int32), [len(e.targets) for e in examples])
            arrays["example"] = owner[arrays["example"]]
        done = "were split into windows" if windows else "were truncated"
        warnings = {
            f"contexts are longer than text.max_source_length and {done}": int(arrays.pop("cut").sum()),
            "targets are longer than text.max_target_length and were truncated": int(
                arrays.pop("target_cut").sum()
            ),
        }
        counts = question_counts(_as_squad(examples)) | {"squad": len(examples) * squad}
        return Encoded(arrays, counts, warnings)

    def collate(self, store: Store) -> TextCollate:
        limit = input_limit(self.network_config)
        return TextCollate(store, self.tokenizer.pad_token_id, self.start_token, limit)

    def load_model(self, path: str) -> Seq2SeqModel:
        options = self.config.model
        return load_seq2seq_model(path, dropout=options.dropout, attention=options.attention)

    def loss_sum(self, logits: Tensor, labels: dict[str, Tensor]) -> Tensor:
        return token_loss_sum(logits, labels, label_smoothing=self.text.label_smoothing)

    def evaluate(self, model: nn.Module, dataset: Dataset, settings: EvaluationSettings) -> Scores:
        store, network = dataset.store, cast(Seq2SeqModel, model)
        squad = bool(store.meta["counts"]["squad"])
        collate, owner = self.collate(store), np.asarray(store.arrays["example"])
        first = np.flatnonzero(np.diff(owner, prepend=-1))  # the loss is that of the first window, as trained
        loss, _ = forward_rows(model, store, collate, token_loss_sum, settings, rows=first, name="loss")
        chosen = subset(len(first), self.text.generate if settings.training else None)
        if not len(chosen):
            return Scores({"loss": loss})
        rows = np.flatnonzero(np.isin(owner, chosen))
        answers = self.generate(network, store, rows, settings)
        if answers is None:
            return Scores()
        examples = [dataset.examples[i] for i in chosen]
        predictions = [answers[int(i)][0] for i in chosen]
        rules = metric_rules(settings.options.metric, settings.options.language)
        scores = score_texts(examples, predictions, bootstrap=settings.bootstrap, rules=rules)
        metrics = scores | {"loss": loss}
        results = {"checkpoint": settings.name, "metrics": metrics, "predictions": predictions}
        files: dict[str, object] = {"results.json": results}
        if squad:
            files["predictions.json"] = {e.id: text for e, text in zip(examples, predictions, strict=True)}
        return Scores(metrics, files)

    def generate(
        self,
        model: Seq2SeqModel,
        store: Store,
        rows: np.ndarray,
        settings: EvaluationSettings,
        *,
        scored: bool = False,
    ) -> dict[int, tuple[str, float]] | None:
        """All ranks. See generate_texts; the null target becomes ""."""
        squad = bool(store.meta["counts"]["squad"])
        nulls = self._nulls() if squad else set()
        found = generate_texts(
            model,
            store,
            self.collate(store),
            rows,
            settings,
            decode=self._decode,
            nulls=nulls,
            max_new_tokens=self.text.max_new_tokens or MAX_NEW_TOKENS[squad],
            num_beams=self.text.num_beams,
            scored=scored,
        )
        if found is None:
            return None
        return {i: ("" if text in nulls else text, score) for i, (text, score) in found.items()}

    def _require_effect(self, squad: bool) -> None:
        """Raise InputError for options that this kind of training data would silently ignore."""
        default = TextOptions()
        for name in ("target_column",) if squad else ("format", "null_target"):
            if getattr(self.options, name) != getattr(default, name):
                kind = "SQuAD" if squad else "CausalQA"
                raise InputError(f"text.{name} has no effect on {kind} data; leave it out.")

    def _decode(self, ids: np.ndarray) -> list[str]:
        texts = self.tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _nulls(self) -> set[str]:
        """The null target, and what the vocabulary makes of it (`<no answer>` -> `no answer>`)."""
        null = self.options.null_target
        return {null.strip(), *self._decode(np.array(self.tokenizer(text_target=[null])["input_ids"]))}


def score_texts(
    examples: Sequence[TextExample],
    predictions: Sequence[str],
    *,
    bootstrap: bool = False,
    rules: Rules = SQUAD,
) -> dict[str, float]:
    """SQuAD's official metrics (percent; by these rules), or CausalQA's (fractions)."""
    if not examples[0].is_squad:
        return causalqa_scores(predictions, [e.references for e in examples], bootstrap=bootstrap)
    by_id = {e.id: text for e, text in zip(examples, predictions, strict=True)}
    return squad_scores(_as_squad(examples), by_id, rules=rules)


def _as_squad(examples: Sequence[TextExample]) -> list[Example]:
    return [Example(e.id, "", "", tuple(Answer(text, 0) for text in e.references)) for e in examples]

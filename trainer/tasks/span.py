"""Task span: extractive question answering. Windows of SQuAD-like data, an encoder with a start/end head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from plainloop.data.loader import EncoderCollate
from plainloop.data.readers.examples import Examples, ReadOptions, require_use
from plainloop.data.readers.files import find_files
from plainloop.data.span_answers import Spans, answers, best_spans
from plainloop.data.span_features import question_limit, span_windows
from plainloop.data.store import Store
from plainloop.data.types import Example
from plainloop.models.families import span_limit
from plainloop.models.load import load_tokenizer
from plainloop.models.spans import SpanModel, load_span_model, span_loss_sum, use_segments
from plainloop.trainer.config.options import EvaluationConfig, TrainConfig
from plainloop.trainer.errors import InputError
from plainloop.trainer.tasks.base import Dataset, Encoded
from plainloop.trainer.tasks.evaluation import EvaluationSettings, Scores, forward_rows
from plainloop.trainer.tasks.metrics import (
    SQUAD_METRICS,
    THRESHOLD_METRICS,
    question_counts,
    squad_metrics,
    squad_scores,
    threshold_metrics,
)
from plainloop.trainer.tasks.normalize import metric_rules


class SpanTask:
    """See base.Task."""

    uses: ClassVar[tuple[str, ...]] = (
        "model.attention_dropout", "data.max_length", "data.stride", "evaluation.max_answer_length",
        "evaluation.null_threshold", "evaluation.num_best", "evaluation.metric", "evaluation.language",
        "data.columns", "data.ambiguous",
    )  # fmt: skip
    metric_names: ClassVar[tuple[str, ...]] = (*SQUAD_METRICS, *THRESHOLD_METRICS, "loss")
    feature_options: ClassVar[tuple[str, ...]] = (
        "data.max_length", "data.stride", "data.columns", "data.ambiguous",
    )  # fmt: skip

    def __init__(self, config: TrainConfig) -> None:
        self.config, path = config, config.model.path
        self.tokenizer = load_tokenizer(path)
        self.segments = use_segments(path) and "token_type_ids" in self.tokenizer.model_input_names
        question_limit(self.tokenizer, max_length=config.data.max_length, stride=config.data.stride)

    def files(self, path: str | Sequence[str], split: str) -> list[str]:
        files = find_files(path, f"data.{split}")
        if split == "train":
            require_use(self.config.data.columns, files, "data.columns")
        return files

    def read(self, files: list[str]) -> Examples:
        data = self.config.data
        return Examples(files, ReadOptions(data.columns, data.ambiguous))

    def metrics(self, store: Store) -> list[str]:
        counts = store.meta["counts"]
        return [*squad_metrics(counts), *threshold_metrics(counts), "loss"]

    def encode(self, examples: Sequence[Example], split: str) -> Encoded:
        data = self.config.data
        arrays = span_windows(examples, self.tokenizer, max_length=data.max_length, stride=data.stride)
        answerable = np.array([bool(e.answers) for e in examples])
        found = np.zeros(len(examples), dtype=bool)
        found[arrays["example"][arrays["label"][:, 0] != arrays["cls"]]] = True
        where = "" if split == "train" else " in the loss"
        lost = int((answerable & ~found).sum())
        warnings = {
            f"answers do not fit into any window and count as no answer{where}": lost,
            "questions are too long for a window and were truncated": int(arrays.pop("capped").sum()),
        }
        return Encoded(arrays, question_counts(examples), warnings)

    def collate(self, store: Store) -> EncoderCollate:
        pad = self.tokenizer.pad_token_id or 0  # GPT-2 has none; any other will do, since it is masked
        return EncoderCollate(store, pad, self.config.data.max_length, self.segments)

    def load_model(self, path: str) -> SpanModel:
        options, length = self.config.model, self.config.data.max_length
        model = load_span_model(
            path, new_head=True, dropout=options.dropout, attention_dropout=options.attention_dropout,
            attention=options.attention,
        )  # fmt: skip
        if length > (limit := span_limit(model.network.config)):
            raise InputError(f"data.max_length {length}: {path} has only {limit} positions.")
        return model

    def loss_sum(self, logits: Tensor, labels: dict[str, Tensor]) -> Tensor:
        return span_loss_sum(logits, labels)

    def evaluate(self, model: nn.Module, dataset: Dataset, settings: EvaluationSettings) -> Scores:
        loss, spans = self.spans(model, dataset.store, settings)
        if spans is None:
            return Scores()
        scores = score_spans(spans, dataset.examples, dataset.store, settings.options, settings.temperature)
        return Scores(scores.metrics | {"loss": loss}, scores.files)

    def spans(
        self, model: nn.Module, store: Store, settings: EvaluationSettings
    ) -> tuple[float, Spans | None]:
        """All ranks. The loss, and on rank 0 the best spans of all windows."""
        options = settings.options

        def decode(logits: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
            length, num_best = options.max_answer_length, max(1, options.num_best)
            return best_spans(logits, rows, store, max_answer_length=length, num_best=num_best)._asdict()

        loss, spans = forward_rows(model, store, self.collate(store), span_loss_sum, settings, reduce=decode)
        return loss, None if spans is None else Spans(**spans)


def score_spans(
    spans: Spans,
    examples: Sequence[Example],
    store: Store,
    options: EvaluationConfig,
    temperature: float | None = None,
) -> Scores:
    """The official metrics of the best spans of all windows, and the files that the official script reads."""
    threshold, num_best = options.null_threshold, options.num_best
    predictions = answers(
        spans, examples, store, threshold=threshold, num_best=num_best, temperature=temperature
    )
    by_id = dict(zip((example.id for example in examples), predictions, strict=True))
    texts = {i: p.text for i, p in by_id.items()}
    odds = {i: p.score_diff for i, p in by_id.items()}
    files: dict[str, Any] = {"predictions.json": texts, "null_odds.json": odds}
    if options.num_best:
        files["nbest_predictions.json"] = {i: p.nbest for i, p in by_id.items()}
    best_texts = {i: p.best for i, p in by_id.items()}
    rules = metric_rules(options.metric, options.language)
    return Scores(squad_scores(examples, texts, score_diff=odds, best_texts=best_texts, rules=rules), files)

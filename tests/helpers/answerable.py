"""A task of your own: is this question answerable? Sequence classification on SQuAD 2.0 files.

plainloop train --task answerable:Answerable --evaluation.best_metric accuracy --model.path roberta-base ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from plainloop.data.errors import InputError
from plainloop.data.loader import EncoderCollate
from plainloop.data.readers.examples import read_examples
from plainloop.data.store import Store
from plainloop.data.types import IGNORE_INDEX, Example
from plainloop.models.load import load_network, load_tokenizer
from plainloop.trainer.config.options import TrainConfig
from plainloop.trainer.tasks.base import Dataset, Encoded
from plainloop.trainer.tasks.evaluation import EvaluationSettings, Scores, forward_rows

NEW = ("classifier", "pooler", "bert.pooler")  # parameters that a pretrained encoder may lack


class Classifier(nn.Module):
    """Returns logits (B, 2): unanswerable, answerable."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, **inputs: Tensor) -> Tensor:
        logits: Tensor = self.network(**inputs).logits
        return logits.float()


class Answerable:
    """See plainloop.trainer.tasks.base.Task. One row per question; a long context is truncated."""

    uses: ClassVar[tuple[str, ...]] = ("data.max_length",)
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "loss")
    feature_options: ClassVar[tuple[str, ...]] = ("data.max_length",)

    def __init__(self, config: TrainConfig) -> None:
        self.max_length = config.data.max_length
        self.tokenizer = load_tokenizer(config.model.path)

    def files(self, path: str | Sequence[str], split: str) -> list[str]:
        if not isinstance(path, str):
            raise InputError(f"data.{split}: give one SQuAD file.")
        return [path]

    def read(self, files: list[str]) -> list[Example]:
        return read_examples(files)

    def metrics(self, store: Store) -> list[str]:
        return list(self.metric_names) if len(store) else []

    def encode(self, examples: Sequence[Example], split: str) -> Encoded:
        pairs = [e.question for e in examples], [e.context for e in examples]
        encoded = self.tokenizer(*pairs, truncation="only_second", max_length=self.max_length)
        ids = encoded["input_ids"]
        segments = [np.append(np.array(e.type_ids), 1).argmax() for e in encoded.encodings]
        arrays = {
            "input_ids": np.concatenate(ids).astype(np.int32),
            "length": np.array([len(row) for row in ids], dtype=np.int32),
            "segment": np.array(segments, dtype=np.int32),
            "example": np.arange(len(examples), dtype=np.int32),
            "label": np.array([[bool(e.answers)] for e in examples], dtype=np.int32),
        }
        full = int((arrays["length"] == self.max_length).sum())
        return Encoded(arrays, warnings={f"{split} questions are as long as data.max_length": full})

    def collate(self, store: Store) -> EncoderCollate:
        segments, pad = "token_type_ids" in self.tokenizer.model_input_names, self.tokenizer.pad_token_id
        return EncoderCollate(store, pad, self.max_length, segments, labels=("answerable",))

    def load_model(self, path: str) -> Classifier:
        return Classifier(load_network(AutoModelForSequenceClassification, path, head=NEW, num_labels=2))

    def loss_sum(self, logits: Tensor, labels: dict[str, Tensor]) -> Tensor:
        target = labels["answerable"]
        return functional.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="sum")

    def evaluate(self, model: nn.Module, dataset: Dataset, settings: EvaluationSettings) -> Scores:
        store = dataset.store
        loss, found = forward_rows(
            model, store, self.collate(store), self.loss_sum, settings,
            reduce=lambda logits, rows: {"answerable": logits.argmax(axis=-1)},
        )  # fmt: skip
        if found is None:
            return Scores()
        said = {e.id: bool(a) for e, a in zip(dataset.examples, found["answerable"], strict=True)}
        right = [said[example.id] == bool(example.answers) for example in dataset.examples]
        return Scores({"accuracy": float(np.mean(right)), "loss": loss}, {"predictions.json": said})

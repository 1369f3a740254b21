"""Evaluation of a text-to-text model: the loss a target token, and texts, each example once."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plainloop.data.loader import Collate
from plainloop.data.samplers import deal
from plainloop.data.store import Store
from plainloop.models.seq2seq import Seq2SeqModel, generate, sequence_log_probs, token_loss_sum
from plainloop.trainer.checkpoint import write_atomically
from plainloop.trainer.distributed import World, gather_arrays, sum_over_ranks
from plainloop.trainer.evaluate import on_micro_batches
from plainloop.trainer.precision import autocast


@dataclass(frozen=True)
class Setting:
    """What both passes over the data share."""

    world: World
    precision: str
    tokens: int  # padded tokens of one batch
    should_stop: Callable[[], bool]


def mean_loss(
    model: Seq2SeqModel, store: Store, collate: Collate, rows: np.ndarray, setting: Setting
) -> float:
    """All ranks. Cross-entropy a target token over `rows`: whatever the batches and the number of ranks."""
    lengths = np.stack([store.lengths, store.arrays["target_length"]], axis=1)
    world = setting.world
    losses = [0.0]

    def add(rows: np.ndarray) -> None:
        inputs, labels = (_to(part, world.device) for part in collate(rows))
        with autocast(setting.precision, world.device):
            logits = model(**inputs)
        losses.append(token_loss_sum(logits, labels).item())

    micro_batches = deal(rows, lengths, world_size=world.size, tokens=setting.tokens)
    on_micro_batches(model, micro_batches, add, world=world, should_stop=setting.should_stop, name="loss")
    total = sum_over_ranks(torch.tensor(sum(losses), dtype=torch.float64)).item()
    return total / int(store.arrays["target_length"][rows].sum())


def generate_texts(
    model: Seq2SeqModel, store: Store, collate: Collate, rows: np.ndarray, setting: Setting, *,
    decode: Callable[[np.ndarray], Sequence[str]], nulls: Collection[str], max_new_tokens: int,
    num_beams: int,
) -> dict[int, str] | None:  # fmt: skip
    """All ranks; rank 0 gets example -> text, the others None. No collective before the end.

    Rows of similar length share a batch. Of an example with several windows the answer with the largest
    log-probability is taken (the earlier window of equals); one of `nulls` only when all windows say so: a
    window that does not hold the answer rightly says that there is none.
    """
    world, owner = setting.world, np.asarray(store.arrays["example"])
    several = np.bincount(owner)[owner] > 1
    texts: list[str] = []
    scores: list[float] = []
    done: list[np.ndarray] = []

    def add(rows: np.ndarray) -> None:
        inputs = _to(collate(rows).inputs, world.device)
        with autocast(setting.precision, world.device):
            ids = generate(model, inputs, max_new_tokens=max_new_tokens, num_beams=num_beams)
            need = several[rows].any()
            scored = sequence_log_probs(model, inputs, ids) if need else torch.zeros(len(rows))
        found, log_probs = decode(ids.cpu().numpy()), scored.tolist()
        texts.extend(found)
        scores.extend(log_probs)
        done.append(rows)

    # The decoder's cache grows to max_new_tokens a row and beam.
    lengths = np.stack([store.lengths, np.full(len(store), max_new_tokens)], axis=1)
    tokens = max(1, setting.tokens // num_beams)
    micro_batches = deal(rows, lengths, world_size=world.size, tokens=tokens)
    on_micro_batches(model, micro_batches, add, world=world, should_stop=setting.should_stop, name="generate")
    parts = gather_arrays(
        {
            "row": np.concatenate([np.zeros(0, dtype=np.int64), *done]),
            "text": np.array(texts, dtype=np.str_),
            "score": np.array(scores, dtype=np.float64),
        }
    )
    if parts is None:
        return None
    found = sorted(
        (int(row), str(text), float(score))
        for part in parts
        for row, text, score in zip(part["row"], part["text"], part["score"], strict=True)
    )
    if [row for row, _, _ in found] != rows.tolist():
        raise AssertionError(f"{len(found)} rows were generated, not each of {len(rows)} once")
    best: dict[int, tuple[bool, float, str]] = {}
    for row, text, score in found:
        example, answers = int(owner[row]), text not in nulls
        if example not in best or (answers, score) > best[example][:2]:
            best[example] = (answers, score, text)
    return {example: text for example, (_, _, text) in best.items()}


def write_texts(
    folder: Path,
    *,
    name: str,
    ids: Sequence[str],
    predictions: Sequence[str],
    metrics: dict[str, float],
    squad: bool,
) -> None:
    """Rank 0 only. results.json in the published form, metrics.json, and for SQuAD what its script reads."""
    files: dict[str, Any] = {
        "results.json": {"checkpoint": name, "metrics": metrics, "predictions": list(predictions)},
        "metrics.json": metrics,
    }
    if squad:
        files["predictions.json"] = dict(zip(ids, predictions, strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    for file, value in files.items():
        write_atomically(folder / file, json.dumps(value, indent=1, ensure_ascii=False))


def _to(tensors: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}

"""Evaluation of a span model: every window once, on some rank; scored once, on rank 0."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from plainloop.data.answers import Prediction, Spans, answers, best_spans
from plainloop.data.loader import Collate
from plainloop.data.samplers import deal
from plainloop.data.store import Store
from plainloop.data.types import Example
from plainloop.trainer.checkpoint import write_atomically
from plainloop.trainer.config import EvaluationConfig
from plainloop.trainer.distributed import World, gather_arrays, sum_over_ranks
from plainloop.trainer.errors import is_out_of_memory
from plainloop.trainer.metrics import squad_scores
from plainloop.trainer.precision import autocast


class Interrupted(Exception):
    """All ranks were asked to stop, half-way through an evaluation."""


def on_micro_batches(
    model: nn.Module,
    micro_batches: Sequence[Sequence[np.ndarray]],
    action: Callable[[np.ndarray], None],
    *,
    world: World,
    should_stop: Callable[[], bool],
    name: str,
) -> None:
    """All ranks. action(rows) for each micro-batch of this rank, in evaluation mode; no collective of its
    own. When memory runs out, the micro-batch is halved; so action must record nothing before it has all.

    micro_batches: of every rank. Raises Interrupted when should_stop() said so at a batch boundary: all
    ranks ask equally often, also one that has fewer micro-batches, and must get the same answer.
    """
    mine, was_training = micro_batches[world.rank], model.training
    model.eval()
    try:
        with torch.inference_mode(), _bar(name, sum(map(len, mine)), world) as bar:
            for i in range(max(map(len, micro_batches))):
                if should_stop():
                    raise Interrupted
                if i < len(mine):
                    halved(action, mine[i])
                    bar.update(len(mine[i]))
    finally:
        model.train(was_training)


def halved(action: Callable[[np.ndarray], None], rows: np.ndarray) -> None:
    """action(rows), or when memory runs out, action on one half of the rows after the other, and so on.

    Raises what `action` raises when a single row does not fit.
    """
    try:
        action(rows)
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(rows) == 1:
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(rows) // 2
    print(
        f"WARNING: an evaluation batch of {len(rows)} rows does not fit into memory; it is tried as {middle}"
        f" and {len(rows) - middle}. A lower tokens_per_device for evaluations avoids this.",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    for half in (rows[:middle], rows[middle:]):
        halved(action, half)


def decode(
    model: nn.Module,
    store: Store,
    collate: Collate,
    loss_sum: Callable[[Tensor, dict[str, Tensor]], Tensor],
    *,
    world: World,
    precision: str,
    tokens: int,
    config: EvaluationConfig,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Spans, float]:
    """All ranks. This rank's best spans and its sum of losses. Raises Interrupted."""
    micro_batches = deal(np.arange(len(store)), store.lengths, world_size=world.size, tokens=tokens)
    parts: list[Spans] = []
    losses = [0.0]

    def decode_rows(rows: np.ndarray) -> None:
        inputs, labels = (
            {name: tensor.to(world.device) for name, tensor in part.items()} for part in collate(rows)
        )
        with autocast(precision, world.device):
            logits = model(**inputs)
        loss = loss_sum(logits, labels).item()
        parts.append(decode_logits(logits.float().cpu().numpy(), rows, store, config))
        losses.append(loss)

    on_micro_batches(model, micro_batches, decode_rows, world=world, should_stop=should_stop, name="evaluate")
    if not parts:  # more ranks than micro-batches
        return decode_logits(
            np.zeros((0, 1, 2), dtype=np.float32), np.zeros(0, dtype=np.int64), store, config
        ), 0.0
    width = max(part.score.shape[1] for part in parts)
    padded = [
        Spans(p.row, p.null, *(_widen(a, width) for a in (p.score, p.char_start, p.char_end))) for p in parts
    ]
    return Spans(*(np.concatenate(arrays) for arrays in zip(*padded, strict=True))), sum(losses)


def evaluate_spans(
    decoded: tuple[Spans, float],
    examples: Sequence[Example],
    store: Store,
    *,
    config: EvaluationConfig,
) -> tuple[dict[str, float], list[Prediction]] | None:
    """All ranks. Gather every rank's spans; rank 0 returns (metrics, predictions), the others None."""
    spans, loss = decoded
    total_loss = sum_over_ranks(torch.tensor(loss, dtype=torch.float64)).item()
    parts = gather_arrays(spans._asdict())
    if parts is None:
        return None
    width = max(part["score"].shape[1] for part in parts)
    merged = Spans(*(np.concatenate([_widen(part[name], width) for part in parts]) for name in Spans._fields))
    predictions = answers(merged, examples, store, threshold=config.null_threshold, num_best=config.num_best)
    ids = [example.id for example in examples]
    metrics = squad_scores(
        examples,
        {i: p.text for i, p in zip(ids, predictions, strict=True)},
        score_diff={i: p.score_diff for i, p in zip(ids, predictions, strict=True)},
        best_texts={i: p.best for i, p in zip(ids, predictions, strict=True)},
    )
    return metrics | {"loss": total_loss / len(store)}, predictions


def write_predictions(
    folder: Path, examples: Sequence[Example], predictions: Sequence[Prediction], metrics: dict[str, float]
) -> None:
    """Rank 0 only. The files that the official script reads, and the metrics. Raises OSError."""
    files: dict[str, Any] = {
        "predictions.json": {e.id: p.text for e, p in zip(examples, predictions, strict=True)},
        "null_odds.json": {e.id: p.score_diff for e, p in zip(examples, predictions, strict=True)},
        "metrics.json": metrics,
    }
    if predictions and predictions[0].nbest:
        files["nbest_predictions.json"] = {e.id: p.nbest for e, p in zip(examples, predictions, strict=True)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        write_atomically(folder / name, json.dumps(value, indent=1, ensure_ascii=False))


def decode_logits(logits: np.ndarray, rows: np.ndarray, store: Store, config: EvaluationConfig) -> Spans:
    """Best spans of one batch: (B, L, 2) fp32 -> Spans."""
    return best_spans(
        logits,
        rows,
        store,
        max_answer_length=config.max_answer_length,
        num_best=max(1, config.num_best),
    )


def _widen(array: np.ndarray, width: int) -> np.ndarray:
    """(B, K) -> (B, width): short windows have fewer spans than the n-best list asks for. (B,) stays."""
    if array.ndim == 1 or array.shape[1] == width:
        return array
    fill = -np.inf if array.dtype.kind == "f" else 0
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)


def _bar(name: str, total: int, world: World) -> tqdm[Any]:
    return tqdm(
        total=total,
        desc=name,
        unit="rows",
        delay=2,
        mininterval=1,
        disable=None if world.is_main else True,
        leave=False,
    )

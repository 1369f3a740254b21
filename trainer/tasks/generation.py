"""Generate texts on all ranks, each example once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch

from plainloop.data.loader import Collate
from plainloop.data.samplers import shard_evaluation
from plainloop.data.store import Store
from plainloop.models.seq2seq import Seq2SeqModel, generate, sequence_log_probs
from plainloop.trainer.precision import autocast
from plainloop.trainer.tasks.evaluation import EvaluationSettings, gather_rows, on_micro_batches, to_device


def generate_texts(
    model: Seq2SeqModel,
    store: Store,
    collate: Collate,
    rows: np.ndarray,
    settings: EvaluationSettings,
    *,
    decode: Callable[[np.ndarray], Sequence[str]],
    nulls: Collection[str],
    max_new_tokens: int,
    num_beams: int,
    scored: bool = False,
) -> dict[int, tuple[str, float]] | None:
    """All ranks. Generate a text per example; rank 0 returns example -> (text, log-probability), others None.
    Without `scored`, the log-probability is only computed where it decides between windows, and else 0.

    Rows of similar length share a batch; no collective before the end. If an example has several windows, the
    answer with the highest log-probability wins (ties: the earlier window), and one of `nulls` only if all
    windows give one: a window without the answer is right to say that there is none. Raises Interrupted.
    """
    world, owner = settings.world, np.asarray(store.arrays["example"])
    several = np.bincount(owner)[owner] > 1
    parts: list[dict[str, np.ndarray]] = []

    def run(part: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = to_device(collate(part).inputs, world.device)
        with autocast(settings.precision, world.device):
            ids = generate(
                model, inputs, max_new_tokens=max_new_tokens, num_beams=num_beams, lockstep=settings.lockstep
            )
            need = scored or several[rows if settings.lockstep else part].any()  # the same on all ranks
            return ids, sequence_log_probs(model, inputs, ids) if need else torch.zeros(len(part))

    def generate_part(part: np.ndarray) -> None:
        ids, scores = run(part)
        texts = np.array(decode(ids.cpu().numpy()), dtype=np.str_)
        parts.append({"row": part, "text": texts, "score": np.array(scores.tolist(), dtype=np.float64)})

    # The decoder's cache grows to max_new_tokens per row and beam.
    lengths = np.stack([store.lengths, np.full(len(store), max_new_tokens)], axis=1)
    max_tokens = max(1, settings.max_tokens // num_beams)
    micro_batches = shard_evaluation(rows, lengths, world_size=world.size, max_tokens=max_tokens)
    on_micro_batches(model, micro_batches, generate_part, settings, name="generate", idle=run)
    found = gather_rows(parts, rows)
    return None if found is None else best_of_windows(owner[rows], found["text"], found["score"], nulls)


def best_of_windows(
    owner: np.ndarray, texts: np.ndarray, scores: np.ndarray, nulls: Collection[str]
) -> dict[int, tuple[str, float]]:
    """Choose a text per example: an answer beats a null, then the higher score, then the earlier window."""
    best: dict[int, tuple[bool, float, str]] = {}
    for example, text, score in zip(owner.tolist(), texts.tolist(), scores.tolist(), strict=True):
        answered = text not in nulls
        if example not in best or (answered, score) > best[example][:2]:
            best[example] = (answered, score, text)
    return {example: (text, score) for example, (_, score, text) in best.items()}

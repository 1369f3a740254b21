"""Decode and score the whole dev set: python tests/bench/decode.py [NUM_BEST].

Needs PLAINLOOP_REAL_DATA.

12,134 windows of synthetic logits: our evaluation compared with the n-best loop over single examples that is
common in example scripts (top 20 starts x top 20 ends in Python). Also the start-up time of --help.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import setup


def loop_over_examples(logits: list[np.ndarray], store: Any, examples: list[Any]) -> dict[str, str]:
    """The common way: sort all pairs of the 20 best starts and ends; softmax over the 20 best texts."""
    predictions = {}
    windows_of: dict[int, list[int]] = {}
    for window, owner in enumerate(store.arrays["example"]):
        windows_of.setdefault(int(owner), []).append(window)
    for number, example in enumerate(examples):
        null, candidates = np.inf, []
        for window in windows_of[number]:
            start, end = logits[window][:, 0], logits[window][:, 1]
            low, high = store.arrays["context"][window]
            offsets = store.row("offsets", window)
            null = min(null, start[0] + end[0])
            for i in np.argsort(start)[-1:-21:-1].tolist():
                for j in np.argsort(end)[-1:-21:-1].tolist():
                    if i < low or j >= high or j < i or j - i + 1 > 30:
                        continue
                    candidates.append({"offsets": (offsets[i][0], offsets[j][1]), "score": start[i] + end[j]})
        best = sorted(candidates, key=lambda c: c["score"], reverse=True)[:20]
        texts = [example.context[c["offsets"][0] : c["offsets"][1]] for c in best] or [""]
        scores = np.array([c["score"] for c in best] or [0.0])
        weights = np.exp(scores - scores.max())
        list(zip(texts, weights / weights.sum(), strict=True))  # the contents of the n-best file
        predictions[example.id] = "" if null > scores[0] else texts[0]
    return predictions


def synthetic_logits(random: np.random.Generator, windows: int, length: int) -> np.ndarray:
    """(B, L, 2): noise plus, as from a trained model, one likely position in each window."""
    centre = random.integers(10, max(11, length - 10), size=(windows, 1))
    hill = 6 * np.exp(-(((np.arange(length) - centre) / 8) ** 2) / 2)
    return (random.normal(size=(windows, length, 2)) + hill[:, :, None]).astype(np.float32)


def main() -> None:
    from plainloop.data.readers.examples import read_examples
    from plainloop.data.samplers import shard_evaluation
    from plainloop.data.span_answers import Spans, best_spans
    from plainloop.trainer.config.options import EvaluationConfig
    from plainloop.trainer.tasks.metrics import normalize_answer, squad_scores
    from plainloop.trainer.tasks.span import score_spans

    path = str(Path(os.environ["PLAINLOOP_REAL_DATA"]) / "squad2/dev-v2.0.full-rebuilt.json")
    if "TINY" in os.environ:  # smoke test: a small file
        path = str(Path(os.environ["PLAINLOOP_REAL_DATA"]) / "xquad/xquad.en.json")
    examples = read_examples(path)
    with tempfile.TemporaryDirectory() as cache:
        store = setup(cache, file=path, split="dev", limit=None).data.store
        random = np.random.default_rng(0)
        batches = shard_evaluation(np.arange(len(store)), store.lengths, world_size=1, max_tokens=8192)[0]
        padded = [synthetic_logits(random, len(rows), int(store.lengths[rows].max())) for rows in batches]
        alone: list[Any] = [None] * len(store)
        for rows, block in zip(batches, padded, strict=True):
            for row, logits in zip(rows, block, strict=True):
                alone[row] = logits[: store.lengths[row]]
        config = EvaluationConfig(num_best=int(sys.argv[1]) if sys.argv[1:] else 0)
        seconds: dict[str, list[float]] = {"ours": [], "loop": []}
        for _ in range(3):
            normalize_answer.cache_clear()
            started = time.perf_counter()
            parts = [
                best_spans(block, rows, store, num_best=max(1, config.num_best))
                for rows, block in zip(batches, padded, strict=True)
            ]
            spans = Spans(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
            result = score_spans(spans, examples, store, config)
            seconds["ours"].append(time.perf_counter() - started)
            normalize_answer.cache_clear()
            started = time.perf_counter()
            predictions = loop_over_examples(alone, store, examples)
            squad_scores(examples, predictions)
            seconds["loop"].append(time.perf_counter() - started)
        assert len(result.files["predictions.json"]) == len(examples)
        ours, loop = (statistics.median(seconds[name]) for name in ("ours", "loop"))
        print(f"{len(store)} windows, decoded and scored: ours {ours:.2f} s (target 1.5), loop {loop:.2f} s")
        print(f"ratio {loop / ours:.1f} (target 10)")
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "plainloop.trainer", "--help"], stdout=subprocess.DEVNULL, check=True
        )
        times.append(time.perf_counter() - started)
    print(f"plainloop --help: {statistics.median(times):.2f} s (target 0.5)")


if __name__ == "__main__":
    main()

"""Decoding and scoring of the whole dev set: python tests/bench/decode.py (needs PLAINLOOP_REAL_DATA).

12,134 windows of synthetic logits through our evaluation, against the n-best loop over single examples that
is common in example scripts (top 20 starts x top 20 ends in Python). And the start-up time of --help.
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


def loop_over_examples(logits: list[np.ndarray], store: Any, examples: list[Any]) -> dict[str, str]:
    """The common way, one window and one pair of positions at a time."""
    predictions = {}
    windows_of: dict[int, list[int]] = {}
    for window, owner in enumerate(store.arrays["example"]):
        windows_of.setdefault(int(owner), []).append(window)
    for number, example in enumerate(examples):
        null, best, text = np.inf, -np.inf, ""
        for window in windows_of[number]:
            start, end = logits[window][:, 0], logits[window][:, 1]
            low, high = store.arrays["context"][window]
            offsets = store.row("offsets", window)
            null = min(null, start[0] + end[0])
            for i in np.argsort(start)[-1:-21:-1].tolist():
                for j in np.argsort(end)[-1:-21:-1].tolist():
                    if i < low or j >= high or j < i or j - i + 1 > 30:
                        continue
                    if start[i] + end[j] > best:
                        best, text = start[i] + end[j], example.context[offsets[i][0] : offsets[j][1]]
        predictions[example.id] = "" if null > best else text
    return predictions


def main() -> None:
    from plainloop.data.answers import Spans
    from plainloop.data.samplers import deal
    from plainloop.data.squad import read_squad
    from plainloop.trainer.config import DataConfig, EvaluationConfig, ModelConfig
    from plainloop.trainer.demo import packaged_encoder
    from plainloop.trainer.distributed import world_from_env
    from plainloop.trainer.evaluate import decode_logits, evaluate_spans
    from plainloop.trainer.metrics import normalize_answer, squad_scores
    from plainloop.trainer.tasks import SpanTask

    path = str(Path(os.environ["PLAINLOOP_REAL_DATA"]) / "squad2/dev-v2.0.full-rebuilt.json")
    examples = read_squad(path)
    with tempfile.TemporaryDirectory() as cache:
        model = ModelConfig(path=packaged_encoder())
        store = SpanTask(model, DataConfig(cache_dir=cache), world_from_env("cpu")).prepare(path)
        random = np.random.default_rng(0)
        batches = deal(np.arange(len(store)), store.lengths, world_size=1, tokens=8192)[0]
        padded = [
            random.normal(size=(len(rows), int(store.lengths[rows].max()), 2)).astype(np.float32)
            for rows in batches
        ]
        alone: list[Any] = [None] * len(store)
        for rows, block in zip(batches, padded, strict=True):
            for row, logits in zip(rows, block, strict=True):
                alone[row] = logits[: store.lengths[row]]
        config = EvaluationConfig()
        seconds: dict[str, list[float]] = {"ours": [], "loop": []}
        for _ in range(3):
            normalize_answer.cache_clear()
            started = time.perf_counter()
            parts = [
                decode_logits(block, rows, store, config) for rows, block in zip(batches, padded, strict=True)
            ]
            spans = Spans(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
            result = evaluate_spans((spans, 0.0), examples, store, config=config)
            seconds["ours"].append(time.perf_counter() - started)
            normalize_answer.cache_clear()
            started = time.perf_counter()
            predictions = loop_over_examples(alone, store, examples)
            squad_scores(examples, predictions)
            seconds["loop"].append(time.perf_counter() - started)
        assert result is not None
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

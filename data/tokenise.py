"""Run a tokenising job over chunks of examples, in several processes, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from plainloop.data.processes import end_with_parent

CHUNK = 256  # examples per tokenizer call
MIN_EXAMPLES_FOR_PROCESSES = 2000  # below that, starting processes costs more than it saves

Arrays = dict[str, np.ndarray]
Job = Callable[[Sequence[Any]], Arrays]  # examples -> arrays, to be joined along their first axis

_job: Job | None = None  # in a worker process: inherited by fork, so that nothing is pickled


def tokenise(job: Job, examples: Sequence[Any], processes: int) -> Arrays:
    """Run the job over all examples and return its arrays, in order."""
    chunks = [examples[i : i + CHUNK] for i in range(0, len(examples), CHUNK)]
    with tqdm(total=len(examples), desc="tokenise", unit="q", delay=2, mininterval=1) as bar:
        parts = []
        several = processes > 1 and len(examples) >= MIN_EXAMPLES_FOR_PROCESSES
        for chunk, part in zip(
            chunks, _fork(job, chunks, processes) if several else map(job, chunks), strict=True
        ):
            parts.append(part)
            bar.update(len(chunk))
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _fork(job: Job, chunks: Sequence[Sequence[Any]], processes: int) -> Iterator[Arrays]:
    global _job
    _job = job
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process: processes run in parallel
    try:
        with multiprocessing.get_context("fork").Pool(processes, end_with_parent) as pool:
            yield from pool.imap(_run, chunks)
    finally:
        _job = None
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _run(examples: Sequence[Any]) -> Arrays:
    assert _job is not None
    try:
        return _job(examples)
    except BaseException as error:  # a Rust panic is not an Exception and would hang the pool
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise RuntimeError(
            f"the tokenizer failed in the chunk that starts with id {examples[0].id!r}: {error}"
        ) from None

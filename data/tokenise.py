"""Run a job over chunks of examples, in several processes, in bounded memory, with a progress bar."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from tqdm import tqdm

from plainloop.data.errors import InputError
from plainloop.data.processes import end_with_parent

CHUNK = 256  # examples per tokenizer call
MIN_EXAMPLES_FOR_PROCESSES = 2000  # below that, starting processes costs more than it saves

Arrays = dict[str, np.ndarray]
Job = Callable[[Sequence[Any]], Any]

_job: Job | None = None  # in a worker process: inherited by fork, so that nothing is pickled


def in_chunks(job: Job, examples: Iterable[Any], processes: int) -> Iterator[tuple[int, Any]]:
    """Yield (number of examples, job(examples)) of each chunk of examples, in order.

    A few chunks per process are in memory at a time, so that examples may be a stream of any length.
    """
    total = len(examples) if isinstance(examples, Sequence) else None
    stream = iter(examples)
    first = list(itertools.islice(stream, MIN_EXAMPLES_FOR_PROCESSES))
    several = processes > 1 and len(first) == MIN_EXAMPLES_FOR_PROCESSES
    chunks = _chunks(itertools.chain(first, stream))
    with tqdm(total=total, desc="tokenise", unit="q", delay=2, mininterval=1) as bar:
        results = _fork(job, chunks, processes) if several else ((len(c), job(c)) for c in chunks)
        for count, result in results:
            yield count, result
            bar.update(count)


def _chunks(examples: Iterator[Any]) -> Iterator[list[Any]]:
    while chunk := list(itertools.islice(examples, CHUNK)):
        yield chunk


def _fork(job: Job, chunks: Iterator[list[Any]], processes: int) -> Iterator[tuple[int, Any]]:
    global _job
    _job = job
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process: processes run in parallel
    pending: deque[tuple[int, Future[Any]]] = deque()
    try:
        # Not multiprocessing.Pool: it hangs when a worker is killed, or ignores its SIGTERM as a run does.
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(processes, context, initializer=end_with_parent) as pool:
            for chunk in chunks:
                pending.append((len(chunk), pool.submit(_run, chunk)))
                if len(pending) > 2 * processes:
                    count, future = pending.popleft()
                    yield count, future.result()
            for count, future in pending:
                yield count, future.result()
    except BrokenProcessPool:
        raise InputError(
            "a tokenising process was killed, perhaps because memory ran out; lower --data.processes."
        ) from None
    finally:
        _job = None
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _run(examples: Sequence[Any]) -> Any:
    assert _job is not None
    try:
        return _job(examples)
    except InputError:
        raise
    except BaseException as error:  # a Rust panic is not an Exception and would hang the pool
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise RuntimeError(
            f"the tokenizer failed in the chunk that starts with id {examples[0].id!r}: {error}"
        ) from None

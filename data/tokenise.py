"""Run a job over chunks of examples, in several processes, in bounded memory, with a progress bar."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from plainloop.data.errors import InputError
from plainloop.data.processes import end_with_parent

CHUNK = 256  # examples per tokenizer call
MIN_EXAMPLES_FOR_PROCESSES = 2000  # below that, starting processes costs more than it saves

Arrays = dict[str, np.ndarray]
Job = Callable[[Sequence[Any]], Any]


def in_chunks(
    job: Job, examples: Iterable[Any], processes: int, *, quiet: bool = False
) -> Iterator[tuple[int, Any]]:
    """Yield (number of examples, job(examples)) of each chunk of examples, in order.

    A few chunks per process are in memory at a time, so that examples may be a stream of any length.
    """
    total = len(examples) if isinstance(examples, Sequence) else None
    stream = iter(examples)
    first = list(itertools.islice(stream, MIN_EXAMPLES_FOR_PROCESSES))
    several = processes > 1 and len(first) == MIN_EXAMPLES_FOR_PROCESSES
    chunks = _chunks(itertools.chain(first, stream))
    with tqdm(total=total, desc="tokenise", unit="q", delay=2, mininterval=1, disable=quiet) as bar:
        results = _fork(job, chunks, processes) if several else ((len(c), job(c)) for c in chunks)
        for count, result in results:
            yield count, result
            bar.update(count)


def _chunks(examples: Iterator[Any]) -> Iterator[list[Any]]:
    while chunk := list(itertools.islice(examples, CHUNK)):
        yield chunk


def _fork(job: Job, chunks: Iterator[list[Any]], processes: int) -> Iterator[tuple[int, Any]]:
    """Processes take turns, and each has one chunk at a time: results come in order, and no pipe fills up."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process: processes run in parallel
    workers: list[_Worker] = []
    turn = 0
    try:
        workers += [_Worker(job) for _ in range(processes)]
        for number, chunk in enumerate(chunks):
            worker = workers[number % processes]
            if worker.pending:
                yield worker.receive()
            worker.send(chunk)
            turn = (number + 1) % processes
        for worker in workers[turn:] + workers[:turn]:
            if worker.pending:
                yield worker.receive()
    finally:
        for worker in workers:
            worker.kill()
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


class _Worker:
    """A forked process and a pipe that only the two of them hold.

    Not a pool of the standard library: those hang when a process is killed while it writes a result, or when
    it ignores their SIGTERM, as the processes of a run do.
    """

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(job, other, os.getpid()), daemon=True)
        self._process.start()
        other.close()  # so that the process holds the only copy: when it dies, receive() sees the end
        self.pending = 0

    def send(self, chunk: list[Any]) -> None:
        with _death_as_error():
            self._pipe.send(chunk)
        self.pending = len(chunk)

    def receive(self) -> tuple[int, Any]:
        with _death_as_error():
            result = self._pipe.recv()
        count, self.pending = self.pending, 0
        if isinstance(result, Exception):
            raise result
        return count, result

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


@contextlib.contextmanager
def _death_as_error() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError):
        raise InputError(
            "a tokenising process was killed, perhaps because memory ran out; lower --data.processes."
        ) from None


def _serve(job: Job, pipe: Any, parent: int) -> None:
    """In the process: answer chunks until the parent kills it. With the parent dead, the kernel does."""
    end_with_parent(parent=parent)
    while True:
        chunk = pipe.recv()
        try:
            result = job(chunk)
        except InputError as error:
            result = error
        except BaseException as error:  # a Rust panic is not an Exception
            where = f"the tokenizer failed in the chunk that starts with id {chunk[0].id!r}"
            result = RuntimeError(f"{where}: {error}")
        pipe.send(result)

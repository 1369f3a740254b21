"""What a task is, and what all tasks share: cached features, steps, loading, saving, evaluation."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from torch import Tensor, nn

from plainloop.data import store as stores
from plainloop.data.loader import Collate, Steps
from plainloop.data.samplers import Sampler, few_widths, subset
from plainloop.data.store import FEATURES_VERSION, Store
from plainloop.data.tokenise import in_chunks
from plainloop.trainer.config.options import TrainConfig
from plainloop.trainer.config.parse import flatten
from plainloop.trainer.config.validate import FREE_ON_RESUME
from plainloop.trainer.distributed.world import World
from plainloop.trainer.errors import InputError
from plainloop.trainer.tasks.evaluation import EvaluationSettings, Interrupted, Scores


class Encoded(NamedTuple):
    """Features of some examples. arrays: `length` (N,) of the rows, `example` (N,), the index of each row's
    example, and flat arrays such as `input_ids` (see Store). counts: summed over all examples, and kept as
    store.meta["counts"]. warnings: what was truncated or dropped, and how often; they go to the log.
    """

    arrays: dict[str, np.ndarray]
    counts: dict[str, int] = {}
    warnings: dict[str, int] = {}


@dataclass(frozen=True)
class Dataset:
    """A split. store: features, on all ranks. examples: of split dev on rank 0, in file order; else empty."""

    files: list[str]
    limit: int | None
    store: Store
    examples: Sequence[Any] = field(default=(), repr=False)


class Task(Protocol):
    """What a row is, which network reads it, what the loss is, and how predictions are scored.

    A task knows nothing of ranks, devices, caches and checkpoints. Each rank makes its own from the config;
    __init__ loads the tokenizer and raises InputError if it does not suit.
    """

    uses: ClassVar[tuple[str, ...]]  # those of config.validate.TASK_OPTIONS that this task uses
    metric_names: ClassVar[tuple[str, ...]]  # of all that `evaluate` may return
    feature_options: ClassVar[tuple[str, ...]]  # dotted names of the options that `encode` depends on
    tokenizer: Any

    def __init__(self, config: TrainConfig) -> None: ...

    def files(self, path: str | Sequence[str], split: str) -> list[str]:
        """Resolve data.train or data.dev to files or folders. split: "train" or "dev". Raises InputError."""

    def read(self, files: list[str]) -> Iterable[Any]:
        """Read the examples, each with an `id`; a stream will do. Its `notes`, if any, go to the log.
        Raises InputError for a bad record.
        """

    def metrics(self, store: Store) -> list[str]:
        """Those of metric_names that `evaluate` returns for this data."""

    def encode(self, examples: Sequence[Any], split: str) -> Encoded:
        """Tokenise some of the examples, in any of several processes. Rows of one example are adjacent."""

    def collate(self, store: Store) -> Collate:
        """Make batches of rows: the inputs of the network and the labels of the loss."""

    def load_model(self, path: str) -> nn.Module:
        """Load a module whose `network` comes from models.load.load_network. Its head may be new."""

    def loss_sum(self, logits: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """Sum of the losses of a micro-batch, an fp32 scalar. A label of -100 counts for nothing."""

    def evaluate(self, model: nn.Module, dataset: Dataset, settings: EvaluationSettings) -> Scores:
        """All ranks. Score every example once; only rank 0's Scores are not empty. Raises Interrupted."""


def load_split(
    task: Task,
    split: str,
    path: str | Sequence[str],
    config: TrainConfig,
    world: World,
    *,
    limit: int | None = None,
) -> Dataset:
    """All ranks, outside any process group: rank 0 tokenises into the cache, the others wait for it.

    limit: use a random subset of this size, the same for every seed. Raises InputError.
    """
    if not hasattr(task, "tokenizer"):
        raise InputError(f"task {config.task}: __init__ must set self.tokenizer.")
    files = task.files(path, split)
    folder = stores.cache_folder(config.data.cache_dir) / _store_name(task, split, files, config, limit)
    if not world.is_main:
        return Dataset(files, limit, stores.wait_for(folder))
    # Read the dev data now, so that the file may move during the run. Train data is streamed.
    read = task.read(files)
    examples = list(read) if split == "dev" else []

    def fill(writer: stores.Writer) -> dict[str, Any]:
        chosen: Iterable[Any] = examples or read
        if limit is not None:
            everything = list(chosen)
            chosen = [everything[i] for i in subset(len(everything), limit)]
        meta = _encode(task, split, chosen, writer, tokenising_processes(config))
        meta["available"] = meta["examples"] if limit is None else len(everything)
        return {**meta, "report": [*getattr(read, "notes", []), *meta["report"]]}

    return Dataset(files, limit, stores.build(folder, fill), examples)


def _encode(
    task: Task, split: str, examples: Iterable[Any], writer: stores.Writer, processes: int
) -> dict[str, Any]:
    """Write the features of all examples. Return the store's meta data."""
    read, counts, warnings = 0, Counter[str](), Counter[str]()
    lengths = []
    for number, encoded in in_chunks(functools.partial(task.encode, split=split), examples, processes):
        writer.append({**encoded.arrays, "example": encoded.arrays["example"] + np.int32(read)})
        lengths.append(encoded.arrays["length"])
        read += number
        counts.update(encoded.counts)
        warnings.update(encoded.warnings)
    rows = np.concatenate(lengths)
    without = f" ({counts['NoAns']} unanswerable)" if counts["NoAns"] else ""
    size = f"{rows.min()} to {rows.max()} tokens, median {np.median(rows):.0f}"
    line = f"{read} questions{without} -> {len(rows)} rows of {size}"
    report = [line, *(f"warning: {number} {what}" for what, number in warnings.items() if number)]
    return {"examples": read, "counts": counts, "report": report}


def require_metric(task: Task, dataset: Dataset, name: str) -> None:
    """All ranks. Raise InputError if an evaluation of this data does not give evaluation.best_metric."""
    if name not in (names := task.metrics(dataset.store)):
        raise InputError(f"evaluation.best_metric {name}: this data gives {', '.join(names)}.")


# Newer than version 0.1; without effect they are not part of a key, so that older runs can be resumed.
NEW_OPTIONS = {"data.columns", "data.ambiguous"}


def _store_name(task: Task, split: str, files: list[str], config: TrainConfig, limit: int | None) -> str:
    """A name that covers all that the features depend on. For split train, the run's fingerprint."""
    options = flatten(dataclasses.asdict(config))
    names = [n for n in options if n in task.feature_options or n.partition(".")[0] in task.feature_options]
    names = [n for n in names if split != "train" or n not in FREE_ON_RESUME]
    names = [n for n in names if n not in NEW_OPTIONS or options[n] not in ({}, "error")]
    key = stores.digest(
        FEATURES_VERSION.get(config.task, 1),
        type(task).__name__,
        tokenizer_description(task.tokenizer),
        split,
        limit,
        {name: options[name] for name in names},
        *map(Path, files),
        *own_code(type(task)),
    )
    return f"{type(task).__name__.lower()}-{key}"


def own_code(task_type: type) -> list[Path]:
    """Source files of a task's classes outside this package. What else they import is not known."""
    modules = {cls.__module__: cls for cls in task_type.__mro__}
    outside = [m for m in modules if m.partition(".")[0] not in {*sys.stdlib_module_names, "plainloop"}]
    return [Path(inspect.getfile(modules[name])) for name in sorted(outside)]


def tokenizer_description(tokenizer: Any) -> dict[str, Any]:
    """What token ids depend on, JSON-serialisable; without truncation and padding, which each call sets."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = tokenizer.get_vocab()
        return {"class": type(tokenizer).__name__, "vocabulary": vocabulary, "special": special}
    return {**json.loads(backend.to_str()), "truncation": None, "padding": None, "special": special}


def tokenising_processes(config: TrainConfig) -> int:
    return config.data.processes or len(os.sched_getaffinity(0))


def record_ids(task: Task, dataset: Dataset, rows: np.ndarray) -> list[str]:
    """Ids of the training records behind these rows. Reads the files again."""
    examples = list(task.read(dataset.files))
    kept = subset(len(examples), dataset.limit)
    return list(dict.fromkeys(examples[kept[i]].id for i in dataset.store.arrays["example"][rows]))


def make_steps(task: Task, dataset: Dataset, config: TrainConfig, world: World, *, max_tokens: int) -> Steps:
    """This rank's share of every optimizer step. max_tokens: padded tokens of a micro-batch."""
    store, collate = dataset.store, task.collate(dataset.store)
    if config.data.num_widths:
        counts = [config.data.num_widths, 2][: 1 + (store.row_lengths.ndim == 2)]  # targets are short: two
        widths = few_widths(store.row_lengths, counts, collate.max_length)
        collate = dataclasses.replace(collate, widths=widths)  # type: ignore[type-var]
    sampler = Sampler(store.row_lengths, config.batch_size, config.seed, config.data.bucket)
    return Steps(
        sampler, collate, store.num_targets, world_size=world.size, rank=world.rank, max_tokens=max_tokens,
        lockstep=config.parallel.mode == "fsdp",
    )  # fmt: skip


def evaluate(
    task: Task,
    model: nn.Module,
    dataset: Dataset | None,
    settings: EvaluationSettings,
    *,
    step: int | None = None,
) -> dict[str, float] | None:
    """All ranks. Metrics on rank 0 ({} elsewhere), files in settings.folder; None when interrupted."""
    assert dataset is not None
    if step is not None:
        settings = dataclasses.replace(settings, name=f"{settings.name} step {step}")
    try:
        scores = task.evaluate(model, dataset, settings)
    except Interrupted:
        return None
    if settings.world.is_main and settings.folder is not None:
        scores.write(settings.folder)
    return scores.metrics

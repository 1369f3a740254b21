"""`plainloop track`: copy the curves of runs to a tracker, after the fact. metrics.jsonl has each value once,
whatever the number of requeues; so does the tracker, whatever the number of calls.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from plainloop.trainer.config.parse import flatten
from plainloop.trainer.config.trained_options import TrackConfig
from plainloop.trainer.errors import InputError
from plainloop.trainer.run_folder.files import no_follow, write_atomically
from plainloop.trainer.run_folder.status import read_status


@dataclass(frozen=True)
class Curves:
    """A run. points: (step, name, value), by step; names as in TensorBoard, kind/name."""

    folder: Path
    group: str
    options: dict[str, Any] = field(repr=False)
    points: list[tuple[int, str, float]] = field(repr=False)

    @property
    def name(self) -> str:
        return self.folder.resolve().name


def track(config: TrackConfig) -> None:
    """Copy the curves of every run. Raises InputError."""
    if not config.runs or config.to is None:
        raise InputError(f"track needs runs and a tracker: plainloop track RUN --to {'|'.join(TRACKERS)}.")
    runs = [read_curves(Path(run), config.group) for run in config.runs]
    names = [(run.group, run.name) for run in runs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"two runs are called {'/'.join(sorted(twice)[0])}; give each its own folder name.")
    copy = TRACKERS[config.to]
    for run in runs:
        try:
            new = copy(run, config)
        except ImportError as error:
            raise InputError(
                f'--to {config.to}: {error}; install the extra: pip install "plainloop[{config.to}]".'
            ) from None
        say(f"{run.folder}: {len(run.points)} values, {new} of them new in {config.to}")


def read_curves(folder: Path, group: str | None) -> Curves:
    """Read what is settled in a run folder. Raises InputError.

    If the run has not completed, it may be killed, and then repeats the steps after its last checkpoint with
    other times. So these are left out, and so is the line that it has not finished.
    """
    completed = read_status(folder).get("status") == "completed"
    saved = [int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoints/step-*")]
    last = max(saved, default=0)
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        options = flatten(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"{folder}: not a run folder: {error.filename}: {error.strerror}.") from None
    points: dict[tuple[int, str], float] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            kind, step = record.pop("kind"), record.pop("step")
        except (ValueError, KeyError, TypeError, AttributeError):
            if number == len(lines):
                continue
            raise InputError(f"{folder / 'metrics.jsonl'}: line {number} is not a record of a run.") from None
        if not completed and (step > last or (step == last and kind == "evaluation")):
            continue
        for name, value in record.items():
            with contextlib.suppress(TypeError, ValueError):  # text; NaN and Inf are written as text too
                points.setdefault((step, f"{kind}/{name}"), float(value))  # each start has a warm-up
    if not points:
        raise InputError(f"{folder}: has no values yet; a running job's count up to its last checkpoint.")
    ordered = sorted((step, name, value) for (step, name), value in points.items())
    return Curves(folder, group or folder.resolve().parent.name, options, ordered)


def rows(points: list[tuple[int, str, float]]) -> Iterator[tuple[int, dict[str, float]]]:
    """Group the values by step."""
    steps: dict[int, dict[str, float]] = {}
    for step, name, value in points:
        steps.setdefault(step, {})[name] = value
    return iter(steps.items())


def to_tensorboard(run: Curves, config: TrackConfig) -> int:
    """Event files in DIR/GROUP/RUN, written anew by each call."""
    from torch.utils.tensorboard import SummaryWriter

    folder = Path(config.dir or "tracking/tensorboard") / run.group / run.name
    count = folder / ".values"
    before = int(count.read_text()) if count.is_file() else 0
    if folder.exists() and not count.is_file():
        raise InputError(f"{folder}: exists, and was not written by track; choose another --dir.")
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        write_atomically(count, str(len(run.points)))
        for step, name, value in run.points:
            writer.add_scalar(name, value, step)
    return max(0, len(run.points) - before)


def to_trackio(run: Curves, config: TrackConfig) -> int:
    """A local database, in TRACKIO_DIR or DIR. What it has is not written again."""
    if config.dir:
        os.environ["TRACKIO_DIR"] = str(Path(config.dir).resolve())
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    name = f"{run.group}/{run.name}"
    known = {(row["step"], key) for row in SQLiteStorage.get_logs(config.project, name) for key in row}
    new = [point for point in run.points if point[:2] not in known]
    if new:
        with contextlib.redirect_stdout(io.StringIO()):  # how to open its dashboard
            trackio.init(
                project=config.project, name=name, group=run.group, config=run.options, resume="allow",
                embed=False, auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
            for step, values in rows(new):
                trackio.log(values, step=step)
            trackio.finish()
    return len(new)


def to_wandb(run: Curves, config: TrackConfig) -> int:
    """Offline by default: `wandb sync DIR/wandb/offline-*` uploads. All calls write to the run of one id.
    What was written is noted in the run folder, since an offline run can't be asked.
    """
    import wandb

    identity = f"{config.project}/{run.group}/{run.name}"
    id_ = hashlib.sha256(identity.encode()).hexdigest()[:16]
    note = run.folder / f"track-wandb-{id_}.json"
    known = {tuple(key) for key in json.loads(note.read_text())} if note.is_file() else set()
    new = [point for point in run.points if point[:2] not in known]
    if new:
        folder = Path(config.dir or "tracking")
        folder.mkdir(parents=True, exist_ok=True)
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        handle = wandb.init(
            project=config.project, group=run.group, name=run.name, id=id_, resume="allow", dir=str(folder),
            config=run.options, mode=mode, settings=wandb.Settings(silent=True, x_disable_stats=True),
        )  # fmt: skip
        for step, values in rows(new):
            handle.log(values, step=step)
        handle.finish()
        keys = json.dumps([[step, name] for step, name, _ in run.points])
        note.unlink(missing_ok=True)
        with open(note, "x", encoding="utf-8", opener=no_follow) as stream:
            stream.write(keys)
    return len(new)


def to_mlflow(run: Curves, config: TrackConfig) -> int:
    """The server of MLFLOW_TRACKING_URI, or files in DIR/mlruns. What it has is not written again."""
    address = os.environ.get("MLFLOW_TRACKING_URI")
    if config.dir or not address:
        address = Path(config.dir or "tracking", "mlruns").resolve().as_uri()
    if address.startswith("file:"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=address)
    there = client.get_experiment_by_name(config.project)
    experiment = there.experiment_id if there else client.create_experiment(config.project)
    tags = {"plainloop.group": run.group, "plainloop.run": run.name}
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    found = client.search_runs([experiment], query)
    run_id = (found[0] if found else client.create_run(experiment, run_name=run.name, tags=tags)).info.run_id
    known = {
        (metric.step, name)
        for name in {name for _, name, _ in run.points}
        for metric in client.get_metric_history(run_id, name)
    }
    if not found:
        client.log_batch(run_id, params=[Param(key, str(value)[:500]) for key, value in run.options.items()])
    new = [Metric(name, value, 0, step) for step, name, value in run.points if (step, name) not in known]
    for start in range(0, len(new), 1000):  # the most that a server takes
        client.log_batch(run_id, metrics=new[start : start + 1000])
    client.set_terminated(run_id)
    return len(new)


TRACKERS: dict[str, Callable[[Curves, TrackConfig], int]] = {
    "tensorboard": to_tensorboard,
    "trackio": to_trackio,
    "wandb": to_wandb,
    "mlflow": to_mlflow,
}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

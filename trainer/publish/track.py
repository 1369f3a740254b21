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
from plainloop.trainer.run_folder.files import write_atomically
from plainloop.trainer.run_folder.status import read_status


@dataclass(frozen=True)
class Curves:
    """A run. points: (step, name, value), by step; names as in TensorBoard, kind/name."""

    folder: Path
    group: str
    identity: str  # two runs of the same name differ in this
    left_out: int  # values after the last checkpoint of a run that has not completed
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
        except (InputError, KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:  # of a tracker: a bad name, a server that does not answer
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"--to {config.to}: {run.folder}: {type(error).__name__}: {reason}") from None
        later = f"; {run.left_out} after its last checkpoint are left out" if run.left_out else ""
        say(f"{run.folder}: {len(run.points)} values, {new} of them new in {config.to}{later}")


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
    except (UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        raise InputError(f"{folder}: metrics.jsonl or config.yaml is damaged: {error}.") from None
    left_out = 0
    points: dict[tuple[int, str], float] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            kind, step = record.pop("kind"), record.pop("step")
        except (ValueError, KeyError, TypeError, AttributeError):
            if number == len(lines):
                continue
            raise InputError(f"{folder / 'metrics.jsonl'}: line {number} is not a record of a run.") from None
        if not completed and (not saved or step > last or (step == last and kind == "evaluation")):
            left_out += 1
            continue
        for name, value in record.items():
            with contextlib.suppress(TypeError, ValueError):  # text; NaN and Inf are written as text too
                points.setdefault((step, f"{kind}/{name}"), float(value))  # each start has a warm-up
    if not points:
        raise InputError(f"{folder}: has no values yet; a running job's count up to its last checkpoint.")
    first = next((line for line in lines if '"train"' in line), lines[0])  # its times are like no other run's
    identity = hashlib.sha256(first.encode()).hexdigest()[:16]
    ordered = sorted((step, name, value) for (step, name), value in points.items())
    group = group or folder.resolve().parent.name
    return Curves(folder, group, identity, left_out, options, ordered)


def require_same(run: Curves, there: Any) -> None:
    """Raise InputError if the tracker's run of this name is another run."""
    if there is not None and there != run.identity:
        raise InputError(
            f"{run.folder}: the tracker has another run called {run.group}/{run.name}; give --group NAME."
        )


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
    about, before = folder / "run.json", {"values": 0}
    if folder.exists():
        if not about.is_file():
            raise InputError(f"{folder}: exists, and was not written by track; choose another --dir.")
        before = json.loads(about.read_text())
        require_same(run, before["identity"])
    for left in folder.parent.glob(f".tmp-{run.name}-*"):  # by a killed call
        shutil.rmtree(left)
    temporary = folder.with_name(f".tmp-{run.name}-{os.getpid()}")
    with SummaryWriter(str(temporary)) as writer:
        for step, name, value in run.points:
            writer.add_scalar(name, value, step)
    note = {"identity": run.identity, "values": len(run.points)}
    write_atomically(temporary / about.name, json.dumps(note))
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(temporary, folder)
    return max(0, len(run.points) - int(before["values"]))


def to_trackio(run: Curves, config: TrackConfig) -> int:
    """A local database, in TRACKIO_DIR or DIR. What it has is not written again."""
    if config.dir:
        os.environ["TRACKIO_DIR"] = str(Path(config.dir).resolve())
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    name = f"{run.group}/{run.name}"
    there = SQLiteStorage.get_run_config(config.project, name) or {}
    require_same(run, there.get("plainloop_identity"))
    known = {(row["step"], key) for row in SQLiteStorage.get_logs(config.project, name) for key in row}
    new = [point for point in run.points if point[:2] not in known]
    if new:
        with contextlib.redirect_stdout(io.StringIO()):  # how to open its dashboard
            trackio.init(
                project=config.project, name=name, group=run.group, resume="allow",
                config={**run.options, "plainloop_identity": run.identity},
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

    folder = Path(config.dir or "tracking")
    mode: Any = os.environ.get("WANDB_MODE", "offline")
    identity = f"{config.project}/{run.group}/{run.name}/{run.identity}"
    id_ = hashlib.sha256(identity.encode()).hexdigest()[:16]
    place = hashlib.sha256(f"{folder.resolve()} {mode}".encode()).hexdigest()[:8]
    note = run.folder / f"track-wandb-{id_}-{place}.json"
    try:
        known = {tuple(key) for key in json.loads(note.read_text())} if note.is_file() else set()
    except (ValueError, TypeError):
        raise InputError(f"{note}: damaged; remove it, and the runs of id {id_} in {folder}/wandb.") from None
    new = [point for point in run.points if point[:2] not in known]
    if new:
        folder.mkdir(parents=True, exist_ok=True)
        handle = wandb.init(
            project=config.project, group=run.group, name=run.name, id=id_, resume="allow", dir=str(folder),
            config=run.options, mode=mode, settings=wandb.Settings(silent=True, x_disable_stats=True),
        )  # fmt: skip
        for step, values in rows(new):
            handle.log(values, step=step)
        handle.finish()
        write_atomically(note, json.dumps([[step, name] for step, name, _ in run.points]))
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
    query = " and ".join(f'tags.`{key}` = "{value}"' for key, value in tags.items())
    found = client.search_runs([experiment], query)
    require_same(run, found[0].data.tags.get("plainloop.identity") if found else None)
    tags["plainloop.identity"] = run.identity
    run_id = (found[0] if found else client.create_run(experiment, run_name=run.name, tags=tags)).info.run_id
    known = {
        (metric.step, name)
        for name in {name for _, name, _ in run.points}
        for metric in client.get_metric_history(run_id, name)
    }
    if not found or not found[0].data.params:
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

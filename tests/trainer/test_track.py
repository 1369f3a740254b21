"""`plainloop track`: every value of metrics.jsonl exactly once, in real trackers with local stores."""

import json
import math
import os
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from plainloop.trainer.cli import main

Values = dict[tuple[str, int], float]


def make_run(folder: Path, lr: float, steps: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"optim": {"lr": lr}, "seed": 1}))
    lines: list[dict[str, Any]] = [{"kind": "warm_up", "step": 0, "pass_s": 0.5}]
    for step in range(10, steps + 1, 10):
        lines.append({"kind": "train", "step": step, "loss": lr * step, "lr": lr, "note": "text"})
        lines.append({"kind": "evaluation", "step": step, "f1": step / 2})
    lines[1]["loss"] = "nan"
    (folder / "status.json").write_text('{"status": "completed"}')
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def values_of(folder: Path) -> Values:
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if name not in ("kind", "step", "note"):
                found[f"{record['kind']}/{name}", record["step"]] = float(value)
    return found


def in_tensorboard(store: Path, group: str, run: str) -> list[tuple[str, int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(store / group / run), size_guidance={"scalars": 0})
    events.Reload()
    return [(name, e.step, e.value) for name in events.Tags()["scalars"] for e in events.Scalars(name)]


def in_trackio(store: Path, group: str, run: str) -> list[tuple[str, int, float]]:
    code = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage;"
        f"print(json.dumps(SQLiteStorage.get_logs('plainloop', '{group}/{run}')))"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(store)}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    rows = json.loads(told.stdout)
    return [(n, r["step"], float(v)) for r in rows for n, v in r.items() if n not in ("step", "timestamp")]


def in_mlflow(store: Path, group: str, run: str) -> list[tuple[str, int, float]]:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(store / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("plainloop")
    query = f"tags.`plainloop.group` = '{group}' and tags.`plainloop.run` = '{run}'"
    (found,) = client.search_runs([experiment.experiment_id], query)
    assert found.data.params["optim.lr"]
    return [
        (m.key, m.step, m.value)
        for name in found.data.metrics
        for m in client.get_metric_history(found.info.run_id, name)
    ]


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of an offline run: LevelDB's log format, in blocks of 32 KiB, after a header of 7 bytes."""
    at, record = 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:  # too small for another header
            at += left
            continue
        size, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def in_wandb(store: Path, group: str, run: str) -> list[tuple[str, int, float]]:
    from wandb.proto import wandb_internal_pb2

    found, ids = [], set()
    for file in sorted(store.glob("wandb/offline-run-*/*.wandb")):
        values, name = [], ""
        for content in wandb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "run":
                name = f"{record.run.run_group}/{record.run.display_name}"
            elif record.WhichOneof("record_type") == "history":
                for item in record.history.item:
                    key = item.key or "/".join(item.nested_key)
                    if not key.startswith("_"):
                        values.append((key, record.history.step.num, float(json.loads(item.value_json))))
        if name == f"{group}/{run}":
            found += values
            ids.add(file.stem)
    assert len(ids) == 1  # so that `wandb sync` makes one run of them
    return found


READ = {"tensorboard": in_tensorboard, "trackio": in_trackio, "mlflow": in_mlflow, "wandb": in_wandb}


@pytest.mark.parametrize("tracker", READ)
def test_every_value_once_whatever_the_number_of_calls(
    tracker: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three calls: on part of the run, on all of it, and again. Two runs in a group."""
    pytest.importorskip(tracker)
    monkeypatch.chdir(tmp_path)
    runs = [make_run(tmp_path / f"sweep/lr-{lr}", lr, 40) for lr in (0.5, 0.25)]
    whole = (runs[0] / "metrics.jsonl").read_text()
    running = whole.replace(
        '"step": 30, "loss"', '"step": 30, "seconds": 5, "loss"'
    )  # it will be another time
    (runs[0] / "metrics.jsonl").write_text(running[: running.index('"step": 40')])
    (runs[0] / "status.json").write_text('{"status": "running"}')
    (runs[0] / "checkpoints/step-00000020").mkdir(parents=True)
    command = [sys.executable, "-m", "plainloop.trainer", "track", *map(str, runs), "--to", tracker]
    store = tmp_path / "store"
    for _ in range(3):
        told = subprocess.run([*command, "--dir", str(store)], capture_output=True, text=True)
        assert told.returncode == 0, told.stderr
        (runs[0] / "metrics.jsonl").write_text(whole)
        (runs[0] / "status.json").write_text('{"status": "completed"}')
    assert told.stderr.splitlines()[-1].endswith(f"0 of them new in {tracker}")
    for run in runs:
        found = READ[tracker](store, "sweep", run.name)
        assert max(Counter((name, step) for name, step, _ in found).values()) == 1
        expected = values_of(run)
        assert {(name, step): value for name, step, value in found} == pytest.approx(expected, nan_ok=True)
        assert sum(math.isnan(value) for value in expected.values()) == 1


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "mlflow"])
def test_another_run_of_the_same_name_is_refused(tracker: str, tmp_path: Path) -> None:
    pytest.importorskip(tracker)
    runs = [make_run(tmp_path / f"{place}/runs/it's", lr, 20) for place, lr in (("a", 0.5), ("b", 0.25))]
    command = [
        sys.executable,
        "-m",
        "plainloop.trainer",
        "track",
        "--to",
        tracker,
        "--dir",
        str(tmp_path / "s"),
    ]
    told = [
        subprocess.run([*command[:4], str(run), *command[4:]], capture_output=True, text=True)
        for run in (runs[0], runs[1], runs[0])
    ]
    assert [one.returncode for one in told] == [0, 2, 0], [one.stderr for one in told]
    assert "the tracker has another run called runs/it's; give --group NAME." in told[1].stderr
    assert "0 of them new" in told[2].stderr


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a/run", 0.5, 20)
    other = make_run(tmp_path / "b/a/run", 0.5, 20)
    broken = make_run(tmp_path / "broken", 0.5, 20)
    (broken / "metrics.jsonl").write_text("no\n" + (broken / "metrics.jsonl").read_text())
    empty = make_run(tmp_path / "empty", 0.5, 20)
    (empty / "metrics.jsonl").write_text("")
    (tmp_path / "there/a/run").mkdir(parents=True)
    damaged = make_run(tmp_path / "damaged", 0.5, 20)
    (damaged / "config.yaml").write_text("")
    for line, message in (
        ([], "track needs runs and a tracker"),
        ([str(run)], "track needs runs and a tracker"),
        ([str(tmp_path), "--to", "tensorboard"], "not a run folder"),
        ([str(broken), "--to", "tensorboard"], "line 1 is not a record"),
        ([str(empty), "--to", "tensorboard"], "has no values yet"),
        ([str(run), str(other), "--to", "tensorboard"], "two runs are called a/run"),
        ([str(run), "--to", "tensorboard", "--dir", str(tmp_path / "there")], "was not written by track"),
        ([str(damaged), "--to", "tensorboard"], "is damaged"),
    ):
        assert main(["track", *line]) == 2, line
        assert message in capsys.readouterr().err

"""The commands of docs/slurm.md, and README's, on a real Slurm with a local hub in place of the real one."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import docs
from helpers.hub import Hub

pytestmark = pytest.mark.slow
WAIT = 'until [ -z "$(squeue --noheader)" ]; do sleep 1; done'


def test_commands_run_as_written(cluster: Any, tmp_path: Path, squad_file: Path) -> None:
    docs.make_folder(tmp_path)
    models = docs.make_models(tmp_path)
    squad = tmp_path / "hub-squad"
    write_parquet(tmp_path, squad)
    repositories = {f"model {name}": folder for name, folder in models.items()}
    hub = Hub({**repositories, "dataset rajpurkar/squad_v2": squad})
    docs.fill_hub_cache(tmp_path / "cache", models)
    environment = {
        **cluster.env, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": hub.url,
        "OMP_NUM_THREADS": "1", "SCRATCH": str(tmp_path / "scratch"), "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PLAINLOOP_CACHE": str(tmp_path / "features"),
    }  # fmt: skip
    lines = []
    made = [line for line in docs.commands("docs/sweeps.md") if line.startswith("printf")]
    sweep = [*made, *docs.runnable("docs/sweeps.md", slurm=True)]
    for line in docs.runnable("docs/slurm.md", slurm=True) + docs.runnable("README.md", slurm=True) + sweep:
        lines += [WAIT, line] if "--summary" in line else [line]
    try:
        told = docs.run_script([*lines, WAIT], tmp_path, environment, timeout_s=580)
    finally:
        hub.close()
    assert "mean of 5" in told and "ready (" in told
    logs = {path.name: path.read_text() for path in tmp_path.glob("*.out")}
    failed = {name: text[-2000:] for name, text in logs.items() if "error" in text.lower()}
    assert not failed and len(logs) >= 12
    runs = sorted((tmp_path / "scratch/qa/runs").glob("*/status.json"))
    assert len(runs) == 5 and all('"completed"' in path.read_text() for path in runs)
    assert (tmp_path / "scratch/qa/runs/roberta-scores/metrics.json").exists()
    swept = sorted((tmp_path / "runs/sweep").glob("lr-*/status.json"))
    assert len(swept) == 4 and all('"completed"' in path.read_text() for path in swept)


def write_parquet(source: Path, folder: Path) -> None:
    """SQuAD as the hub has it: one Parquet file per split."""
    from datasets import Dataset

    from plainloop.data.readers.examples import read_examples

    (folder / "data").mkdir(parents=True)
    for split, file in (("train", "train-v2.0.json"), ("validation", "dev-v2.0.json")):
        rows = [
            {
                "id": e.id, "title": "t", "question": e.question, "context": e.context,
                "answers": {
                    "text": [a.text for a in e.answers], "answer_start": [a.start for a in e.answers],
                },
            }
            for e in read_examples(source / file)
        ]  # fmt: skip
        Dataset.from_list(rows).to_parquet(folder / f"data/{split}-00000-of-00001.parquet")

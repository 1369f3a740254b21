"""`plainloop sweep`: combinations, folders, errors; and the summary that groups their runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from plainloop.trainer.cli import main
from plainloop.trainer.config.options import TrainConfig
from plainloop.trainer.config.parse import parse
from plainloop.trainer.config.sweep import expand


def test_combinations_are_options_of_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "optim: {lr: [1e-5, 3.0e-5], betas: [[0.9, 0.999], [0.9, 0.98]]}\n"
        "seed: [1, 2, 3]\nepochs: 2\nmodel.dropout: [null]\ndata.columns: {question: query}\n"
        "checkpoint.async: false\n"
    )
    runs = expand(file)
    assert len(runs) == 12 == len({run.name for run in runs})
    configs = [parse(TrainConfig, run.options, program="train") for run in runs]
    chosen = [(c.optim.lr, c.optim.betas, c.seed) for c in configs]
    assert chosen[0] == (1e-5, (0.9, 0.999), 1) and chosen[1][2] == 2 and chosen[-1] == (3e-5, (0.9, 0.98), 3)
    assert len(set(chosen)) == 12 and {c.epochs for c in configs} == {2}
    assert configs[0].data.columns == {"question": "query"} and configs[0].checkpoint.async_ is False
    assert configs[0].model.dropout is None
    assert all("/" not in run.name and " " not in run.name for run in runs)
    assert main(["sweep", str(file), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 13 and lines[-1].startswith("sbatch --array=1-12 launch/train.sbatch --sweep ")
    assert lines[4].split()[:2] == ["5", runs[4].name]
    assert main(["sweep", str(file), "--task", "5", "--run_dir", "runs/s"]) == 0
    words = capsys.readouterr().out.splitlines()
    assert "--optim.betas=[0.9,0.98]" in words
    file.write_text("data.train: [v1/train.json, v2/train.json]")  # of the same last name
    assert [run.name for run in expand(file)] == ["train-train.json", "train-train.json_2"]
    assert words == [f"--run_dir=runs/s/{runs[4].name}", *runs[4].options]


def test_bad_sweeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sweep.yaml"
    for text, message in (
        ("epochs: 2", "no option has a list"),
        ("seed: []", "the list is empty"),
        ("sed: [1]", "unknown option 'sed'; did you mean seed?"),
        ("seed: [1, 1]", "is a value there twice?"),
        ("optim.lr: [1e-5, 0.00001]", "is a value there twice?"),
        ("optim.lr: [-1, 1e-5]", "optim.lr is -1"),
        ('text.null_target: ["a\\nb"]', "must be one line"),
        ("seed: [1, x]", "seed"),
        ("run_dir: [a, b]", "give it on the command line"),
        ("seed: [1", "not a YAML file"),
    ):
        file.write_text(text)
        assert main(["sweep", str(file), "--list"]) == 2, text
        assert message in capsys.readouterr().err, text
    file.write_text("seed: [1, 2]")
    for line, message in (
        (["--task", "3"], "has 2 runs"),
        (["--task", "0"], "task is 0"),
        ([], "either --list or --task"),
        (["--list", "--task", "1"], "either --list or --task"),
        (["--list", "--run_dir", "x"], "no effect with --list"),
    ):
        assert main(["sweep", str(file), *line]) == 2
        assert message in capsys.readouterr().err
    assert main(["sweep", "--list"]) == 2 and main(["sweep", "nowhere.yaml", "--list"]) == 2


def test_the_summary_groups_by_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(name: str, f1: float, **options: Any) -> str:
        folder = tmp_path / name
        folder.mkdir()
        content = {"run_dir": name, "evaluation": {"best_metric": "f1"}, **options}
        (folder / "config.yaml").write_text(yaml.safe_dump(content))
        (folder / "metrics.json").write_text(json.dumps({"exact": f1 - 10, "f1": f1}))
        return str(folder)

    paths = [run(f"low-{seed}", 50.0 + seed, seed=seed, optim={"lr": 1e-5}, epochs=2) for seed in (1, 2)]
    paths += [run(f"high-{seed}", 70.0 + seed, seed=seed, optim={"lr": 3e-5}, epochs=2) for seed in (1, 3)]
    assert main(["evaluate", "--summary", *paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == [
        "3e-05:", "71.0000", "73.0000", "72.0000", "1.4142",
        "1e-05:", "51.0000", "52.0000", "51.5000", "0.7071",
    ]  # fmt: skip
    assert lines[1] == "optim.lr 3e-05:" and lines[4].startswith("mean of 2")
    assert main(["evaluate", "--summary", *paths[:2]]) == 0  # they differ in the seed alone: no groups
    assert len(capsys.readouterr().out.splitlines()) == 5

"""The rows of a step, and their losses, recomputed: their weighted sum is the loss that the run logged."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from plainloop.trainer.cli import main


def as_arguments(options: dict[str, Any]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def replayed(capsys: Any, *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["replay", *arguments, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def check(found: dict[str, Any], line: dict[str, Any]) -> None:
    total = sum(row["loss"] * row["weight"] for row in found["rows"])
    assert total == pytest.approx(found["step_loss"], rel=1e-6)
    assert found["weighted_sum"] == pytest.approx(found["step_loss"], rel=1e-6)
    assert sum(row["weight"] for row in found["rows"]) == pytest.approx(1)
    assert found["logged"]["loss"] == line["loss"]
    assert found["logged"]["recomputed"] == pytest.approx(line["loss"], rel=1e-6)


def test_losses_are_those_of_the_log(options: Any, metrics: Any, squad_file: Path, capsys: Any) -> None:
    """With dropout, from a checkpoint and from the start; a log of every step."""
    run = options["run_dir"]
    assert (
        main(
            [
                "train",
                *as_arguments(
                    options | {"max_steps": 12, "checkpoint.every_steps": 5, "checkpoint.keep_last": 9}
                ),
            ]
        )
        == 0
    )
    log = {line["step"]: line for line in metrics(run, "train")}
    for step, began in ((4, 0), (8, 5), (11, 10)):
        found = replayed(capsys, run, "--step", str(step), "--losses", "--around", "1")
        assert found["trained_from_step"] == began and found["ranks"] == 1
        assert found["logged"]["recomputed"] == log[step]["loss"]  # one rank: the same bits
        assert found["step_loss"] == pytest.approx(log[step]["loss"], rel=1e-6)
        check(found, log[step])
        assert [line["step"] for line in found["log"]] == [step - 1, step, step + 1]
        losses = [row["loss"] for row in found["rows"]]
        assert losses == sorted(losses, reverse=True) and len(set(losses)) > 1
    rows = {row["id"] for row in replayed(capsys, run, "--step", "8")["rows"]}
    assert rows == {row["id"] for row in replayed(capsys, run, "--step", "8", "--losses")["rows"]}
    asked = {
        qa["id"]: qa["question"]
        for article in json.loads(squad_file.read_text())["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    }
    for row in found["rows"]:
        assert row["question"] == asked[row["id"]]
        assert row["question"].lower().split()[0] in row["input"]
    assert main(["replay", run, "--step", "8"]) == 0
    text = capsys.readouterr().out
    assert "step 8, epoch 0.533: 8 rows" in text and all(f"id {i}" in text for i in rows)


def test_each_loss_is_that_of_its_row(options: Any, capsys: Any) -> None:
    """Without dropout, and before the first update: the loss of a row alone under the initial weights."""
    from plainloop.data.store import Store
    from plainloop.models.spans import load_span_model, span_loss_sum
    from plainloop.trainer.commands.replay import read_checkpoints, read_config
    from plainloop.trainer.config.report_options import ReplayConfig
    from plainloop.trainer.tasks.span import SpanTask

    still = {"model.dropout": 0, "model.attention_dropout": 0, "max_steps": 1}
    assert main(["train", *as_arguments(options | still)]) == 0
    found = replayed(capsys, options["run_dir"], "--step", "1", "--losses")
    run = read_config(Path(options["run_dir"]), read_checkpoints(Path(options["run_dir"]))[0], ReplayConfig())
    (folder,) = Path(options["data.cache_dir"]).glob("spantask-*")
    collate = SpanTask(run).collate(Store.open(folder))
    torch.manual_seed(run.seed)
    model = load_span_model(options["model.path"], new_head=True, dropout=0, attention_dropout=0).eval()
    import numpy as np

    for row in found["rows"]:
        inputs, labels = collate(np.array([row["row"]]))
        alone = span_loss_sum(model(**inputs), labels).item()
        assert row["loss"] == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_and_lines_of_several_steps(
    mode: str, options: Any, launch: Any, metrics: Any, capsys: Any
) -> None:
    """The masks and the shares of two ranks in one process; a line is the mean of four steps."""
    changes = {
        "max_steps": 11,
        "checkpoint.every_steps": 5,
        "checkpoint.keep_last": 9,
        "log.every_steps": 4,
        "tokens_per_device": 100,
        "parallel.mode": mode,
    }
    launch(2, "train", options | changes)
    log = {line["step"]: line for line in metrics(options["run_dir"], "train")}
    # A sharded run also has empty passes, where the ranks' shares differ: see all its steps.
    steps = ((6, 8), (7, 8), (8, 8), (9, 11), (10, 11))
    for step, line in steps if mode == "fsdp" else steps[1::2]:
        found = replayed(capsys, options["run_dir"], "--step", str(step), "--losses")
        assert found["ranks"] == 2 and found["trained_from_step"] == 5
        check(found, log[line])


def test_text_rows_are_weighted_by_their_tokens(text_options: Any, metrics: Any, capsys: Any) -> None:
    assert main(["train", *as_arguments(text_options | {"max_steps": 5, "text.label_smoothing": 0.1})]) == 0
    found = replayed(capsys, text_options["run_dir"], "--step", "3", "--losses")
    line = metrics(text_options["run_dir"], "train")[2]
    check(found, line)
    assert found["step_loss"] == pytest.approx(line["loss"], rel=1e-6)
    assert len({row["weight"] for row in found["rows"]}) > 1 and found["rows"][0]["targets"]


def test_a_run_that_was_resumed_with_other_options(options: Any, metrics: Any, capsys: Any) -> None:
    """Rows are those of the options at the step: before the change another seed gave them."""
    run = options["run_dir"]
    keep = {"checkpoint.every_steps": 3, "checkpoint.keep_last": 9, "max_steps": 12}
    assert main(["train", *as_arguments(options | keep | {"stop_at_step": 6})]) == 75
    before = replayed(capsys, run, "--step", "5")["rows"]
    changes = {"seed": 7, "checkpoint.allow_changes": "[seed]"}
    assert main(["train", *as_arguments(options | keep | changes)]) == 0
    assert replayed(capsys, run, "--step", "5")["rows"] == before
    found = replayed(capsys, run, "--step", "5", "--losses")
    check(found, metrics(run, "train")[4])
    found = replayed(capsys, run, "--step", "8", "--losses")
    check(found, metrics(run, "train")[7])
    assert found["logged"]["verdict"] == "the same to the last digit"
    for name in ("step-00000003", "step-00000006"):
        shutil.rmtree(Path(run) / "checkpoints" / name)
    assert main(["replay", run, "--step", "5"]) == 2
    assert "resumed with other options at step 6" in capsys.readouterr().err
    assert main(["replay", run, "--step", "8"]) == 0


def test_a_loss_that_is_not_finite(options: Any, capsys: Any) -> None:
    """What one replays a step for: the losses are told, also as JSON."""
    broken = {"optim.lr": 1e30, "optim.warmup": 0, "optim.max_grad_norm": 0, "max_steps": 4}
    assert main(["train", *as_arguments(options | broken | {"optim.max_nonfinite_steps": 0})]) == 70
    found = replayed(capsys, options["run_dir"], "--step", "3", "--losses")
    assert found["step_loss"] == "nan" and found["rows"][0]["loss"] == "nan"
    assert main(["replay", options["run_dir"], "--step", "3", "--losses"]) == 0
    assert "loss of step 3: nan" in capsys.readouterr().out


def test_a_step_that_is_still_to_come(options: Any, capsys: Any) -> None:
    run = options["run_dir"]
    assert main(["train", *as_arguments(options | {"stop_at_step": 4})]) == 75
    assert replayed(capsys, run, "--step", "9")["trained"] is False
    (Path(run) / "metrics.jsonl").unlink()  # only for --around and the check of losses
    assert replayed(capsys, run, "--step", "3")["trained"] is True
    assert main(["replay", run, "--step", "9", "--losses"]) == 2
    assert "trained up to step 4" in capsys.readouterr().err


def test_a_loss_of_another_run_is_noticed(options: Any, capsys: Any) -> None:
    assert main(["train", *as_arguments(options | {"max_steps": 3})]) == 0
    log = Path(options["run_dir"]) / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("\n".join(json.dumps(line | {"loss": 9.5} if "loss" in line else line) for line in lines))
    found = replayed(capsys, options["run_dir"], "--step", "2", "--losses")
    assert found["logged"]["verdict"].startswith("WARNING: not the same")


def test_bad_input_is_one_line(options: Any, tmp_path: Path, capsys: Any) -> None:
    own = dict(options)
    own["data.train"] = str(tmp_path / "own.json")
    Path(own["data.train"]).write_text(Path(options["data.train"]).read_text())
    run = options["run_dir"]
    assert main(["train", *as_arguments(own | {"max_steps": 2})]) == 0
    capsys.readouterr()
    faults = {
        "needs a run folder": [],
        "--step 99: the run has 2 steps": [run, "--step", "99"],
        "not a run folder": [str(tmp_path), "--step", "1"],
        "step is 0": [run, "--step", "0"],
    }
    for message, arguments in faults.items():
        assert main(["replay", *arguments]) == 2, message
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    text = Path(own["data.train"]).read_text().replace("Which", "Whatever").replace("What", "Whatever")
    Path(own["data.train"]).write_text(text)
    assert main(["replay", run, "--step", "1"]) == 2
    assert "have changed since" in capsys.readouterr().err

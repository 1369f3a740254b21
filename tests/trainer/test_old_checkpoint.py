"""A checkpoint that an earlier version wrote (state.json of format 2) is read, resumed and evaluated."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from plainloop.data.demo import make_part
from plainloop.data.errors import InputError
from plainloop.trainer.checkpoint.folder import newest_good
from plainloop.trainer.cli import main
from plainloop.trainer.config.options import TrainConfig
from plainloop.trainer.config.parse import parse
from plainloop.trainer.loop import Verdict
from plainloop.trainer.run import train

OLD = Path(__file__).parents[1] / "fixtures/checkpoint_format_2/step-00000003"
OPTIONS = {
    "run_dir": "run", "model.path": "model", "data.train": "train.json", "data.max_length": 96,
    "data.stride": 24, "data.cache_dir": "cache", "batch_size": 8, "epochs": 2, "tokens_per_device": 400,
    "precision": "fp32", "optim.lr": 1e-3, "log.tensorboard": "false", "log.every_steps": 1,
    "checkpoint.every_steps": 0,
}  # fmt: skip


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the earlier version left it: stopped after 3 of 20 steps."""
    monkeypatch.chdir(tmp_path)
    Path("train.json").write_text(json.dumps(make_part("train", 6, seed=1)))
    shutil.copytree(OLD, "run/checkpoints/step-00000003")
    shutil.copytree(OLD, "model")  # the options compare its path; the weights come from the checkpoint
    return tmp_path


def run(**changes: Any) -> Any:
    options = OPTIONS | changes
    return train(parse(TrainConfig, [f"--{n}={v}" for n, v in options.items()], program="test"))


def test_state_of_format_2_is_converted(old_run: Path) -> None:
    found = newest_good(Path("run/checkpoints"), print)
    assert found is not None and found.state["format"] == 3 and found.state["nonfinite_streak"] == 0
    assert found.state["environment"]["ranks"] == 1 and found.state["fingerprint"] is None


def test_old_run_is_resumed(old_run: Path, capsys: Any, metrics: Any) -> None:
    capsys.readouterr()
    result = run(stop_at_step=5)
    assert (result.verdict, result.step) == (Verdict.STOPPED, 5)
    told = capsys.readouterr().err
    assert "resuming from run/checkpoints/step-00000003 at step 3" in told
    assert "guaranteed: the same rows in the same order; an earlier version wrote this" in told
    # Losses of the earlier version for steps 4 and 5; other CPUs round differently.
    losses = [record["loss"] for record in metrics("run", "train")]
    assert losses == pytest.approx([4.5124, 4.5026], abs=2e-3)
    state = json.loads(Path("run/checkpoints/step-00000005/state.json").read_text())
    assert state["format"] == 3 and state["fingerprint"]["data"].startswith("spantask-")


def test_order_of_the_rows_is_still_compared(old_run: Path) -> None:
    Path("train.json").write_text(json.dumps(make_part("train", 7, seed=1)))
    with pytest.raises(InputError, match="its 3 steps were trained on different rows"):
        run()


def test_old_checkpoint_is_evaluated(old_run: Path, capsys: Any) -> None:
    assert main(["evaluate", "--model", "run", "--data", "train.json", "--cache_dir", "cache"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] == 18

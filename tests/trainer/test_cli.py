"""The command line: --help is fast; every user error is one line and exit code 2."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plainloop.trainer.cli import main

Fail = Callable[..., str]


@pytest.fixture
def fails(options: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> Fail:
    """Run a command in this process, assert exit code 2 and one error line, and return that line."""

    def run(command: str, *, base: bool = True, **changes: Any) -> str:
        chosen = (options if base else {}) | changes
        arguments = [text for name, value in chosen.items() for text in (f"--{name}", str(value))]
        assert main([command, *arguments]) == 2
        lines = [
            line for line in capfd.readouterr().err.splitlines() if line.startswith("plainloop: error: ")
        ]
        assert len(lines) == 1
        return lines[0]

    return run


def test_help_is_fast_and_lists_the_commands() -> None:
    """Fast because nothing heavy is imported; tests/bench measures the time."""
    code = "import sys, plainloop.trainer.cli as c; c.main(['--help']); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert all(word in result.stdout for word in ("train", "evaluate", "demo"))
    assert result.stdout.endswith("False\n")


@pytest.mark.parametrize("command", ["train", "evaluate", "fetch", "doctor", "demo"])
def test_help_of_a_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"\nExample:\n    plainloop {command} --" in capsys.readouterr().out


def test_every_option_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    import dataclasses
    import typing

    from plainloop.trainer.config.command_options import DemoConfig
    from plainloop.trainer.config.options import TrainConfig
    from plainloop.trainer.config.trained_options import ScoreConfig

    def check(kind: Any) -> None:
        for item in dataclasses.fields(kind):
            hint = typing.get_type_hints(kind)[item.name]
            if dataclasses.is_dataclass(hint):
                check(hint)
            else:
                assert item.metadata["help"], item.name

    for kind in (TrainConfig, ScoreConfig, DemoConfig):
        check(kind)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0 and "--optim.lr" in capsys.readouterr().out


def test_unknown_commands_and_options(fails: Fail) -> None:
    assert "unknown command 'trian'; choose from train, evaluate, predict, " in fails("trian", base=False)
    assert "unknown option --batchsize; did you mean batch_size?" in fails("train", batchsize=3)
    assert "data.train is None" in fails("train", base=False)


def test_bad_data(fails: Fail, tmp_path: Path, options: dict[str, Any]) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"data": [}')
    assert f"{bad}:1:11: not valid JSON" in fails("train", **{"data.train": bad})
    content = json.loads(Path(options["data.train"]).read_text())
    answers = next(q["answers"] for q in content["data"][0]["paragraphs"][0]["qas"] if q["answers"])
    answers[0]["answer_start"] += 1
    bad.write_text(json.dumps(content))
    assert "1 bad record(s)" in fails("train", **{"data.train": bad})
    bad.write_text('{"data": []}')
    assert "holds no question" in fails("train", **{"data.train": bad})
    assert "nowhere.json: no such file" in fails("train", **{"data.train": "nowhere.json"})
    assert "nowhere.json: no such file" in fails("train", **{"data.dev": "nowhere.json"})
    assert not list((Path(options["run_dir"])).glob("checkpoints/*"))


def test_bad_models(fails: Fail, tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert "has no fast tokenizer" in fails("train", **{"model.path": slow})
    assert "no such folder" in fails("train", **{"model.path": tmp_path / "nowhere"})


def test_hub_name_without_network_is_one_error_line_within_a_minute(options: dict[str, Any]) -> None:
    """The hub is a local port that refuses connections. HF_HUB_OFFLINE is not set: users forget it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": options["run_dir"] + "/hub"}
    arguments = [text for k, v in options.items() for text in (f"--{k}", str(v))]
    result = subprocess.run(
        [sys.executable, "-m", "plainloop.trainer", "train", *arguments, "--model.path", "some/encoder"],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("plainloop: error: ")]
    assert len(lines) == 1 and "--local-dir" in lines[0] and "Traceback" not in result.stderr


def test_unwritable_run_folder(fails: Fail, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert f"run_dir {tmp_path}/file/run" in fails("train", run_dir=tmp_path / "file/run")
    folder = tmp_path / "read-only"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            assert "Read-only file system; choose a writable folder" in fails("train", run_dir=folder / "run")
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


def test_partial_distributed_environment_is_rejected(fails: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    assert "half set" in fails("train")


def test_scoring_a_predictions_file_needs_no_model(
    real_data: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path, fails: Fail
) -> None:
    data = str(real_data / "squad2/dev-v2.0.full-rebuilt.json")
    predictions = real_data / "known/bert_dev_predictions.json"
    assert main(["evaluate", "--predictions", str(predictions), "--data", data]) == 0
    scores = json.loads(capfd.readouterr().out)
    assert (scores["exact"], scores["f1"]) == (78.74168280973637, 81.77528052374723)
    some = dict(list(json.loads(predictions.read_text()).items())[:-10])
    (tmp_path / "some.json").write_text(json.dumps(some | {"stray": "x"}))
    assert main(["evaluate", "--predictions", str(tmp_path / "some.json"), "--data", data]) == 0
    said = capfd.readouterr().err
    assert "10 of 11873 questions have no prediction" in said and "1 predictions match no question" in said
    strict = {"predictions": tmp_path / "some.json", "data": data, "strict": "true"}
    assert "10 ids have no prediction" in fails("evaluate", base=False, **strict)
    (tmp_path / "list.json").write_text("[]")
    assert "must be a JSON object" in fails(
        "evaluate", base=False, predictions=tmp_path / "list.json", data=data
    )
    assert "needs --data FILE" in fails("evaluate", base=False, data=data)


def test_a_run_folder_can_be_evaluated(
    options: dict[str, Any], train: Any, tmp_path: Path, capsys: Any
) -> None:
    train(max_steps=2)
    capsys.readouterr()
    arguments = [
        "evaluate",
        "--model",
        options["run_dir"],
        "--data",
        options["data.train"],
        "--precision",
        "fp32",
    ]
    arguments += ["--cache_dir", str(tmp_path / "cache")]
    assert main([*arguments, "--out_dir", str(tmp_path / "out")]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["total"] == 120 and (tmp_path / "out/nbest_predictions.json").exists()
    scored = [
        "evaluate",
        "--data",
        options["data.train"],
        "--predictions",
        str(tmp_path / "out/predictions.json"),
    ]
    assert main([*scored, "--null_odds", str(tmp_path / "out/null_odds.json")]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["exact"], again["f1"]) == (metrics["exact"], metrics["f1"])

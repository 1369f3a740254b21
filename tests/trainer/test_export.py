"""`plainloop export`: the answers of the checkpoint, also as ONNX; a changed weight is found; the card."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.hub import Hub

from plainloop.data.readers.examples import read_examples
from plainloop.trainer.cli import main
from plainloop.trainer.errors import RunError
from plainloop.trainer.publish.export import verify
from plainloop.trainer.run_folder.files import sha256
from plainloop.trainer.trained.predictor import Predictor


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


@pytest.fixture
def trained(
    made: dict[str, Path], options: dict[str, Any], train: Any, tmp_path_factory: Any, squad_file: Path
) -> Path:
    """A run, its scores and its calibration; once for all tests."""
    if "run" not in made:
        folder = tmp_path_factory.mktemp("export")
        train(run_dir=str(folder / "run"), epochs=3, **{"data.dev": str(squad_file)})
        data = ["--model", str(folder / "run"), "--data", str(squad_file)]
        assert main(["calibrate", *data]) == 0
        assert main(["evaluate", *data, "--out_dir", str(folder / "scores")]) == 0
        made["run"] = folder / "run"
    return made["run"]


def test_export_is_verified_used_and_has_a_card(
    trained: Path, squad_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, scores = tmp_path / "model", trained.with_name("scores")
    line = ["export", str(trained), "--out", str(out), "--verify", str(squad_file), "--scores", f"[{scores}]"]
    capsys.readouterr()
    assert main(line) == 0
    assert "the same answers as the checkpoint, the same scores" in capsys.readouterr().err
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "plainloop.json", "README.md"} <= names
    assert {"calibration.json", "manifest.json"} <= names
    assert not {"optimizer.safetensors", "state.json"} & names
    best = (trained / "best").resolve()
    assert sha256(out / "model.safetensors") == sha256(best / "model.safetensors")

    # predict and evaluate use it as they use the run, with the options of the run
    for name, model in (("run", trained), ("export", out)):
        data = ["--data", str(squad_file), "--null_threshold", "calibrated"]
        assert main(["predict", "--model", str(model), *data, "--out", str(tmp_path / name)]) == 0
        assert main(["evaluate", "--model", str(model), *data, "--out_dir", str(tmp_path / f"{name}-s")]) == 0
    assert (tmp_path / "run").read_bytes() == (tmp_path / "export").read_bytes()
    scored = [(tmp_path / f"{name}-s/metrics.json").read_bytes() for name in ("run", "export")]
    assert scored[0] == scored[1]

    # the card: a header that the Hub can read, figures with their origin, what was tuned, what is missing
    card = (out / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["pipeline_tag"] == "question-answering"
    assert "license: to be chosen by the author" in header and "To be completed by the author" in body
    metrics = json.loads((scores / "metrics.json").read_text())
    assert f"| f1 | {metrics['f1']:.6g} |" in body and "best_f1 (tuned on this data)" in body
    assert "`plainloop evaluate --data " in body and sha256(squad_file) in body
    assert "fitted on the other half of the data" in body and "epochs: 3" in body
    from huggingface_hub import ModelCard

    assert ModelCard.load(out / "README.md").data.library_name == "transformers"

    # the card may be edited, weights may not change
    (out / "README.md").write_text(card.replace("To be completed", "MIT"))
    question = ["--question", "Who?", "--context", "Ada."]
    assert main(["predict", "--model", str(out), *question]) == 0
    flip(out / "model.safetensors")
    capsys.readouterr()
    assert main(["predict", "--model", str(out), *question]) == 2
    assert "model.safetensors has a different SHA-256" in capsys.readouterr().err


def flip(path: Path) -> None:
    """Flip the exponent's highest bit of the last number: a weight of the head."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 0b01000000
    path.write_bytes(content)


def test_a_flipped_weight_is_found(trained: Path, squad_file: Path, tmp_path: Path) -> None:
    best = (trained / "best").resolve()
    shutil.copytree(best, tmp_path / "copy")
    assert "the same answers" in verify(str(best), str(tmp_path / "copy"), [str(squad_file)])
    (tmp_path / "copy/manifest.json").unlink()
    flip(tmp_path / "copy/model.safetensors")
    with pytest.raises(RunError, match=r"the export answers \d+ of \d+ questions differently, first id"):
        verify(str(best), str(tmp_path / "copy"), [str(squad_file)])


def test_onnx_gives_the_same_answers(
    trained: Path, squad_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "model"
    assert main(["export", str(trained), "--out", str(out), "--onnx", "--verify", str(squad_file)]) == 0
    assert "the same answers as the checkpoint, scores within" in capsys.readouterr().err
    assert (out / "model.onnx").is_file() and not (out / "model.safetensors").exists()
    examples = read_examples(squad_file)
    questions, contexts = [e.question for e in examples], [e.context for e in examples]
    expected = Predictor.from_run(str(trained), precision="fp32")(questions, contexts)
    found = Predictor.from_run(str(out))(questions, contexts)
    assert [a["answer"] for a in found] == [a["answer"] for a in expected]
    data = ["--data", str(squad_file), "--null_threshold", "calibrated"]
    assert main(["evaluate", "--model", str(out), *data]) == 0
    assert "runs in fp32" not in capsys.readouterr().err
    assert main(["evaluate", "--model", str(out), *data, "--precision", "bf16"]) == 2
    assert "is an ONNX model, which runs in fp32" in capsys.readouterr().err
    assert main(["evaluate", "--model", str(out), *data, "--parallel", "fsdp"]) == 2
    assert "is an ONNX model, which can't be sharded" in capsys.readouterr().err
    content = bytearray((out / "model.onnx.data").read_bytes())
    content[len(content) // 2] ^= 1
    (out / "model.onnx.data").write_bytes(content)
    assert main(["predict", "--model", str(out), "--question", "Who?", "--context", "Ada."]) == 2


def test_text_models_are_exported_too(
    text_options: dict[str, Any],
    train: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(**text_options, max_steps=2)
    out, run = str(tmp_path / "model"), text_options["run_dir"]
    data = text_options["data.train"]
    capsys.readouterr()
    assert main(["export", run, "--out", out, "--verify", str(data)]) == 0, capsys.readouterr().err
    assert Predictor.from_run(out)("why ?", "ice") == Predictor.from_run(run)("why ?", "ice")
    assert main(["export", run, "--out", f"{out}2", "--onnx"]) == 2
    assert "--onnx is for models of task span" in capsys.readouterr().err


def test_push_uploads_every_file(trained: Path, tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads the environment when it is imported."""
    out = tmp_path / "model"
    assert main(["export", str(trained), "--out", str(out)]) == 0
    hub = Hub({})
    command = [sys.executable, "-m", "plainloop.trainer", "push", str(out), "user/name"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    try:
        refused = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert refused.returncode == 2 and "`hf auth login`" in refused.stderr, refused.stderr
        done = subprocess.run(
            command, env={**environment, "HF_TOKEN": "hf_x"}, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout.startswith(f"{hub.url}/user/name/commit/"), done.stderr
        assert "README.md is not complete" in done.stderr
    finally:
        hub.close()
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {name: hub.uploaded.get(name) for name in files} == files
    away = {**environment, "HF_TOKEN": "hf_x"}  # the server is gone
    failed = subprocess.run(command, env=away, capture_output=True, text=True)
    assert failed.returncode == 2 and "could not be uploaded" in failed.stderr, failed.stderr
    offline = subprocess.run(command, env={**away, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert offline.returncode == 2 and "push needs the network" in offline.stderr


def test_bad_input(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "scores").mkdir()
    out = str(tmp_path / "out")
    for line, message in (
        (["export"], "export needs a run folder"),
        (["export", str(trained)], "export needs a run folder"),
        (["export", str(tmp_path / "there"), "--out", out], "no state.json"),
        (["export", str(trained), "--out", str(tmp_path / "there")], "exists; remove it"),
        (["export", str(trained), "--out", out, "--verify", "nowhere.json"], "no such file"),
        (["export", str(trained), "--out", out, "--scores", f"[{tmp_path}/scores]"], "not a folder of"),
        (["export", "a", "b", "--out", out], "too many words"),
        (["push"], "push needs a folder and a name"),
        (["push", str(tmp_path / "there"), "user/name"], "was not written by plainloop export"),
    ):
        assert main(line) == 2, line
        errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("plainloop: error")]
        assert len(errors) == 1 and message in errors[0], errors
        assert not Path(out).exists() and not list(tmp_path.glob(".tmp-*"))

"""Adapters by PEFT: only they and the head change, exact resume, their own base, merged exports."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from plainloop.models import adapters
from plainloop.trainer.cli import main
from plainloop.trainer.errors import InputError
from plainloop.trainer.run_folder.files import sha256
from plainloop.trainer.trained.predictor import Predictor

pytest.importorskip("peft")
SPAN = {"peft.rank": 4, "peft.targets": "[query, key, value]", "max_steps": 6}
TEXT = {"peft.rank": 4, "peft.targets": "[q, v]", "max_steps": 6, "peft.method": "rslora"}


@pytest.fixture(params=["span", pytest.param("text", marks=pytest.mark.slow)])
def given(request: Any) -> dict[str, Any]:
    """Options of a run with adapters, for each task."""
    if request.param == "span":
        given: dict[str, Any] = request.getfixturevalue("options")
        return given | SPAN | {"data.dev": given["data.train"]}
    given = request.getfixturevalue("text_options")
    return given | TEXT | {"data.dev": str(request.getfixturevalue("text_files")[1])}


def run(options: dict[str, Any], **changes: Any) -> int:
    return main(["train", *(w for n, v in (options | changes).items() for w in (f"--{n}", str(v)))])


def weights(options: dict[str, Any], step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(Path(options["run_dir"]) / f"checkpoints/step-{step:08d}/adapter_model.safetensors")


def test_only_adapters_and_head_change_and_resume_gives_the_same_bits(
    given: Any, tmp_path: Path, assert_same_bits: Any, capfd: Any
) -> None:
    base = Path(given["model.path"]) / "model.safetensors"
    before = sha256(base)
    assert run(given) == 0
    folder = Path(given["run_dir"]) / "checkpoints/step-00000006"
    assert not list(folder.glob("model*.safetensors"))
    found = weights(given)
    heads = [name for name in found if ".lora_" not in name]
    span = given.get("task") != "text"
    assert heads == (
        ["base_model.model.qa_outputs.bias", "base_model.model.qa_outputs.weight"] if span else []
    )
    assert all(found[name].abs().max() > 0 for name in found if ".lora_B" in name)
    moments = load_file(folder / "optimizer.safetensors")
    assert len({name.rpartition("/")[0] for name in moments}) == len(found)
    stopped = given | {"run_dir": tmp_path / "stopped"}
    assert run(stopped, stop_at_step=2) == 75
    assert run(stopped) == 0
    assert "guaranteed: the same bits" in capfd.readouterr().err
    assert_same_bits(weights(stopped), found)
    assert sha256(base) == before


def test_peft_and_a_merged_export_give_the_same_answers(given: Any, tmp_path: Path, capsys: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForQuestionAnswering, AutoModelForSeq2SeqLM

    span = given.get("task") != "text"
    assert run(given, **{"optim.lr": 3e-2}) == 0
    capsys.readouterr()
    trained = Predictor.from_run(given["run_dir"], precision="fp32").model.network
    auto_class = AutoModelForQuestionAnswering if span else AutoModelForSeq2SeqLM
    base = auto_class.from_pretrained(given["model.path"])
    step = Path(given["run_dir"], "checkpoints/step-00000006")
    in_peft = PeftModel.from_pretrained(base, step).eval()
    ids = torch.arange(5, 25)[None]
    inputs = {"input_ids": ids} | ({} if span else {"decoder_input_ids": ids})
    with torch.no_grad():
        ours, theirs = (model(**inputs, return_dict=True) for model in (trained.eval(), in_peft))
    name = "start_logits" if span else "logits"
    torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-5)

    data = ["--data", given["data.dev"]]
    for options in ([], ["--merge", "true"]):
        out = tmp_path / f"export{len(options)}"
        line = ["export", given["run_dir"], "--out", str(out), "--verify", given["data.dev"], *options]
        assert main(line) == 0
        assert "the same answers as the checkpoint" in capsys.readouterr().err
        assert main(["evaluate", "--model", str(out), *data, "--precision", "fp32"]) == 0
        score = json.loads(capsys.readouterr().out)
        assert main(["evaluate", "--model", given["run_dir"], *data, "--precision", "fp32"]) == 0
        assert json.loads(capsys.readouterr().out) == pytest.approx(score, rel=1e-4)
    assert (tmp_path / "export2/model.safetensors").exists()
    assert not (tmp_path / "export2/adapter_config.json").exists()
    assert auto_class.from_pretrained(tmp_path / "export2")


def test_frozen_layers_in_bf16_give_the_same_bits(given: Any, tmp_path: Path, assert_same_bits: Any) -> None:
    bf16 = given | {"precision": "bf16", "max_steps": 3}
    assert run(bf16) == 0
    half = bf16 | {"run_dir": tmp_path / "half", "peft.base_dtype": "bf16"}
    assert run(half) == 0
    assert_same_bits(weights(half, 3), weights(bf16, 3))


@pytest.mark.parametrize("method", ["lora", "dora", "rslora"])
def test_adapters_begin_without_effect_and_merge(method: str, tiny_model: Path) -> None:
    from plainloop.models.spans import load_span_model

    model = load_span_model(str(tiny_model), new_head=True).eval()
    inputs = {"input_ids": torch.arange(5, 25)[None], "attention_mask": torch.ones(1, 20, dtype=torch.int64)}
    plain = model(**inputs)
    names = list(dict(model.named_parameters()))
    options: dict[str, Any] = {"rank": 4, "targets": ["query", "dense"], "alpha": None, "dropout": 0.0}
    adapters.add_adapters(model.network, model.head, **options, method=method, seed=1)
    assert torch.equal(model(**inputs), plain)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    adapted = model(**inputs)
    assert (adapted - plain).abs().max() > 1e-3
    adapters.merge_adapters(model.network)
    torch.testing.assert_close(model(**inputs), adapted, atol=1e-5, rtol=1e-5)
    assert list(dict(model.named_parameters())) == names


def test_another_base_is_refused(options: Any, tmp_path: Path, capfd: Any) -> None:
    options |= SPAN | {"data.dev": options["data.train"]}
    other = tmp_path / "other"
    shutil.copytree(options["model.path"], other)
    assert run(options, stop_at_step=2) == 75
    moved = tmp_path / "moved"
    shutil.copytree(other, moved)
    evaluate = ["evaluate", "--model", options["run_dir"], "--data", options["data.train"]]
    capfd.readouterr()
    assert main([*evaluate, "--base", str(moved)]) == 0
    alone = options | {"model.path": str(Path(options["run_dir"]) / "checkpoints/step-00000002")}
    assert run(alone, run_dir=tmp_path / "alone") == 2
    assert "has only adapters; give a whole model, or merge them first" in capfd.readouterr().err
    changed = {name: tensor + 1 for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    expected = f"{other}: not the base model of these adapters, which was {options['model.path']} (SHA-256"
    assert main([*evaluate, "--base", str(other)]) == 2
    assert expected in capfd.readouterr().err
    allow = {"checkpoint.allow_changes": "[model.path]"}
    assert run(options | {"model.path": str(other)}, **allow) == 2
    assert expected in capfd.readouterr().err
    assert main([*evaluate, "--base", str(tmp_path / "nowhere")]) == 2
    assert "the base model of these adapters is not there; fetch it" in capfd.readouterr().err
    on_moved = options | {"model.path": str(moved), "run_dir": tmp_path / "on_moved"}
    assert run(on_moved, stop_at_step=2) == 75
    replay = ["replay", str(on_moved["run_dir"]), "--step", "2", "--losses", "true"]
    assert main(replay) == 0
    save_file(changed, moved / "model.safetensors", metadata={"format": "pt"})
    assert main(replay) == 2
    assert f"{moved}: not the base model of these adapters" in capfd.readouterr().err
    assert main([*replay, "--base", options["model.path"]]) == 0


def test_layers_that_share_their_weight_are_refused(tiny_t5: Path) -> None:
    """T5's output is its embedding: a merged adapter would change both."""
    from plainloop.models.seq2seq import load_seq2seq_model

    network = load_seq2seq_model(str(tiny_t5)).network
    options: dict[str, Any] = {"rank": 4, "alpha": None, "dropout": 0.0, "method": "lora", "seed": 1}
    with pytest.raises(
        InputError, match="lm_head is the head or shares its weight; choose from k, o, q, v, w"
    ):
        adapters.add_adapters(network, (), targets=["q", "lm_head"], **options)


def test_a_run_goes_on_as_it_began(options: Any, capfd: Any) -> None:
    """With or without adapters, and with the same optimizer."""
    assert run(options, stop_at_step=2, max_steps=6) == 75
    capfd.readouterr()
    assert run(options | SPAN, **{"checkpoint.allow_changes": "[peft]"}) == 2
    assert "a run with adapters can't go on without them, nor the other way round" in capfd.readouterr().err
    allowed = {"checkpoint.allow_changes": "[optim.name]", "optim.name": "adafactor", "max_steps": 6}
    assert run(options, **allowed) == 2
    assert "has the state of adamw, with which adafactor can't go on" in capfd.readouterr().err


def test_merged_export_keeps_the_calibration(options: Any, tmp_path: Path, capfd: Any) -> None:
    assert run(options | SPAN) == 0
    assert main(["calibrate", "--model", options["run_dir"], "--data", options["data.train"]]) == 0
    assert main(["export", options["run_dir"], "--out", str(tmp_path / "out"), "--merge", "true"]) == 0
    question = ["--question", "Who built it?", "--context", "Ada built it."]
    line = ["predict", "--model", str(tmp_path / "out"), *question, "--null_threshold", "calibrated"]
    assert main(line) == 0, capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"peft.targets": "[query, qq]"},
            "peft.targets: qq is no linear layer of the model; choose from dense, key, query, value.",
        ),
        (
            {"peft.targets": "[qa_outputs]"},
            "qa_outputs is the head or shares its weight; choose from d",
        ),
        ({"peft.rank": 0}, "peft.targets has no effect with peft.rank 0; leave it out"),
        ({"peft.base_dtype": "bf16"}, "peft.base_dtype bf16 needs precision bf16"),
        ({"peft.rank": -1}, "peft.rank is -1, but must be at least 0"),
    ],
)
def test_bad_options(changes: Any, message: str, options: Any, capsys: Any) -> None:
    assert run(options | SPAN, **changes) == 2
    assert message in capsys.readouterr().err


def test_peft_is_not_installed(options: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    assert run(options | SPAN) == 2
    assert "peft.rank needs the package peft: pip install 'plainloop[peft]'" in capsys.readouterr().err


def test_damaged_adapters_are_noticed(options: Any, capfd: Any) -> None:
    options |= SPAN | {"checkpoint.every_steps": 2, "max_steps": 4}
    assert run(options) == 0
    file = Path(options["run_dir"]) / "checkpoints/step-00000004/adapter_model.safetensors"
    with open(file, "r+b") as stream:
        stream.seek(-3, os.SEEK_END)
        stream.write(b"\x7f")
    capfd.readouterr()
    assert run(options) == 0
    said = capfd.readouterr().err
    assert "adapter_model.safetensors has a different SHA-256" in said and "step-00000002 at step 2" in said

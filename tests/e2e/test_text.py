"""Task text end to end: bitwise resume, any number of ranks, evaluation during training, published scores."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plainloop.data.readers.causalqa import TextOptions, read_text
from plainloop.trainer.loop import Verdict
from plainloop.trainer.tasks.generation import best_of_windows

LOSSES = ("step", "loss", "grad_norm")


def losses(metrics: Any, run_dir: Any) -> list[tuple[float, ...]]:
    return [tuple(record[name] for name in LOSSES) for record in metrics(run_dir, "train")]


def test_stopped_after_every_step_and_resumed(
    text_options: Any, train: Any, metrics: Any, tensors: Any, assert_same_bits: Any, tmp_path: Path
) -> None:
    lines = {"log.every_steps": 4, "max_steps": 9}
    assert train(**lines) == Verdict.COMPLETED
    for step in range(1, 9):
        assert train(run_dir=tmp_path / "stopped", stop_at_step=step, **lines) == Verdict.STOPPED
    assert train(run_dir=tmp_path / "stopped", **lines) == Verdict.COMPLETED
    assert_same_bits(tensors(tmp_path / "stopped", 9), tensors(text_options["run_dir"], 9))
    assert losses(metrics, tmp_path / "stopped") == losses(metrics, text_options["run_dir"])


@pytest.mark.slow
def test_two_processes_stopped_and_resumed_with_adafactor(
    text_options: Any, launch: Any, metrics: Any, tensors: Any, assert_same_bits: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    changes = text_options | {
        "data.workers": 2,
        "max_steps": 6,
        "optim.name": "adafactor",
        "log.every_steps": 3,
    }
    launch(2, "train", changes | {"data.workers": 0})
    launch(2, "train", changes | {"run_dir": tmp_path / "stopped", "stop_at_step": 4}, expect=1)
    launch(2, "train", changes | {"run_dir": tmp_path / "stopped"})
    assert_same_bits(tensors(tmp_path / "stopped", 6), tensors(text_options["run_dir"], 6))
    assert losses(metrics, tmp_path / "stopped") == losses(metrics, text_options["run_dir"])


@pytest.mark.slow
def test_one_and_two_processes_give_the_same_loss_curve_and_texts(
    text_options: Any, text_files: tuple[Path, Path], launch: Any, metrics: Any, tmp_path: Path
) -> None:
    changes = text_options | {"model.dropout": 0.0, "max_steps": 10}
    launch(0, "train", changes)
    launch(2, "train", changes | {"run_dir": tmp_path / "two"})
    pairs = zip(losses(metrics, tmp_path / "two"), losses(metrics, text_options["run_dir"]), strict=True)
    assert max(abs(a[1] - b[1]) / b[1] for a, b in pairs) < 1e-5
    scoring = {
        "model": text_options["run_dir"], "data": text_files[1], "cache_dir": tmp_path / "c",
        "precision": "fp32", "tokens_per_device": 400,
    }  # fmt: skip
    results = []
    for processes in (0, 2, 3):
        launch(processes, "evaluate", scoring | {"out_dir": tmp_path / f"out{processes}"})
        results.append(json.loads((tmp_path / f"out{processes}/results.json").read_text()))
    assert len(results[0]["predictions"]) == 40 and set(results[0]) == {
        "checkpoint",
        "metrics",
        "predictions",
    }
    for other in results[1:]:  # the losses are summed in another order
        assert other["metrics"].pop("loss") == pytest.approx(results[0]["metrics"]["loss"], rel=1e-12)
        assert other["predictions"] == results[0]["predictions"]
    results[0]["metrics"].pop("loss")
    assert results[0]["metrics"] == results[1]["metrics"] == results[2]["metrics"]


def test_evaluation_during_training_selects_the_best_checkpoint(
    text_options: Any, text_files: tuple[Path, Path], train: Any, metrics: Any
) -> None:
    train(
        **{"data.dev": text_files[1], "evaluation.every_steps": 5, "max_steps": 15, "text.generate": 10,
           "evaluation.best_metric": "loss", "evaluation.early_stopping": 2}
    )  # fmt: skip
    records = metrics(text_options["run_dir"], "evaluation")
    assert [record["step"] for record in records] == [5, 10, 15]
    best = min(records, key=lambda record: record["loss"])["step"]
    run_dir = Path(text_options["run_dir"])
    assert (run_dir / "best").resolve().name == f"step-{best:08d}"
    assert len(json.loads((run_dir / "evaluation/results.json").read_text())["predictions"]) == 10


def test_loss_only(text_options: Any, text_files: tuple[Path, Path], train: Any, metrics: Any) -> None:
    changes = {"data.dev": text_files[1], "text.generate": 0, "max_steps": 2}
    with pytest.raises(ValueError, match="set evaluation.best_metric to loss"):
        train(**changes)
    train(**changes, **{"evaluation.best_metric": "loss"})
    (record,) = metrics(text_options["run_dir"], "evaluation")
    assert record["loss"] > 0 and "em" not in record


def test_squad_as_text_with_windows(
    text_options: Any, squad_file: Path, train: Any, metrics: Any, capsys: Any, tmp_path: Path
) -> None:
    train(
        **{"data.train": squad_file, "data.dev": squad_file, "max_steps": 2, "text.max_source_length": 100,
           "text.stride": 16, "text.null_target": "<no answer>", "evaluation.best_metric": "exact"}
    )  # fmt: skip
    (record,) = metrics(text_options["run_dir"], "evaluation")
    assert record["total"] == 120 and record["HasAns_total"] + record["NoAns_total"] == 120
    said = capsys.readouterr().err
    assert "were split into windows" in said and "contexts are longer" in said and "were truncated" in said
    predictions = json.loads((Path(text_options["run_dir"]) / "evaluation/predictions.json").read_text())
    assert len(predictions) == 120


def test_fp16_warning_and_activation_checkpointing(text_options: Any, train: Any, capsys: Any) -> None:
    train(max_steps=1, precision="fp16", **{"model.activation_checkpointing": "true"})
    assert "precision fp16: this model overflows" in capsys.readouterr().err


def test_options_of_the_other_task_are_rejected(text_options: Any, launch: Any) -> None:
    for changes, message in (
        ({"data.stride": 3}, "data.stride has no effect with task text"),
        ({"task": "span"}, "text.max_new_tokens has no effect with task span"),
        (
            {"evaluation.best_metric": "exact", "data.dev": text_options["data.train"]},
            "evaluation.best_metric exact: this data gives f1, em, rougeL_precision",
        ),
    ):
        assert message in launch(0, "train", text_options | changes, expect=2).stderr


def test_answer_in_one_window_beats_a_confident_null_in_another() -> None:
    """Two windows of one question: one correctly and confidently predicts that it contains no answer."""
    owner, scores = np.array([0, 0, 1, 1]), np.array([-0.01, -0.7, -0.02, -0.03])
    texts = np.array(["none", "ice", "none", "none"])
    assert best_of_windows(owner, texts, scores, {"none"})[0][0] == "ice"
    assert best_of_windows(owner, texts, scores, set())[0][0] == "none"
    equal = best_of_windows(np.array([0, 0]), np.array(["first", "second"]), np.zeros(2), {"none"})
    assert equal == {0: ("first", 0.0)}


def test_wrong_kind_of_model(text_options: Any, tiny_model: Path, launch: Any) -> None:
    result = launch(0, "train", text_options | {"model.path": tiny_model}, expect=2)
    assert "not an encoder-decoder" in result.stderr and "Traceback" not in result.stderr


def test_published_predictions_give_the_published_scores(real_data: Path, launch: Any) -> None:
    predictions = real_data / "known/causalqa_squad2_252.json"
    known = json.loads(predictions.read_text())["reported"]
    data = real_data / "causalqa/squad2_valid_original_split.csv"
    scoring = {"predictions": predictions, "data": data}
    plain = json.loads(launch(0, "evaluate", scoring).stdout)
    resampled = json.loads(launch(0, "evaluate", scoring | {"rouge_bootstrap": "true"}).stdout)
    assert (plain["f1"], plain["em"]) == (known["f1"], known["em"])
    assert resampled == {name: known[name] for name in resampled} and len(resampled) == 5


@pytest.mark.slow
def test_real_vocabulary_real_data(
    real_data: Path, launch: Any, metrics: Any, text_options: Any, tmp_path: Path
) -> None:
    """A T5 with 2 + 2 layers from scratch: the loss falls, evaluation completes, 1 and 2 processes agree."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    folder, causalqa = tmp_path / "t5", real_data / "causalqa"
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32128, d_model=128, d_kv=32, d_ff=256, num_heads=4, num_layers=2, num_decoder_layers=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(real_data / "tokenizers/t5").save_pretrained(folder)
    train = [str(causalqa / f"squad{n}") for n in ("1_extra_train.csv", "2_train_original_split.partial.csv")]
    dev = causalqa / "squad2_valid_original_split.csv"
    changes = text_options | {
        "model.path": folder, "data.train": json.dumps(train), "data.dev": dev, "max_steps": 24,
        "optim.lr": 3e-4, "batch_size": 16, "tokens_per_device": 4096, "model.dropout": 0.0,
        "evaluation.every_steps": 0,
    }  # fmt: skip
    launch(0, "train", changes)
    launch(2, "train", changes | {"run_dir": tmp_path / "two"})
    one, two = losses(metrics, changes["run_dir"]), losses(metrics, tmp_path / "two")
    worst = max(abs(a[1] - b[1]) / b[1] for a, b in zip(one, two, strict=True))
    print(f"real T5 vocabulary: loss {one[0][1]:.2f} -> {one[-1][1]:.2f}; one and two processes: {worst:.1e}")
    assert worst < 1e-5 and one[-1][1] < one[0][1] - 0.5
    ids = [example.id for example in read_text([str(dev)], TextOptions())]
    found = [
        json.loads((Path(run) / "evaluation/results.json").read_text())
        for run in (changes["run_dir"], tmp_path / "two")
    ]
    assert len(found[0]["predictions"]) == len(ids) == len(set(ids)) == 252
    (a,), (b,) = (metrics(run, "evaluation") for run in (changes["run_dir"], tmp_path / "two"))
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert [a[k] for k in ("em", "f1", "rougeL_f1")] == [b[k] for k in ("em", "f1", "rougeL_f1")]

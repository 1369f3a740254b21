"""Sharded runs: the same curve as one process, exact resume, any number of ranks reads their checkpoints."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from plainloop.trainer.checkpoint.folder import verify
from plainloop.trainer.checkpoint.retention import drop_optimizer
from plainloop.trainer.checkpoint.sharded import write_shard
from plainloop.trainer.cli import main

FSDP = {"parallel.mode": "fsdp"}
STILL = {"model.dropout": 0, "model.attention_dropout": 0}
SHARDS = ["shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors"]


def curve(metrics: Any, run_dir: Any, kind: str = "train") -> dict[int, float]:
    return {record["step"]: record["loss"] for record in metrics(run_dir, kind)}


def difference(left: dict[int, float], right: dict[int, float]) -> float:
    """The largest relative difference."""
    assert left.keys() == right.keys()
    return max(abs(left[step] - right[step]) / right[step] for step in left)


@pytest.mark.parametrize(
    ("task", "ranks"),
    [("span", 2), *(pytest.param(*p, marks=pytest.mark.slow) for p in (("span", 4), ("text", 3)))],
)
def test_the_curve_and_the_answers_are_those_of_one_process(
    task: str, ranks: int, request: Any, launch: Any, metrics: Any, tmp_path: Path
) -> None:
    if task == "span":
        options = request.getfixturevalue("options") | STILL
        options |= {"data.dev": options["data.train"], "evaluation.num_best": 3}
    else:
        dev = str(request.getfixturevalue("text_files")[1])
        options = request.getfixturevalue("text_options") | {"model.dropout": 0, "data.dev": dev}
        options |= {"evaluation.tokens_per_device": 400}
    options |= {"evaluation.every_steps": 0}
    launch(0, "train", options | {"run_dir": tmp_path / "one"})
    launch(ranks, "train", options | FSDP | {"run_dir": tmp_path / "many"})
    found = difference(curve(metrics, tmp_path / "many"), curve(metrics, tmp_path / "one"))
    print(f"{task}, {ranks} ranks: 30 losses within {found:.1e}")
    assert found < 1e-5
    one, many = (
        {path.name: json.loads(path.read_text()) for path in (tmp_path / run / "evaluation").iterdir()}
        for run in ("one", "many")
    )
    assert one.keys() == many.keys()
    if task == "span":
        assert one["predictions.json"] == many["predictions.json"] and len(one["predictions.json"]) == 120
    else:  # texts, references, questions
        found, expected = (run["results.json"] for run in (many, one))
        del found["checkpoint"], expected["checkpoint"], found["metrics"], expected["metrics"]
        assert found == expected and all(len(texts) == 40 for texts in found.values())
    assert many["metrics.json"] == pytest.approx(one["metrics.json"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "ranks"), [("span", 2), ("text", 3)])
def test_evaluate_and_predict_share_the_model(
    task: str, ranks: int, request: Any, launch: Any, tmp_path: Path
) -> None:
    """With --parallel fsdp, the answers are those of one process, from shards of another number of ranks."""
    if task == "span":
        options, sizes = request.getfixturevalue("options"), {"tokens_per_device": 300}
        file = options["data.train"]
    else:
        options, sizes = request.getfixturevalue("text_options"), {"tokens_per_device": 400}
        file = str(request.getfixturevalue("text_files")[1])
    launch(4 if task == "span" else 2, "train", options | FSDP | {"max_steps": 6})
    model = {"model": options["run_dir"], "data": file, "precision": "fp32", **sizes}
    for name, processes, more in (("one", 0, {}), ("many", ranks, {"parallel": "fsdp"})):
        launch(processes, "evaluate", model | more | {"out_dir": tmp_path / name, "num_best": 20})
        launch(processes, "predict", model | more | {"out": tmp_path / f"{name}.jsonl"})
    one, many = (
        {path.name: json.loads(path.read_text()) for path in (tmp_path / name).iterdir()}
        for name in ("one", "many")
    )
    texts = "predictions.json" if task == "span" else "results.json"
    for scores in (one, many):
        scores[texts].pop("metrics", None)  # to their last digits
    assert many[texts] == one[texts]
    assert many["metrics.json"] == pytest.approx(one["metrics.json"], rel=1e-4)
    expected, found = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("one", "many")
    )
    assert [line["answer"] for line in found] == [line["answer"] for line in expected]
    score = "score" if task == "span" else "log_probability"
    assert [line[score] for line in found] == pytest.approx([line[score] for line in expected], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_resume_gives_the_same_bits(
    ranks: int, options: Any, launch: Any, metrics: Any, tensors: Any, assert_same_bits: Any, tmp_path: Path
) -> None:
    """Dropout is on, and every rank has several micro-batches."""
    changes = FSDP | {"tokens_per_device": 100, "max_steps": 6, "checkpoint.every_steps": 2, "seed": 3}
    launch(ranks, "train", options | changes)
    stopped = options | changes | {"run_dir": tmp_path / "stopped"}
    launch(ranks, "train", stopped | {"stop_at_step": 3}, expect=1)  # torchrun's code for 75
    resumed = launch(ranks, "train", stopped)
    assert "guaranteed: the same bits" in resumed.stdout + resumed.stderr
    assert_same_bits(tensors(tmp_path / "stopped", 6), tensors(options["run_dir"], 6))
    assert curve(metrics, tmp_path / "stopped") == curve(metrics, options["run_dir"])


@pytest.mark.slow
def test_another_layout_reads_the_checkpoint(options: Any, launch: Any, metrics: Any, tmp_path: Path) -> None:
    """4 ranks, then 2, then one with ddp, then hybrid on 4: the same batches and losses as one process."""
    options |= STILL | {"max_steps": 12}
    launch(0, "train", options | {"run_dir": tmp_path / "whole"})
    launch(4, "train", options | FSDP | {"stop_at_step": 3}, expect=1)
    launch(2, "train", options | FSDP | {"stop_at_step": 6}, expect=1)
    result = launch(0, "train", options | {"stop_at_step": 9}, expect=75)
    assert "different rounding: " in result.stdout + result.stderr
    launch(4, "train", options | FSDP | {"parallel.shard_size": 2})
    found = difference(curve(metrics, options["run_dir"]), curve(metrics, tmp_path / "whole"))
    print(f"fsdp 4, fsdp 2, ddp 1, hybrid 2 x 2: 12 losses within {found:.1e}")
    assert found < 1e-5
    assert {p.name for p in Path(options["run_dir"], "checkpoints").glob("*12/shard-*")} == set(SHARDS)


@pytest.mark.slow
def test_adafactor_on_shards(
    text_options: Any, launch: Any, metrics: Any, tensors: Any, assert_same_bits: Any, tmp_path: Path
) -> None:
    """The curve of one process; the same bits on the same ranks; read by other layouts."""
    options = text_options | {"optim.name": "adafactor", "max_steps": 12, "model.dropout": 0}
    launch(0, "train", options | {"run_dir": tmp_path / "whole"})
    launch(3, "train", options | FSDP | {"run_dir": tmp_path / "three"})
    launch(3, "train", options | FSDP | {"stop_at_step": 3}, expect=1)
    launch(3, "train", options | FSDP | {"stop_at_step": 6}, expect=1)
    same = tmp_path / "same"
    shutil.copytree(options["run_dir"], same)
    launch(3, "train", options | FSDP | {"run_dir": same})
    assert_same_bits(tensors(same, 12), tensors(tmp_path / "three", 12))
    launch(0, "train", options | {"stop_at_step": 9}, expect=75)
    launch(4, "train", options | FSDP | {"parallel.shard_size": 2})
    for run in (tmp_path / "three", options["run_dir"]):
        found = difference(curve(metrics, run), curve(metrics, tmp_path / "whole"))
        print(f"adafactor, {run}: 12 losses within {found:.1e}")
        assert found < 1e-5


@pytest.mark.slow
def test_damaged_shards_and_plain_weights(
    options: Any, launch: Any, metrics: Any, tensors: Any, tmp_path: Path, capsys: Any
) -> None:
    from transformers import AutoModelForQuestionAnswering

    run = Path(options["run_dir"])
    keep = {"checkpoint.every_steps": 2, "checkpoint.keep_last": 9, "max_steps": 6}
    launch(2, "train", options | FSDP | keep)
    folders = sorted((run / "checkpoints").iterdir())
    assert [f.name[-1] for f in folders] == ["2", "4", "6"]
    # The last has the weights for other tools too: those in the shards.
    assert [(f / "model.safetensors").exists() for f in folders] == [False, False, True]
    parts = [load_file(folders[2] / name) for name in SHARDS]
    network = AutoModelForQuestionAnswering.from_pretrained(folders[2])
    for name, weight in network.named_parameters():
        split = [part[f"weights/network.{name}"] for part in parts]
        assert torch.equal(torch.cat(split), weight), name
    drop_optimizer(folders[0])  # which would be its only weights
    # If that is interrupted where there are other weights, the checkpoint is still good.
    part = tmp_path / "interrupted"
    shutil.copytree(folders[2], part)
    manifest = json.loads((part / "manifest.json").read_text()) | dict.fromkeys(SHARDS)
    (part / "manifest.json").write_text(json.dumps(manifest))
    (part / SHARDS[0]).unlink()
    assert verify(part) is None
    assert main(["evaluate", "--model", str(part), "--data", options["data.train"]]) == 0
    capsys.readouterr()
    assert verify(folders[0]) is None and {p.name for p in folders[0].iterdir()} >= set(SHARDS)
    # A checkpoint that has only shards can be used and exported.
    data = ["--data", options["data.train"]]
    assert main(["evaluate", "--model", str(folders[1]), *data]) == 0
    score = json.loads(capsys.readouterr().out)
    assert main(["export", str(folders[1]), "--out", str(tmp_path / "plain")]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--model", str(tmp_path / "plain"), *data]) == 0
    assert json.loads(capsys.readouterr().out) == score
    # A flipped bit in one shard, a shard that is gone: the checkpoint before is taken.
    content = bytearray((folders[2] / SHARDS[1]).read_bytes())
    content[-5] ^= 16
    (folders[2] / SHARDS[1]).write_bytes(content)
    (folders[1] / SHARDS[0]).unlink()
    assert main(["export", str(folders[1]), "--out", str(tmp_path / "incomplete")]) == 2
    assert SHARDS[0] in capsys.readouterr().err
    result = launch(2, "train", options | FSDP | keep)
    said = result.stdout + result.stderr
    assert f"{SHARDS[1]} has a different SHA-256" in said and f"{SHARDS[0]} is missing" in said
    assert "resuming from" in said and "step-00000002 at step 2" in said
    assert sorted(curve(metrics, run)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_full_disk_ends_without_a_partial_checkpoint(options: Any, launch: Any, small_disk: Path) -> None:
    run = small_disk / "run"
    (small_disk / "filler").write_bytes(bytes(7_300_000))
    result = launch(2, "train", options | FSDP | {"run_dir": run, "max_steps": 2}, expect=1)
    assert (
        "the last checkpoint could not be written" in result.stderr
        and "Traceback" not in (result.stderr.partition("torch/distributed")[0])
    )
    assert list((run / "checkpoints").iterdir()) == []
    (small_disk / "filler").unlink()
    launch(2, "train", options | FSDP | {"run_dir": run, "max_steps": 2})
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "step", "fill_in", "background"),
    [(1, 3, "write_shard", "true"), (1, 3, "write_shard", "false"), (0, 4, "write_plain", "true")],
)
def test_old_checkpoints_make_room_on_a_full_disk(
    rank: int, step: int, fill_in: str, background: str, start: Any, small_disk: Path, tiny_model: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The disk fills up during a save, and the same save succeeds once an older checkpoint is deleted."""
    subprocess.run(["mount", "-o", "remount,size=150m", small_disk], check=True)
    model = tmp_path / "wider"  # 16 MB per shard; 11 MB of weights
    shutil.copytree(tiny_model, model)
    sizes = {"hidden_size": 384, "intermediate_size": 2304, "num_hidden_layers": 1}
    config = json.loads((model / "config.json").read_text()) | sizes
    (model / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.from_pretrained(model), add_pooling_layer=False).save_pretrained(model)
    changes = {"checkpoint.every_steps": 1, "checkpoint.keep_last": 2, "max_steps": 4}
    changes |= {"checkpoint.async": background, "run_dir": small_disk / "run", "model.path": model}
    job = start(2, fault={"rank": rank, "fill_at": step, "fill_in": fill_in}, restarts=0, **FSDP, **changes)
    code = job.end()
    # After step 3, the disk may be too full for the last checkpoint, which is larger.
    assert code == 0 or step < 4, job.output()
    assert (small_disk / "ballast").exists()
    saved = small_disk / f"run/checkpoints/step-{step:08d}"
    assert (
        f"step {step}: saved {saved}" in job.output() and f"step {step}: checkpoint NOT" not in job.output()
    )
    assert verify(saved) is None


@pytest.mark.slow
def test_the_optimizer_of_the_best_can_be_dropped(options: Any, launch: Any) -> None:
    changes = {
        "data.dev": options["data.train"], "evaluation.every_steps": 2, "checkpoint.every_steps": 2,
        "evaluation.best_metric": "HasAns_exact", "checkpoint.keep_last": 1, "max_steps": 6,
        "checkpoint.keep_optimizer": "last",
    }  # fmt: skip
    launch(2, "train", options | FSDP | changes)
    best = (Path(options["run_dir"]) / "best").resolve()
    assert best.name == "step-00000002"  # all are 0: the first is the best
    names = {path.name for path in best.iterdir()}
    assert "model.safetensors" in names and not names & set(SHARDS)
    assert main(["evaluate", "--model", str(best), "--data", options["data.train"]]) == 0
    shutil.rmtree(max((Path(options["run_dir"]) / "checkpoints").iterdir()))
    result = launch(2, "train", options | FSDP | changes, expect=1)
    assert "was kept without its optimizer" in result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": "fsdp"}, "parallel fsdp: needs several processes; start with torchrun"),
        ({"parallel.shard_size": 2}, "parallel.shard_size has no effect with parallel ddp"),
        ({**FSDP, "parallel.shard_size": 1}, "parallel.shard_size is 1, but must be at least 2"),
        ({**FSDP, "optim.name": "adamw8bit"}, "adamw8bit works on whole tensors"),
        ({**FSDP, "parallel.gather_dtype": "bf16"}, "parallel.gather_dtype bf16 needs precision bf16"),
        ({"parallel": "zero"}, "parallel.mode"),
    ],
)
def test_bad_options_are_one_line(changes: Any, message: str, options: Any, capsys: Any) -> None:
    arguments = [text for name, value in (options | changes).items() for text in (f"--{name}", str(value))]
    assert main(["train", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("error:") == 1 and "Traceback" not in said


@pytest.mark.slow
def test_the_ranks_must_be_a_multiple_of_the_shards(options: Any, launch: Any) -> None:
    result = launch(2, "train", options | FSDP | {"parallel.shard_size": 3}, expect=1)
    assert "parallel.shard_size 3: must be at least 2 and divide the number of ranks, 2" in result.stderr


def test_a_disk_that_fills_up_while_a_shard_is_written(small_disk: Path) -> None:
    """safetensors does not raise an OSError; without one, a rank would end the run with a traceback."""
    with pytest.raises(OSError, match="No space left"):
        write_shard(small_disk, {"weights/a": torch.zeros(3_000_000)}, 0, 2)

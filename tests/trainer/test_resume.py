"""What a resume rejects, allows and guarantees; and restarting a finished run."""

import json
from pathlib import Path
from typing import Any

import pytest

from plainloop.data.errors import InputError
from plainloop.trainer.loop import Verdict


def test_changed_option_is_rejected_unless_allowed_by_name(options: Any, train: Any, capsys: Any) -> None:
    train(stop_at_step=2)
    with pytest.raises(
        InputError, match=r"optim.lr: 0.001 -> 0.002; seed: 42 -> 43|seed: 42 -> 43; optim.lr"
    ):
        train(seed=43, **{"optim.lr": 2e-3})
    allowed = {"optim.lr": 2e-3, "checkpoint.allow_changes": "[optim.lr]"}
    assert train(stop_at_step=4, **allowed) == Verdict.STOPPED
    assert "weights and optimizer state only; allowed changes: optim.lr" in capsys.readouterr().err
    assert train(stop_at_step=6, **{"optim.lr": 2e-3}) == Verdict.STOPPED  # now part of this run's config
    assert "guaranteed: the same bits" in capsys.readouterr().err


def test_one_changed_question_in_the_data_is_rejected(options: Any, train: Any, tmp_path: Path) -> None:
    train(stop_at_step=2)
    content = json.loads(Path(options["data.train"]).read_text())
    content["data"][0]["paragraphs"][0]["qas"][0]["question"] += "?"
    (tmp_path / "changed.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="data: the training data"):
        train(**{"data.train": tmp_path / "changed.json"})


def test_another_batch_layout_only_affects_rounding(train: Any, capsys: Any) -> None:
    train(stop_at_step=2)
    train(stop_at_step=3, tokens_per_device=300)
    said = capsys.readouterr().err
    assert "the same data and schedule, different rounding: tokens_per_device 200 -> 300" in said


def test_sampler_that_yields_other_rows_is_detected(
    options: Any, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a numpy version that permutes differently."""
    from plainloop.data.samplers import Sampler

    train(stop_at_step=3)
    original = Sampler.epoch_batches
    monkeypatch.setattr(Sampler, "epoch_batches", lambda self, epoch: original(self, epoch)[::-1])
    with pytest.raises(InputError, match="its 3 steps were trained on different rows"):
        train()


def test_restarted_finished_run_writes_nothing(options: Any, train: Any, capsys: Any, tensors: Any) -> None:
    assert train(max_steps=3) == Verdict.COMPLETED
    checkpoint = Path(options["run_dir"]) / "checkpoints/step-00000003"
    before = {file.name: file.stat().st_mtime_ns for file in checkpoint.iterdir()}
    capsys.readouterr()
    assert train(max_steps=3) == Verdict.COMPLETED
    assert "nothing is left to do" in capsys.readouterr().err
    assert before == {file.name: file.stat().st_mtime_ns for file in checkpoint.iterdir()}


@pytest.mark.parametrize("how", ["true", "false"])
def test_async_and_synchronous_saves_are_bitwise_identical(
    how: str, options: Any, train: Any, tensors: Any, assert_same_bits: Any, tmp_path: Path
) -> None:
    train(max_steps=4, run_dir=tmp_path / "other", **{"checkpoint.every_steps": 1})
    train(max_steps=4, **{"checkpoint.every_steps": 1, "checkpoint.async": how})
    for step in (3, 4):
        assert_same_bits(tensors(options["run_dir"], step), tensors(tmp_path / "other", step))


def test_concurrent_reader_always_finds_a_valid_checkpoint(options: Any, train: Any) -> None:
    """`evaluate --model RUN` while the run saves checkpoints, updates `best` and deletes old ones."""
    import threading

    from plainloop.trainer.trained.evaluate import checkpoint_path

    run_dir, found, ended = Path(options["run_dir"]), [], threading.Event()

    def read() -> None:
        while not ended.is_set():
            if (run_dir / "best").exists():
                try:
                    found.append(checkpoint_path(str(run_dir)))
                except Exception as error:
                    found.append(repr(error))

    reader = threading.Thread(target=read)
    reader.start()
    often = {"checkpoint.every_steps": 1, "checkpoint.keep_last": 1, "evaluation.every_steps": 1}
    train(max_steps=20, **often, **{"data.dev": options["data.train"], "evaluation.best_metric": "loss"})
    ended.set()
    reader.join()
    assert len(found) > 20 and len(set(found)) > 3
    assert not [path for path in found if not path.startswith(str(run_dir / "checkpoints/step-"))]


def test_damage_to_any_file_of_a_real_checkpoint_is_detected(options: Any, train: Any) -> None:
    """A flipped bit, a truncated file and a missing file are detected and named."""
    from plainloop.trainer.checkpoint.folder import verify

    train(stop_at_step=1)
    folder = Path(options["run_dir"]) / "checkpoints/step-00000001"
    files = list(folder.iterdir())
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {file.name for file in files}
    for file in files:
        content = file.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
        for damaged in (flipped, content[:-1]):
            file.write_bytes(damaged)
            assert file.name in str(verify(folder)) or file.name == "manifest.json" and verify(folder)
        file.unlink()
        assert file.name in str(verify(folder))
        file.write_bytes(content)
    assert verify(folder) is None


@pytest.mark.parametrize("key", ["optimizer.safetensors", "scaler", "order"])
def test_partial_state_is_rejected_even_with_a_matching_manifest(key: str, options: Any, train: Any) -> None:
    import hashlib

    train(stop_at_step=1)
    folder = Path(options["run_dir"]) / "checkpoints/step-00000001"
    manifest = json.loads((folder / "manifest.json").read_text())
    if key in manifest:
        (folder / key).unlink()
        del manifest[key]
    else:
        state = json.loads((folder / "state.json").read_text())
        del state[key]
        (folder / "state.json").write_text(json.dumps(state))
        content = (folder / "state.json").read_bytes()
        manifest["state.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=f"no checkpoint in .* is good.*(?s:.*){key}"):
        train()

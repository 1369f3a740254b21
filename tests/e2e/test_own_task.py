"""A task and hooks of your own, given by import path, and `train` called from Python."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from plainloop.data.errors import InputError
from plainloop.trainer.config.options import TrainConfig
from plainloop.trainer.config.parse import parse
from plainloop.trainer.loop import Verdict
from plainloop.trainer.run import train
from plainloop.trainer.state import Progress
from plainloop.trainer.tasks.find import find_hooks, find_task

TASK = Path(__file__).parents[1] / "helpers/answerable.py"


@pytest.fixture
def own(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a run of the third task, whose file lies in the working directory."""
    shutil.copy(TASK, tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_hooks.py").write_text(
        "class Count:\n"
        "    def __init__(self):\n        self.steps = []\n"
        "    def __call__(self, progress):\n"
        "        self.steps.append(progress.state.step)\n"
        "        if progress.due(2):\n"
        "            progress.log.record('count', progress.state.step, {'boundaries': len(self.steps)})\n"
        "def shout(progress):\n    pass\n"
        "def needs_two(progress, more):\n    pass\n"
        "class NotATask:\n    pass\n"
    )
    (tmp_path / "broken.py").write_text("import json\njson.no_such_name\n")
    options.pop("data.stride")
    return options | {
        "task": "answerable:Answerable", "data.dev": options["data.train"], "max_steps": 6,
        "evaluation.best_metric": "accuracy", "evaluation.every_steps": 3,
    }  # fmt: skip


def config_of(options: dict[str, Any]) -> TrainConfig:
    return parse(TrainConfig, [f"--{name}={value}" for name, value in options.items()], program="test")


def test_third_task_is_short_and_complete() -> None:
    assert len(TASK.read_text().splitlines()) <= 100


@pytest.mark.slow
def test_two_ranks_resume_and_evaluate_every_example_once(
    own: Any, launch: Any, tensors: Any, assert_same_bits: Any, tmp_path: Path, metrics: Any
) -> None:
    launch(2, "train", own)
    launch(2, "train", own | {"run_dir": tmp_path / "halves", "stop_at_step": 4}, expect=None)
    launch(2, "train", own | {"run_dir": tmp_path / "halves"})
    assert_same_bits(tensors(own["run_dir"], 6), tensors(tmp_path / "halves", 6))
    found = json.loads((Path(own["run_dir"]) / "evaluation/predictions.json").read_text())
    assert len(found) == 120 and set(found.values()) <= {True, False}
    scoring = {
        "task": own["task"], "model": own["run_dir"], "data": own["data.train"], "precision": "fp32",
        "out_dir": "scores",
    }  # fmt: skip
    scored = json.loads(launch(2, "evaluate", scoring | {"max_length": 96}).stdout)
    recorded = {record["step"]: record for record in metrics(own["run_dir"], "evaluation")}
    best = int((Path(own["run_dir"]) / "best").resolve().name.rpartition("-")[2])
    assert scored["accuracy"] == recorded[best]["accuracy"]
    assert scored["loss"] == pytest.approx(recorded[best]["loss"], rel=1e-5)
    del scoring["task"]  # a checkpoint may be of anybody: its code is not run unasked
    error = launch(0, "evaluate", scoring, expect=2).stderr
    assert "was trained with a task of your own; name it: --task answerable:Answerable" in error
    error = launch(0, "evaluate", scoring | {"task": own["task"], "num_best": 5}, expect=2).stderr
    assert "--num_best: no effect with task answerable:Answerable" in error


@pytest.mark.slow
def test_gradient_does_not_depend_on_ranks_or_micro_batches(own: Any, launch: Any, metrics: Any) -> None:
    still = own | {"model.dropout": 0.0, "model.attention_dropout": 0.0, "max_steps": 3}
    still |= {"evaluation.every_steps": 0, "checkpoint.every_steps": 0}
    with pytest.raises(InputError, match="model.attention_dropout has no effect with task answerable"):
        train(config_of(still))
    del still["model.attention_dropout"], still["model.dropout"]
    source = (
        Path("answerable.py")
        .read_text()
        .replace("num_labels=2)", "num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)")
    )
    Path("answerable.py").write_text(source)
    curves = []
    for number, (ranks, max_tokens) in enumerate([(0, 2000), (0, 100), (2, 300)]):
        launch(ranks, "train", still | {"run_dir": f"run{number}", "tokens_per_device": max_tokens})
        curves.append([(r["loss"], r["grad_norm"]) for r in metrics(f"run{number}", "train")])
    for curve in curves[1:]:
        assert curve == [pytest.approx(pair, rel=1e-5) for pair in curves[0]]


def test_hooks_by_import_path(own: Any, launch: Any, metrics: Any) -> None:
    launch(2, "train", own | {"hooks": "[my_hooks:Count, my_hooks:shout]"})
    assert [r["boundaries"] for r in metrics(own["run_dir"], "count")] == [3, 5, 7]


def test_two_runs_in_one_process_with_hooks(own: Any, tensors: Any, assert_same_bits: Any) -> None:
    seen: list[int] = []

    def see(progress: Progress) -> None:
        seen.append(progress.state.step)
        assert progress.total_steps == 6 and progress.world.size == 1

    results = [train(config_of(own | {"run_dir": name}), hooks=[see]) for name in ("first", "second")]
    assert seen == [*range(7)] * 2
    for result, name in zip(results, ("first", "second"), strict=True):
        assert (result.verdict, result.step, result.metrics["step"]) == (Verdict.COMPLETED, 6, 6)
        assert result.best is not None and result.best.parent == Path(name).resolve() / "checkpoints"
    assert_same_bits(tensors("first", 6), tensors("second", 6))
    stopped = train(config_of(own | {"run_dir": "third", "stop_at_step": 2}))
    assert (stopped.verdict, stopped.step, stopped.best) == (Verdict.STOPPED, 2, None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other", "must be span, text, or module:Class"),
        ("nowhere:Task", "No module named 'nowhere'. Modules are searched in the working directory"),
        ("my_hooks:Missing", "my_hooks has no Missing"),
        ("my_hooks:NotATask", "has no files, read, metrics"),
        ("my_hooks:", "must be module:name"),
        ("my_hooks:shout", "must be a class"),
        ("broken:Task", "importing broken failed: AttributeError: .* in .*broken.py:2"),
    ],
)
def test_task_that_cannot_be_used_is_a_clear_error(own: Any, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_task(name)


def test_task_with_other_arguments_is_a_clear_error(own: Any) -> None:
    source = Path("answerable.py").read_text()
    Path("changed.py").write_text(source.replace("def read(self, files:", "def read(self, paths:"))
    with pytest.raises(InputError, match=r"read takes \(paths\), but must take \(files\)"):
        find_task("changed:Answerable")
    Path("odd.py").write_text(source.replace('] = ("data.max_length",)', '] = ("data.maximum",)'))
    with pytest.raises(InputError, match="uses names data.maximum, which is no such option"):
        find_task("odd:Answerable")
    Path("bare.py").write_text(source.replace("self.tokenizer = load_tokenizer(config.model.path)", "pass"))
    with pytest.raises(InputError, match="task bare:Answerable: __init__ must set self.tokenizer"):
        train(config_of(own | {"task": "bare:Answerable"}))


def test_hook_that_cannot_be_called_is_a_clear_error(own: Any) -> None:
    with pytest.raises(InputError, match="hooks my_hooks:needs_two: must be a function of one argument"):
        find_hooks(["my_hooks:needs_two"])
    assert len(find_hooks(["my_hooks:Count", "my_hooks:shout"])) == 2


@pytest.mark.slow
def test_changed_code_of_an_own_task_is_not_resumed(own: Any, launch: Any) -> None:
    """Its features may differ, and there is no version to raise."""
    launch(0, "train", own | {"stop_at_step": 2}, expect=75)
    with open("answerable.py", "a") as stream:
        stream.write("\n# changed\n")
    error = launch(0, "train", own, expect=2).stderr
    assert "data: the training data, the tokenizer, or the code that reads them changed" in error

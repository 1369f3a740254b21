"""Config: YAML and overrides; every error is one line that names the file and the option."""

from pathlib import Path

import pytest

from plainloop.data.errors import InputError
from plainloop.trainer.config.options import TrainConfig
from plainloop.trainer.config.parse import parse, to_yaml
from plainloop.trainer.config.validate import config_differences, validate
from plainloop.trainer.tasks.find import find_task


def parsed(*arguments: str) -> TrainConfig:
    return parse(TrainConfig, list(arguments), program="test")


def test_file_overrides_and_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("batch_size: 4\noptim: {lr: 1e-4, betas: [0.8, 0.99]}\n")
    config = parsed("--config", str(file), "--optim.lr", "3e-5", "--model.dropout=0.2")
    assert (config.batch_size, config.optim.lr, config.model.dropout) == (4, 3e-5, 0.2)
    assert tuple(config.optim.betas) == (0.8, 0.99) and config.epochs == 2
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert parsed("--config", str(tmp_path / "again.yaml")) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_sise: 4", "unknown option 'batch_sise'; did you mean batch_size?"),
        ("optim: {lrr: 4}", "unknown option 'optim.lrr'; did you mean optim.lr?"),
        ("batch_size: 4\nbatch_size: 5", "line 1: duplicate key 'batch_size'"),
        ("a: [", "not a YAML file"),
        ("- 1", "not a config"),
        ("batch_size: many", "batch_size"),
        ("data: {train: no}", "data.train"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        parsed("--config", str(tmp_path / "bad.yaml"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "1"], "unknown option --lr; did you mean optim.lr?"),
        (["--optim.lr", "abc"], "optim.lr"),
        (["--precision", "bf17"], "precision"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--batch_size"], "batch_size"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parsed(*arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_all_invalid_values_are_reported_at_once() -> None:
    config = parsed("--batch_size", "0", "--optim.lr", "-1", "--checkpoint.every_steps", "-5")
    with pytest.raises(InputError) as caught:
        validate(config, uses=(), metric_names=("loss",))
    faults = ("data.train", "batch_size is 0", "optim.lr is -1", "checkpoint.every_steps is -5")
    for name in (*faults, "evaluation.best_metric is f1, but must be one of loss"):
        assert name in str(caught.value)


def test_only_options_that_affect_the_math_count_as_differences() -> None:
    from dataclasses import asdict

    before = asdict(parsed("--tokens_per_device", "100", "--seed", "1"))
    assert config_differences(parsed("--data.workers", "2", "--seed", "1"), before, set()) == []
    assert config_differences(parsed("--seed", "2", "--optim.lr", "1e-4"), before, set()) == [
        "seed: 1 -> 2", "optim.lr: 3e-05 -> 0.0001",
    ]  # fmt: skip
    assert config_differences(parsed("--seed", "2"), before, {"seed"}) == []


def test_the_recipes_are_valid() -> None:
    recipes = sorted((Path(__file__).parents[2] / "launch/recipes").glob("*.yaml"))
    assert len(recipes) >= 2
    for recipe in recipes:
        config = parsed("--config", str(recipe), "--data.train", "x.json")
        task = find_task(config.task)
        validate(config, uses=task.uses, metric_names=task.metric_names)

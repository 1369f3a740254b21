"""The training step and the loop around it, on the tiny model in this process."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plainloop.data.errors import InputError
from plainloop.data.types import MicroBatch, StepBatch
from plainloop.trainer.config.options import OptimConfig
from plainloop.trainer.distributed.parallel import Parallel
from plainloop.trainer.distributed.world import World
from plainloop.trainer.errors import RunError
from plainloop.trainer.loop import StepOptions, Verdict, dropout_seed, train_step
from plainloop.trainer.optim import learning_rate, make_optimizer, parameter_groups
from plainloop.trainer.precision import autocast, make_scaler
from plainloop.trainer.state import TrainState, best_step, due

CPU = torch.device("cpu")


class Linear(torch.nn.Linear):
    """A model with keyword inputs."""

    def forward(self, *, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x)


def make(precision: str = "fp32") -> tuple[TrainState, StepOptions]:
    torch.manual_seed(0)
    model = Linear(3, 1)
    state = TrainState(
        model, Parallel(model), make_optimizer(model, OptimConfig()), make_scaler(precision, CPU), CPU
    )

    def loss_sum(logits: torch.Tensor, labels: dict[str, torch.Tensor]) -> torch.Tensor:
        return ((logits.float() - labels["y"]) ** 2).sum()

    return state, StepOptions(loss_sum, lambda _: 0.1, World(0, 1, 0, CPU), 1, precision, 1.0)


def batch(*targets: float) -> StepBatch:
    parts = [MicroBatch({"x": torch.ones(1, 3)}, {"y": torch.tensor([[t]])}) for t in targets]
    return StepBatch(
        parts,
        num_targets=len(targets),
        examples=len(targets),
        tokens=1,
        padded_tokens=1,
        rows=np.arange(len(targets)),
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_step_is_counted_and_not_applied(precision: str, bad: float) -> None:
    state, options = make(precision)
    for _ in range(5):  # fp16 skips its first steps to find a loss scale
        train_step(state, batch(1.0, 2.0), options)
    skipped = int(state.nonfinite_total)
    assert skipped < 5 and int(state.nonfinite_streak) == 0
    before = {k: v.clone() for k, v in state.model.state_dict().items() | state.optimizer_tensors().items()}
    train_step(state, batch(1.0, bad), options)
    after = state.model.state_dict() | state.optimizer_tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (int(state.nonfinite_streak), int(state.nonfinite_total)) == (1, skipped + 1)
    assert not math.isfinite(state.loss_sum.item())
    train_step(state, batch(1.0, 2.0), options)
    assert (int(state.nonfinite_streak), int(state.nonfinite_total)) == (0, skipped + 1)
    assert not torch.equal(before["weight"], state.model.state_dict()["weight"])


def test_infinite_loss_with_finite_gradients_is_not_applied() -> None:
    state, options = make()
    before = state.model.weight.detach().clone()  # type: ignore[operator, union-attr]
    constant = StepOptions(
        lambda logits, _: logits.sum() + math.inf, options.lr, options.world, 1, "fp32", 1.0
    )
    train_step(state, batch(1.0), constant)
    assert torch.equal(before, state.model.state_dict()["weight"]) and int(state.nonfinite_total) == 1


def test_run_with_nan_weights_stops_with_advice_and_logs_the_nan_loss(
    options: dict[str, Any], train: Any, metrics: Any, tiny_model: Path, tmp_path: Path, capsys: Any
) -> None:
    from safetensors.torch import load_file, save_file

    for file in tiny_model.iterdir():
        (tmp_path / "poisoned").mkdir(exist_ok=True)
        (tmp_path / "poisoned" / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "poisoned/model.safetensors")
    next(iter(weights.values()))[:] = math.nan
    save_file(weights, tmp_path / "poisoned/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="(?s)4 steps in a row, by step 4.*Try a lower optim.lr"):
        train(**{"model.path": tmp_path / "poisoned", "optim.max_nonfinite_steps": 4})
    assert [record["loss"] for record in metrics(options["run_dir"], "train")] == ["nan"] * 3
    assert "SKIPPED 1 non-finite" in capsys.readouterr().err
    assert not list((Path(options["run_dir"]) / "checkpoints").glob("step-*"))


def test_clipping_by_hand() -> None:
    state, options = make()
    seen: list[torch.Tensor] = []
    state.optimizer.register_step_pre_hook(lambda *_: seen.append(state.model.weight.grad.clone()))  # type: ignore
    state.model.weight.data.zero_()  # type: ignore[operator, union-attr]
    state.model.bias.data.zero_()  # type: ignore[operator, union-attr]
    train_step(state, batch(1.0, 3.0), options)
    # loss = ((0-1)^2 + (0-3)^2) / 2; each gradient = (2*-1 + 2*-3) / 2 = -4; norm of three weights and a bias
    # = 8
    assert state.grad_norm.item() == pytest.approx(8.0)
    assert seen[0].flatten().tolist() == pytest.approx([-0.5] * 3, rel=1e-4)
    assert state.loss_sum.item() / state.loss_count == 5.0


def test_dropout_seeds_are_distinct_and_reproducible() -> None:
    seeds = {dropout_seed(s, t, r, i) for s in range(3) for t in range(9) for r in range(3) for i in range(3)}
    assert len(seeds) == 243 and dropout_seed(1, 2, 3, 4) == dropout_seed(1, 2, 3, 4)


def test_learning_rates_by_hand() -> None:
    linear = learning_rate(OptimConfig(lr=1.0, warmup=4), 12)
    assert [linear(step) for step in (0, 1, 3, 4, 8, 11)] == [0.25, 0.5, 1.0, 1.0, 0.5, 0.125]
    cosine = learning_rate(OptimConfig(lr=1.0, warmup=0, schedule="cosine"), 8)
    assert [round(cosine(step), 6) for step in (0, 4, 6)] == [1.0, 0.5, 0.146447]
    share = learning_rate(OptimConfig(lr=1.0, warmup=0.5, schedule="constant"), 8)
    assert [share(step) for step in (0, 3, 7)] == [0.25, 1.0, 1.0]


def test_no_decay_on_biases_and_norms(tiny_model: Path) -> None:
    from plainloop.models.spans import load_span_model

    model = load_span_model(str(tiny_model), new_head=True)
    names = {p: name for name, p in model.named_parameters()}
    decayed, free = (
        {names[p] for p in group["params"]}
        for group in parameter_groups(model, 0.01)  # type: ignore[attr-defined]
    )
    assert all(name.endswith("bias") or "LayerNorm" in name for name in free) and len(free) > 10
    assert not any(name.endswith("bias") or "LayerNorm" in name for name in decayed)
    assert len(decayed | free) == len(names)


def test_due() -> None:
    assert [step for step in range(11) if due(step, 4, 10)] == [4, 8, 10]
    assert [step for step in range(11) if due(step, 0, 10)] == [10]
    assert [step for step in range(11) if due(step, 5, 10, first=True, last=False)] == [0, 5]


def test_best_step_is_the_first_of_ties() -> None:
    values = ((0, math.nan, math.nan), (1, 5, 3), (2, 7, 2), (3, 7, 2))
    records = [{"step": s, "f1": f, "loss": v} for s, f, v in values]
    assert [best_step(records, name) for name in ("f1", "loss", "other")] == [2, 2, None]


def test_evaluation_updates_best_link_and_stops_early(
    options: dict[str, Any], train: Any, metrics: Any
) -> None:
    """With a learning rate close to zero, f1 never improves on its first value."""
    dev = {"data.dev": options["data.train"], "evaluation.every_steps": 5, "evaluation.early_stopping": 2}
    assert (
        train(**dev, **{"optim.lr": 1e-12, "checkpoint.every_steps": 10, "checkpoint.keep_last": 1})
        == Verdict.COMPLETED
    )
    assert [r["step"] for r in metrics(options["run_dir"], "evaluation")] == [5, 10, 15]
    run_dir = Path(options["run_dir"])
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["step-00000005", "step-00000015"]
    assert (run_dir / "best").resolve().name == "step-00000005"
    assert set(json.loads((run_dir / "evaluation/predictions.json").read_text())) == {
        f"train-{i}-{j}" for i in range(40) for j in range(3)
    }


def test_evaluation_due_at_a_stop_is_run_after_resuming(
    options: dict[str, Any], train: Any, metrics: Any
) -> None:
    dev = {"data.dev": options["data.train"], "evaluation.every_steps": 5, "max_steps": 10}
    assert train(**dev, stop_at_step=5) == Verdict.STOPPED
    assert not metrics(options["run_dir"], "evaluation")
    assert train(**dev) == Verdict.COMPLETED
    assert [r["step"] for r in metrics(options["run_dir"], "evaluation")] == [5, 10]


def test_change_of_the_math_is_rejected_on_resume(
    options: dict[str, Any], train: Any, tmp_path: Path
) -> None:
    train(stop_at_step=3)
    with pytest.raises(InputError, match="optim.lr: 0.001 -> 0.01"):
        train(**{"optim.lr": 0.01})
    other = json.loads(Path(options["data.train"]).read_text())
    other["data"][0]["paragraphs"].pop()
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="data: the training data"):
        train(**{"data.train": tmp_path / "other.json"})
    assert train(tokens_per_device=999, stop_at_step=4) == Verdict.STOPPED
    assert (
        train(**{"optim.lr": 0.01, "checkpoint.allow_changes": "[optim.lr]"}, stop_at_step=5)
        == Verdict.STOPPED
    )


def test_restarting_a_finished_run_keeps_its_weights(
    options: dict[str, Any], train: Any, tensors: Any, assert_same_bits: Any
) -> None:
    train(max_steps=3)
    before = tensors(options["run_dir"], 3)
    assert train(max_steps=3) == Verdict.COMPLETED
    assert_same_bits(before, tensors(options["run_dir"], 3))


@pytest.mark.parametrize(
    "changes", [{"model.activation_checkpointing": "true"}, {"precision": "bf16"}, {"precision": "fp16"}]
)
def test_loss_falls_with_activation_checkpointing_or_16_bit_precision(
    options: dict[str, Any], train: Any, metrics: Any, changes: dict[str, Any]
) -> None:
    train(**changes)
    losses = [record["loss"] for record in metrics(options["run_dir"], "train")]
    assert len(losses) == 30 and losses[-1] < losses[0] - 0.1


def test_activation_checkpointing_changes_nothing(
    options: dict[str, Any], train: Any, metrics: Any, tmp_path: Path
) -> None:
    train(max_steps=4)
    train(max_steps=4, run_dir=tmp_path / "again", **{"model.activation_checkpointing": "true"})
    losses = [[r["loss"] for r in metrics(d, "train")] for d in (options["run_dir"], tmp_path / "again")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
def test_compiled_loss_curve_matches_eager(
    options: dict[str, Any], train: Any, metrics: Any, tmp_path: Path
) -> None:
    still = {"model.dropout": 0.0, "model.attention_dropout": 0.0, "max_steps": 4}
    train(**still)
    train(**still, run_dir=tmp_path / "compiled", **{"model.compile": "true"})
    losses = [[r["loss"] for r in metrics(d, "train")] for d in (options["run_dir"], tmp_path / "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_autocast_contexts() -> None:
    with autocast("bf16", CPU):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16
    with autocast("fp32", CPU):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.parametrize("task", ["span", "text"])
def test_train_step_never_reads_a_value_from_the_device(task: str, tiny_model: Path, tiny_t5: Path) -> None:
    """Every read of a tensor's value (item, bool, a data-dependent shape) calls one of these operators."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        reads: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal"):
                self.reads.append(str(func))
            return func(*args, **(kwargs or {}))

    from plainloop.models.seq2seq import load_seq2seq_model, token_loss_sum
    from plainloop.models.spans import load_span_model, span_loss_sum

    inputs = {name: torch.ones(2, 16, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    inputs["attention_mask"][1, 9:] = 0
    model: torch.nn.Module
    if task == "span":
        model, loss_sum = load_span_model(str(tiny_model), new_head=True).train(), span_loss_sum
        labels = {name: torch.tensor([1, 2]) for name in ("start", "end")}
    else:
        model, loss_sum = load_seq2seq_model(str(tiny_t5)).train(), token_loss_sum
        inputs |= {"decoder_input_ids": torch.tensor([[0, 5, 6], [0, 7, 0]]), "scored": torch.arange(5)}
        labels = {"target": torch.tensor([5, 6, 1, 7, 1])}
    state = TrainState(
        model, Parallel(model), make_optimizer(model, OptimConfig()), make_scaler("bf16", CPU), CPU
    )
    options = StepOptions(loss_sum, lambda _: 1e-3, World(0, 1, 0, CPU), 1, "bf16", 1.0)
    parts = [MicroBatch(inputs, labels)] * 2
    step = StepBatch(parts, num_targets=4, examples=4, tokens=50, padded_tokens=64, rows=np.arange(4))
    with Watch() as watch:
        train_step(state, step, options)
        assert watch.reads == []
        state.grad_norm.item()
        assert watch.reads  # the watch does detect a read

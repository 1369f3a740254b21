"""Which options make sense together, and which may change when a run is continued."""

from __future__ import annotations

import dataclasses
from typing import Any

from plainloop.data.types import InputError
from plainloop.trainer.config import TrainConfig
from plainloop.trainer.options import flatten

# A resumed run may change these: they alter where and how often, not what is computed.
FREE_ON_RESUME = {
    "run_dir", "tokens_per_device", "stop_at_step", "device", "tf32", "deterministic",
    "timeout_s", "start_timeout_s",
    "compare_every_steps", "model.activation_checkpointing",
    "model.compile", "data.num_widths", "data.train", "data.dev", "data.cache_dir", "data.processes",
    "data.workers",
    "evaluation", "checkpoint", "log", "text.stride", "text.max_new_tokens", "text.num_beams",
    "text.generate",
}  # fmt: skip


SQUAD_METRICS = "exact f1 HasAns_exact HasAns_f1 NoAns_exact NoAns_f1 loss".split()
METRICS = {
    "span": [*SQUAD_METRICS, "best_exact", "best_f1"],
    "text": [*SQUAD_METRICS, "em", "rougeL_f1", "rougeL_recall", "rougeL_precision"],
}
POSITIVE = (
    "batch_size tokens_per_device epochs max_steps timeout_s data.limit optim.lr optim.eps log.every_steps"
    " start_timeout_s checkpoint.keep_last checkpoint.grace_s"
    " evaluation.max_answer_length evaluation.tokens_per_device text.max_source_length"
    " text.max_target_length text.max_new_tokens text.num_beams"
).split()
NOT_NEGATIVE = (
    "seed stop_at_step compare_every_steps data.bucket data.num_widths"
    " data.workers optim.warmup optim.weight_decay optim.max_grad_norm"
    " optim.max_nonfinite_steps evaluation.every_steps evaluation.num_best evaluation.early_stopping"
    " checkpoint.every_steps text.stride text.generate"
).split()


def check_train_config(config: TrainConfig) -> None:
    """All faults of the values at once, as one InputError. None is fine where it is a default."""
    values = flatten(dataclasses.asdict(config))
    rules = [
        ("data.train", bool(config.data.train), "a file or a folder"),
        *((name, values[name] is None or values[name] > 0, "more than 0") for name in POSITIVE),
        *((name, values[name] is None or values[name] >= 0, "at least 0") for name in NOT_NEGATIVE),
        *(
            (n, 0 <= (values[n] or 0) < 1, "0 to below 1")
            for n in ("model.dropout", "model.attention_dropout", "text.label_smoothing")
        ),
        ("optim.betas", all(0 <= beta < 1 for beta in config.optim.betas), "0 to below 1"),
        (
            "evaluation.best_metric",
            values["evaluation.best_metric"] in METRICS[config.task],
            f"one of {', '.join(METRICS[config.task])}",
        ),
    ]
    faults = [f"{name} is {values[name]}, it must be {rule}" for name, ok, rule in rules if not ok]
    faults += _without_effect(config)
    if config.task == "text" and config.text.generate == 0 and config.evaluation.best_metric != "loss":
        faults.append("text.generate 0 leaves only the loss: set evaluation.best_metric to loss")
    if config.evaluation.early_stopping and not config.data.dev:
        faults.append("evaluation.early_stopping needs data.dev")
    if faults:
        raise InputError("; ".join(faults))


# Options that only the other task knows.
OTHER_TASK = {
    "span": ("text",),
    "text": (
        "model.attention_dropout", "data.max_length", "data.stride", "evaluation.max_answer_length",
        "evaluation.null_threshold", "evaluation.num_best",
    ),
}  # fmt: skip


def _without_effect(config: TrainConfig) -> list[str]:
    """Options that are set and that this task would ignore in silence."""
    values, default = (flatten(dataclasses.asdict(c)) for c in (config, TrainConfig()))
    names = [
        n for n in values if n in OTHER_TASK[config.task] or n.partition(".")[0] in OTHER_TASK[config.task]
    ]
    faults = [
        f"{n} has no effect with task {config.task}; leave it out" for n in names if values[n] != default[n]
    ]
    if config.optim.name == "adafactor":
        names = [n for n in ("optim.betas", "optim.eps") if values[n] != default[n]]
        faults += [f"{n} has no effect with adafactor; leave it out" for n in names]
    if config.task == "span" and (isinstance(config.data.train, list) or isinstance(config.data.dev, list)):
        faults.append("data.train and data.dev must be one file or folder with task span")
    return faults


def config_differences(now: TrainConfig, before: dict[str, Any], allowed: set[str]) -> list[str]:
    """Options that would change the mathematics of a resumed run, as 'name: before -> now'."""
    # An option that the checkpoint's version did not know had the effect of its default.
    old, new = flatten(dataclasses.asdict(TrainConfig())) | flatten(before), flatten(dataclasses.asdict(now))
    free = FREE_ON_RESUME | allowed
    return [
        f"{name}: {old[name]} -> {new[name]}"
        for name in new
        if new[name] != old[name]
        and name not in free
        and name.partition(".")[0] not in free
        and (name, new[name]) != ("precision", "auto")
    ]

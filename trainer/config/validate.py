"""Validate options, alone and together, and decide which may change on resume."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Collection
from typing import Any

from plainloop.trainer.config.options import TrainConfig
from plainloop.trainer.config.parse import flatten, plain, spelled
from plainloop.trainer.errors import InputError

# Options that may change on resume: they affect where and how often, not what is computed.
FREE_ON_RESUME = {
    "run_dir", "hooks", "tokens_per_device", "stop_at_step", "device", "tf32", "deterministic",
    "timeout_s", "start_timeout_s",
    "compare_every_steps", "parallel", "model.activation_checkpointing",
    "model.compile", "model.attention", "data.num_widths", "data.train", "data.dev", "data.cache_dir",
    "data.processes",
    "data.workers",
    "evaluation", "checkpoint", "log", "text.stride", "text.max_new_tokens", "text.num_beams",
    "text.generate",
}  # fmt: skip


# Options that only some tasks use. A task names those that it uses; the others have no effect with it.
TASK_OPTIONS = (
    "text", "model.attention_dropout", "data.max_length", "data.stride", "evaluation.max_answer_length",
    "evaluation.null_threshold", "evaluation.num_best", "evaluation.metric", "evaluation.language",
    "data.columns", "data.ambiguous",
)  # fmt: skip


def validate(config: TrainConfig, *, uses: Collection[str], metric_names: Collection[str]) -> None:
    """Raise one InputError that lists all invalid values.

    uses, metric_names: of the task; the entries of TASK_OPTIONS that matter, and what best_metric may be.
    """
    faults = [] if config.data.train else ["data.train is None, but must be a file or a folder"]
    faults += range_faults(config)
    unused = [name for name in TASK_OPTIONS if name not in uses]
    faults += _without_effect(config, unused, f"task {config.task}")
    if config.optim.name == "adafactor":
        faults += _without_effect(config, ["optim.betas", "optim.eps"], "adafactor")
    if config.optim.name == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        faults.append("optim.name adamw8bit needs bitsandbytes: pip install 'plainloop[8bit]'")
    if config.parallel.mode == "ddp":
        faults += _without_effect(config, ["parallel.shard_size", "parallel.gather_dtype"], "parallel ddp")
    elif config.parallel.gather_dtype == "bf16" and config.precision not in ("auto", "bf16"):
        faults.append("parallel.gather_dtype bf16 needs precision bf16")
    elif config.optim.name == "adamw8bit":
        faults.append("optim.name adamw8bit works on whole tensors, which parallel fsdp does not have")
    if config.peft.rank == 0:
        faults += _without_effect(config, ["peft"], "peft.rank 0")
    elif importlib.util.find_spec("peft") is None:
        faults.append("peft.rank needs the package peft: pip install 'plainloop[peft]'")
    elif config.peft.base_dtype == "bf16" and config.precision not in ("auto", "bf16"):
        faults.append("peft.base_dtype bf16 needs precision bf16")
    if config.evaluation.metric == "squad":
        faults += _without_effect(config, ["evaluation.language"], "evaluation.metric squad")
    if (metric := config.evaluation.best_metric) not in metric_names:
        faults.append(f"evaluation.best_metric is {metric}, but must be one of {', '.join(metric_names)}")
    if config.evaluation.early_stopping and not config.data.dev:
        faults.append("evaluation.early_stopping needs data.dev")
    if faults:
        raise InputError("; ".join(faults))


def range_faults(config: Any, prefix: str = "") -> list[str]:
    """Return an error for each number outside its option's range. None is valid where it is the default."""
    faults = []
    for item in dataclasses.fields(config):
        name, value = prefix + spelled(item.name), getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            faults += range_faults(value, f"{name}.")
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        if rule := _broken_rule([n for n in numbers if n is not None], **item.metadata["range"]):
            faults.append(f"{name} is {plain(value)}, but must be {rule}")
    return faults


def _broken_rule(
    numbers: list[Any], *, minimum: float | None, above: float | None, below: float | None
) -> str | None:
    if minimum is not None and any(not n >= minimum for n in numbers):
        return f"at least {minimum}" + (f" and less than {below}" if below is not None else "")
    if above is not None and any(not n > above for n in numbers):
        return f"greater than {above}"
    if below is not None and any(not n < below for n in numbers):
        return f"at least {minimum} and less than {below}"
    return None


def _without_effect(config: TrainConfig, unused: list[str], why: str) -> list[str]:
    """Return an error for each of these options or sections that is set but would be silently ignored."""
    values, default = (flatten(dataclasses.asdict(c)) for c in (config, TrainConfig()))
    names = [name for name in values if name in unused or name.partition(".")[0] in unused]
    return [f"{n} has no effect with {why}; leave it out" for n in names if values[n] != default[n]]


def config_differences(now: TrainConfig, before: dict[str, Any], allowed: set[str]) -> list[str]:
    """List the options that would change the mathematics of a resumed run, as 'name: before -> now'."""
    # An option newer than the checkpoint had the effect of its default.
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

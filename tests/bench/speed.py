"""Training speed, paired in one run on real data: python tests/bench/speed.py (needs PLAINLOOP_REAL_DATA).

(a) HF Trainer with padding to 384; (b) HF Trainer at its best: dynamic padding, batches grouped by length,
fused AdamW; (b+) the same with our CPU dropout, to tell what is the loop's and what is dropout's; ours; (c) a
bare loop over the batches that our sampler makes, collated beforehand: the ceiling. All with bf16 autocast,
batch 16, MiniLM, 2 threads, each measured in a process of its own, in turns; medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH, WARMUP, LIMIT, LR = 16, 4, 4000, 1e-4


def setup(cache: str, *, threads: int = 2) -> tuple[Any, Any, str]:
    """Our task and its windows of the real training file (made once, then from the cache), and the model's
    path.
    """
    import torch

    from plainloop.trainer.config import DataConfig, ModelConfig, TextConfig
    from plainloop.trainer.demo import packaged_encoder
    from plainloop.trainer.distributed import world_from_env
    from plainloop.trainer.tasks import make_task

    torch.set_num_threads(threads)
    model = packaged_encoder()
    task = make_task(
        "span", ModelConfig(path=model), DataConfig(cache_dir=cache), TextConfig(), world_from_env("cpu")
    )
    windows = task.prepare(
        "train", str(Path(os.environ["PLAINLOOP_REAL_DATA"]) / "squad2/train-v2.0.subset.json"), limit=LIMIT
    )
    return task, windows, model


def measured(name: str, tokens: int, examples: int, seconds: float) -> None:
    """The child's last line: what the parent reads."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    values = {
        "name": name,
        "tokens_per_s": tokens / seconds,
        "examples_per_s": examples / seconds,
        "peak_gb": peak,
    }
    print(json.dumps(values), flush=True)


def hugging_face(name: str, cache: str, steps: int) -> None:
    """(a), (b) and (b+). Non-padding tokens are counted from the attention masks that reach the model."""
    import torch
    from transformers import (
        AutoModelForQuestionAnswering,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from plainloop.models.cpu import speed_up_dropout

    task, windows, path = setup(cache)
    padding = "max_length" if name == "a" else True
    rows = [
        {
            "input_ids": windows.row("input_ids", i).tolist(),
            "token_type_ids": (torch.arange(int(n)) >= int(windows.arrays["segment"][i])).long().tolist(),
            "attention_mask": [1] * int(n),
            "start_positions": int(windows.arrays["label"][i, 0]),
            "end_positions": int(windows.arrays["label"][i, 1]),
            "length": int(n),
        }
        for i, n in enumerate(windows.lengths)
    ]
    collator = DataCollatorWithPadding(task.tokenizer, padding=padding, max_length=384, pad_to_multiple_of=8)
    counts = {"tokens": 0, "examples": 0, "start": 0.0, "seconds": 0.0}

    def collate(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collator([{k: v for k, v in row.items() if k != "length"} for row in chosen])
        counts["tokens"] += int(batch["attention_mask"].sum())
        counts["examples"] += len(chosen)
        return dict(batch)

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == WARMUP:
                counts.update(tokens=0, examples=0, start=time.perf_counter())
            counts["seconds"] = time.perf_counter() - counts["start"]

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=BATCH, max_steps=WARMUP + steps, learning_rate=LR, bf16=True,
            use_cpu=True, optim="adamw_torch_fused", save_strategy="no", report_to=[], logging_steps=50,
            disable_tqdm=True, train_sampling_strategy="random" if name == "a" else "group_by_length",
            dataloader_drop_last=True, remove_unused_columns=False,
        )  # fmt: skip
        model = AutoModelForQuestionAnswering.from_pretrained(path)
        if name == "b+":
            speed_up_dropout(model)
        trainer = Trainer(model, arguments, data_collator=collate, train_dataset=rows, callbacks=[Clock()])
        trainer.train()
    measured(name, int(counts["tokens"]), int(counts["examples"]), counts["seconds"])


def ours(name: str, cache: str, steps: int) -> None:
    """The real program: plainloop's fit with its loader and its log, or (c), the bare loop on the same
    batches.
    """
    import torch

    from plainloop.data.loader import step_batches
    from plainloop.trainer.config import OptimConfig
    from plainloop.trainer.hooks import LogLine, Stopwatch
    from plainloop.trainer.log import Log
    from plainloop.trainer.loop import Progress, StepOptions, fit
    from plainloop.trainer.optim import make_optimizer
    from plainloop.trainer.precision import make_scaler
    from plainloop.trainer.state import TrainState

    task, windows, path = setup(cache)
    world = task.world
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = task.load_model(path, new_head=True).train()
        source = task.steps(windows, batch_size=BATCH, seed=1, tokens=4096)
        optimizer = make_optimizer(model, OptimConfig(lr=LR))
        batches = [source[i] for i in range(WARMUP + steps)]
        total, examples = (sum(getattr(b, k) for b in batches[WARMUP:]) for k in ("tokens", "examples"))
        if name == "c":

            def run(first: int, last: int) -> None:
                for batch in batches[first:last]:
                    for inputs, labels in batch.micro_batches:
                        with torch.autocast("cpu", dtype=torch.bfloat16):
                            logits = model(**inputs)
                        (task.loss_sum(logits, labels) / batch.divisor).backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
        else:
            state = TrainState(model, model, optimizer, make_scaler("bf16", world.device), world.device)
            log, watch = Log(Path(folder), enabled=world.is_main, tensorboard=True), Stopwatch()
            log.start(0, WARMUP + steps)
            options = StepOptions(task.loss_sum, lambda _: LR, world, 1, "bf16", 1.0)
            line = LogLine(log, 10, watch, options.lr)

            def run(first: int, last: int) -> None:
                loader = step_batches(source, start=first, total=last, workers=0, pin=False)
                fit(Progress(state, last, source.sampler.steps_per_epoch), loader, [line], options)

        run(0, WARMUP)
        started = time.perf_counter()
        run(WARMUP, WARMUP + steps)
        seconds = time.perf_counter() - started
        measured(name, total, examples, seconds)


def child(name: str, cache: str, steps: int) -> dict[str, Any]:
    """Measure one of them in a process of its own."""
    line = [sys.executable, __file__, "--child", name, cache, str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(line, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise SystemExit(f"{name}: {result.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(
        [text for text in result.stdout.splitlines() if text.startswith("{")][-1]
    )
    return found


def compare(rounds: int, cache: str) -> None:
    steps = {"a": 6, "b": 50, "b+": 50, "ours": 32, "c": 32}  # b: a whole cycle of its length groups
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in (
            steps if number % 2 == 0 else reversed(steps)
        ):  # in turns, so that a slow minute hits all alike
            results[name].append(child(name, cache, steps[name]))
            print(f"round {number + 1}: " + show(results[name][-1]), flush=True)
    median = {name: statistics.median(r["tokens_per_s"] for r in found) for name, found in results.items()}
    memory = {name: max(r["peak_gb"] for r in found) for name, found in results.items()}
    for name in steps:
        print(f"{name:5s} {median[name]:7.0f} non-padding tokens/s   peak {memory[name]:.2f} GB")
    for name, target in (("a", 4), ("b", 1.25), ("b+", "none"), ("c", 0.97)):
        ratios = [
            o["tokens_per_s"] / r["tokens_per_s"] for o, r in zip(results["ours"], results[name], strict=True)
        ]
        print(f"ours / {name} = {statistics.median(ratios):.2f} (median of rounds; target {target})")


def show(result: dict[str, Any]) -> str:
    return "{name} {tokens_per_s:.0f} tok/s, {examples_per_s:.1f} ex/s, {peak_gb:.2f} GB".format(**result)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        name, cache, steps = sys.argv[2:]
        (hugging_face if name in ("a", "b", "b+") else ours)(name, cache, int(steps))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        setup(cache)
        compare(options.rounds, cache)


if __name__ == "__main__":
    main()

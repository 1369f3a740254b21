"""Paired training speed on this machine: python tests/bench/speed.py [--device cuda] [--model NAME]

a         HF Trainer with padding to 384
b         HF Trainer at its best: dynamic padding, batches grouped by length, fused AdamW
b+        b with our dropout, to separate the gain of the loop from that of dropout (on a CPU only)
ours      plainloop
compiled  plainloop with torch.compile (on a CPU only with --compiled)
c         a bare loop over our sampler's batches, collated beforehand: the upper bound

Batch size 16, precision as `plainloop train` chooses it, 2 threads on a CPU. Variants are interleaved, each
in its own process; medians over the rounds. MFU: FLOP/s of matrix products and attention, as torch counts
them, relative to the speed of a large matrix product on the same device.

Data: the real SQuAD subset in PLAINLOOP_REAL_DATA, or the demo's generated corpus if that is not set.
TINY=1: smoke test with two steps of each variant on 40 questions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import settle, setup, show_ratios

TINY = "TINY" in os.environ
BATCH, WARMUP, LR = (4, 1, 1e-4) if TINY else (16, 4, 1e-4)
STEPS = {"a": 6, "b": 50, "b+": 50, "ours": 32, "compiled": 32, "c": 32}  # b: one full cycle of its groups


def measured(name: str, device: Any, tokens: int, examples: int, seconds: float, **more: Any) -> None:
    """Print the child's last line, which the parent parses."""
    from plainloop.trainer.distributed.device import peak_memory_gb

    values = {
        "name": name, "tokens_per_s": tokens / seconds, "examples_per_s": examples / seconds,
        "peak_gb": peak_memory_gb(device), **more,
    }  # fmt: skip
    print(json.dumps(values), flush=True)


def hugging_face(name: str, steps: int, where: dict[str, Any]) -> None:
    """Run a, b or b+. Non-padding tokens are counted from the attention masks passed to the model."""
    import torch
    from transformers import (
        AutoModelForQuestionAnswering,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from plainloop.models.cpu_dropout import speed_up_dropout

    bench = setup(**where)
    task, windows, path = bench.task, bench.data.store, bench.path
    device, precision = bench.world.device, bench.precision
    padding = "max_length" if name == "a" else True
    label, segment = windows.arrays["label"], windows.arrays["segment"]
    rows = [
        {
            "input_ids": windows.row("input_ids", i).tolist(), "attention_mask": [1] * int(n),
            "token_type_ids": (torch.arange(int(n)) >= int(segment[i])).long().tolist(),
            "start_positions": int(label[i, 0]), "end_positions": int(label[i, 1]), "length": int(n),
        }
        for i, n in enumerate(windows.lengths)
    ]  # fmt: skip
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
                counts.update(tokens=0, examples=0, start=settle(device))
            if state.global_step in (WARMUP, WARMUP + steps):
                counts["seconds"] = settle(device) - counts["start"]

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=BATCH, max_steps=WARMUP + steps, learning_rate=LR,
            bf16=precision == "bf16", fp16=precision == "fp16", use_cpu=device.type == "cpu",
            optim="adamw_torch_fused", save_strategy="no", report_to=[], logging_steps=50,
            disable_tqdm=True, train_sampling_strategy="random" if name == "a" else "group_by_length",
            dataloader_drop_last=True, remove_unused_columns=False,
        )  # fmt: skip
        model = AutoModelForQuestionAnswering.from_pretrained(path)
        if name == "b+":
            speed_up_dropout(model)
        trainer = Trainer(model, arguments, data_collator=collate, train_dataset=rows, callbacks=[Clock()])
        trainer.train()
    measured(name, device, int(counts["tokens"]), int(counts["examples"]), counts["seconds"])


def ours(name: str, steps: int, where: dict[str, Any]) -> None:
    """Run plainloop's fit with its loader and log, or c, the bare loop on the same batches."""
    import torch

    from plainloop.data.loader import step_batches
    from plainloop.trainer.hooks import LogLine
    from plainloop.trainer.loop import StepOptions, fit
    from plainloop.trainer.precision import autocast
    from plainloop.trainer.run_folder.log import Log
    from plainloop.trainer.state import Progress

    bench = setup(**where)
    task, world, device, precision = bench.task, bench.world, bench.world.device, bench.precision
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model, source = bench.model(), bench.steps(BATCH)
        state = bench.state(model, compile_it=name == "compiled", lr=LR)
        batches = [source[i] for i in range(WARMUP + steps)]
        total, examples = (sum(getattr(b, k) for b in batches[WARMUP:]) for k in ("tokens", "examples"))
        flops = flops_of(model, batches[WARMUP:], task, device)
        if name == "c":

            def run(first: int, last: int) -> None:
                for batch in batches[first:last]:
                    for micro_batch in batch.micro_batches:
                        inputs, labels = (
                            {k: t.to(device, non_blocking=True) for k, t in part.items()}
                            for part in micro_batch
                        )
                        with autocast(precision, device):
                            logits = model(**inputs)
                        (task.loss_sum(logits, labels) / batch.num_targets).backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    state.optimizer.step()
                    state.optimizer.zero_grad()
        else:
            log = Log(Path(folder), enabled=world.is_main, tensorboard=True)
            log.start(0, WARMUP + steps, ())
            options = StepOptions(task.loss_sum, lambda _: LR, world, 1, precision, 1.0)
            line = LogLine(10, options.lr)

            def run(first: int, last: int) -> None:
                pin = device.type == "cuda"
                loader = step_batches(source, start=first, total=last, workers=0, pin=pin)
                progress = Progress(state, last, source.sampler.steps_per_epoch, log, world)
                fit(progress, loader, [line], options)

        run(0, WARMUP)
        started = settle(device)
        run(WARMUP, WARMUP + steps)
        seconds = settle(device) - started
        measured(name, device, total, examples, seconds, flops_per_s=flops / seconds, precision=precision)


def flops_of(model: Any, batches: list[Any], task: Any, device: Any) -> int:
    """FLOPs of forward and backward of these batches: torch's count for one, scaled by tokens."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    inputs, labels = (
        {name: tensor.to(device) for name, tensor in part.items()} for part in batches[0].micro_batches[0]
    )
    with FlopCounterMode(display=False) as counter:
        task.loss_sum(model(**inputs), labels).backward()
    model.zero_grad()
    torch.manual_seed(0)
    tokens = sum(m.inputs["input_ids"].numel() for batch in batches for m in batch.micro_batches)
    return int(counter.get_total_flops() / inputs["input_ids"].numel() * tokens)


def peak(where: dict[str, Any]) -> None:
    """Measure the speed of a large matrix product in the chosen precision."""
    import torch

    from plainloop.trainer.distributed.device import device_name
    from plainloop.trainer.precision import product_seconds

    bench = setup(**where)
    device, precision = bench.world.device, bench.precision
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    size = 8192 if device.type == "cuda" else 2048
    flops = 2 * size**3 / product_seconds(dtype, device, size=size)
    found = {"name": "peak", "flops_per_s": flops, "precision": precision, "device": device_name(device)}
    print(json.dumps(found), flush=True)


def child(name: str, steps: int, where: dict[str, Any]) -> dict[str, Any]:
    """Measure one variant in its own process."""
    line = [sys.executable, __file__, "--child", name, str(steps), json.dumps(where)]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(line, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise SystemExit(f"{name}: {result.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(
        [text for text in result.stdout.splitlines() if text.startswith("{")][-1]
    )
    return found


def compare(rounds: int, steps: dict[str, int], where: dict[str, Any]) -> None:
    top = child("peak", 0, where)
    print(
        "{device}, {precision}: a matrix product at {0:.0f} GFLOP/s".format(top["flops_per_s"] / 1e9, **top)
    )
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in steps if number % 2 == 0 else reversed(steps):  # a slow phase affects all variants alike
            results[name].append(child(name, steps[name], where))
            print(f"round {number + 1}: " + show(results[name][-1]), flush=True)
    for name, found in results.items():
        speed, memory = statistics.median(r["tokens_per_s"] for r in found), max(r["peak_gb"] for r in found)
        mfu = statistics.median(r.get("flops_per_s", 0.0) for r in found) / top["flops_per_s"]
        shown = f"   MFU {mfu:.0%}" if mfu else ""
        print(f"{name:8s} {speed:7.0f} non-padding tokens/s   peak {memory:.2f} GB{shown}")
    show_ratios(results, {"a": "4", "b": "1.25", "b+": "none", "c": "0.97"})


def show(result: dict[str, Any]) -> str:
    return "{name} {tokens_per_s:.0f} tok/s, {examples_per_s:.1f} ex/s, {peak_gb:.2f} GB".format(**result)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        name, steps, where = sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
        if name == "peak":
            peak(where)
        else:
            (hugging_face if name in ("a", "b", "b+") else ours)(name, steps, where)
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", help="folder or hub name of an encoder; default: the demo's MiniLM")
    parser.add_argument("--variants", nargs="+", choices=list(STEPS), help="only these; default: all")
    parser.add_argument("--compiled", action="store_true", help="include compiled on a CPU (takes minutes)")
    given = parser.parse_args()
    names = [n for n in STEPS if n != "b+" or given.device == "cpu"]
    names = [n for n in names if n != "compiled" or given.compiled or given.device == "cuda"]
    names = given.variants or names
    with tempfile.TemporaryDirectory() as cache:
        where = {"cache": cache, "device": given.device, "model": given.model}
        where |= {"limit": 40} if TINY else {}
        many = 10 if given.device == "cuda" else 1
        steps = {name: 2 if TINY else many * STEPS[name] for name in names}
        compare(1 if TINY else given.rounds, steps, where)


if __name__ == "__main__":
    main()

"""Training speed where you are, paired in one run: python tests/bench/speed.py [--device cuda] [--model NAME]

(a) HF Trainer with padding to 384; (b) HF Trainer at its best: dynamic padding, batches grouped by length,
fused AdamW; (b+) on a CPU: the same with our dropout, to tell what is the loop's and what is dropout's; ours;
ours compiled (on a CPU with --compiled); (c) a bare loop over the batches that our sampler makes, collated
beforehand: the ceiling. Batch 16, precision as `plainloop train` chooses it, on a CPU 2 threads; each in a
process of its own, in turns; medians over the rounds. MFU: the operations of matrix products and attention,
as torch counts them, against the speed of a large matrix product on the same device.

Data is the real SQuAD subset in PLAINLOOP_REAL_DATA, or else the demo's generated corpus.
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

from common import precision_of, settle, setup, show_ratios

BATCH, WARMUP, LR = 16, 4, 1e-4
STEPS = {"a": 6, "b": 50, "b+": 50, "ours": 32, "compiled": 32, "c": 32}  # b: a whole cycle of its groups


def measured(name: str, device: Any, tokens: int, examples: int, seconds: float, **more: Any) -> None:
    """The child's last line: what the parent reads."""
    from plainloop.trainer.device import peak_memory_gb

    values = {
        "name": name, "tokens_per_s": tokens / seconds, "examples_per_s": examples / seconds,
        "peak_gb": peak_memory_gb(device), **more,
    }  # fmt: skip
    print(json.dumps(values), flush=True)


def hugging_face(name: str, steps: int, where: dict[str, Any]) -> None:
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

    task, windows, path = setup(**where)
    device, precision = task.world.device, precision_of(task, path)
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
    """The real program: plainloop's fit with its loader and its log, or (c), the bare loop on the same
    batches.
    """
    import torch

    from plainloop.data.loader import step_batches
    from plainloop.trainer.config import OptimConfig
    from plainloop.trainer.deadline import StopTime
    from plainloop.trainer.hooks import LogLine, Stopwatch
    from plainloop.trainer.log import Log
    from plainloop.trainer.loop import Progress, StepOptions, fit
    from plainloop.trainer.optim import make_optimizer
    from plainloop.trainer.precision import autocast, make_scaler
    from plainloop.trainer.run import wrap
    from plainloop.trainer.state import TrainState

    task, windows, path = setup(**where)
    world, device, precision = task.world, task.world.device, precision_of(task, path)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = task.load_model(path, new_head=True).to(device).train()
        source = task.steps(windows, batch_size=BATCH, seed=1, tokens=4096)
        optimizer = make_optimizer(model, OptimConfig(lr=LR))
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
                        (task.loss_sum(logits, labels) / batch.divisor).backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
        else:
            wrapped = wrap(model, world, compile_it=name == "compiled")
            state = TrainState(model, wrapped, optimizer, make_scaler(precision, device), device)
            log, watch = Log(Path(folder), enabled=world.is_main, tensorboard=True), Stopwatch()
            log.start(0, WARMUP + steps, ())
            options = StepOptions(task.loss_sum, lambda _: LR, world, 1, precision, 1.0)
            line = LogLine(log, 10, watch, options.lr, StopTime())

            def run(first: int, last: int) -> None:
                pin = device.type == "cuda"
                loader = step_batches(source, start=first, total=last, workers=0, pin=pin)
                fit(Progress(state, last, source.sampler.steps_per_epoch), loader, [line], options)

        run(0, WARMUP)
        started = settle(device)
        run(WARMUP, WARMUP + steps)
        seconds = settle(device) - started
        measured(name, device, total, examples, seconds, flops_per_s=flops / seconds, precision=precision)


def flops_of(model: Any, batches: list[Any], task: Any, device: Any) -> int:
    """Of forward and backward of these batches: one batch counted by torch, the others by their tokens."""
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
    """The speed of a large matrix product in the formats that matter."""
    import torch

    from plainloop.trainer.device import device_name
    from plainloop.trainer.precision import product_seconds

    task, _, path = setup(**where)
    device, precision = task.world.device, precision_of(task, path)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    size = 8192 if device.type == "cuda" else 2048
    flops = 2 * size**3 / product_seconds(dtype, device, size=size)
    found = {"name": "peak", "flops_per_s": flops, "precision": precision, "device": device_name(device)}
    print(json.dumps(found), flush=True)


def child(name: str, steps: int, where: dict[str, Any]) -> dict[str, Any]:
    """Measure one of them in a process of its own."""
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
        for name in steps if number % 2 == 0 else reversed(steps):  # so that a slow minute hits all alike
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
    parser.add_argument("--compiled", action="store_true", help="on a CPU too, where it takes minutes")
    parser.add_argument(
        "--tiny", action="store_true", help="two steps each on 40 questions, to see that it runs"
    )
    given = parser.parse_args()
    names = [n for n in STEPS if n != "b+" or given.device == "cpu"]
    names = [n for n in names if n != "compiled" or given.compiled or given.device == "cuda"]
    with tempfile.TemporaryDirectory() as cache:
        where = {"cache": cache, "device": given.device, "model": given.model}
        where |= {"limit": 40} if given.tiny else {}
        many = 10 if given.device == "cuda" else 1
        steps = {name: 2 if given.tiny else many * STEPS[name] for name in names}
        compare(1 if given.tiny else given.rounds, steps, where)


if __name__ == "__main__":
    main()

"""Task text compared with transformers' Seq2SeqTrainer: python tests/bench/text.py [speed|generate ...]

Needs PLAINLOOP_REAL_DATA. A T5 with 3 + 3 layers (d_model 256), random weights and the real vocabulary.

speed     non-padding tokens/s on SQuAD 2.0 as text, 4,000 questions. a: Seq2SeqTrainer with padding to
          max_length 512; b: at its best, with dynamic padding, grouping by length and fused AdamW; b+: b with
          our CPU dropout; ours. Precision as `plainloop train` chooses it, batch size 16, 2 threads; variants
          are interleaved, each in its own process.
generate  252 questions of CausalQA: the usual loop (padded to 1024, unsorted, batches of 8) and ours.

TINY=1: smoke test with a few rows and one round.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
from common import Bench, show_ratios

TINY = "TINY" in os.environ
BATCH, WARMUP, LR = (4, 1, 1e-4) if TINY else (16, 4, 1e-4)
STEPS = dict.fromkeys(("a", "b", "b+", "ours"), 2) if TINY else {"a": 5, "b": 50, "b+": 50, "ours": 32}
LIMIT, ROUNDS = (100, 1) if TINY else (4000, 3)


def data(name: str) -> str:
    return str(Path(os.environ["PLAINLOOP_REAL_DATA"]) / name)


def write_model(folder: str) -> None:
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=32128, d_model=256, d_kv=64, d_ff=1024, num_heads=4, num_layers=3)
    config.decoder_start_token_id = 0
    T5ForConditionalGeneration(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(data("tokenizers/t5")).save_pretrained(folder)


def setup(
    folder: str, path: str, *, limit: int | None = None, source: int = 512, dropout: float | None = None,
    split: str = "train",
) -> Bench:  # fmt: skip
    """Our task and its rows."""
    null = "unanswerable" if path.endswith(".json") else ""
    return common.setup(
        f"{folder}/cache", model=folder, limit=limit, file=path, split=split, dropout=dropout,
        max_source_length=source, null_target=null,
    )  # fmt: skip


def as_features(rows: Any, order: Any) -> list[dict[str, Any]]:
    return [
        {
            "input_ids": rows.row("input_ids", i).tolist(), "attention_mask": [1] * int(rows.lengths[i]),
            "labels": rows.target(i).tolist(), "length": int(rows.lengths[i]),
        }
        for i in order
    ]  # fmt: skip


def trainer_for(
    model: Any, folder: str, features: list[Any], collate: Any, *, correct: bool = False, **options: Any
) -> Any:
    """A Seq2SeqTrainer. correct: divide the summed loss by the target tokens of the whole step."""
    import torch
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    losses: list[float] = []

    def summed(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        total = torch.nn.functional.cross_entropy(
            outputs.logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        losses.append(float(total.detach()) / int(num_items_in_batch))
        return total / num_items_in_batch

    arguments = Seq2SeqTrainingArguments(
        f"{folder}/hf", learning_rate=LR, use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True,
        remove_unused_columns=False, dataloader_drop_last=True, **options,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=features,
        compute_loss_func=summed if correct else None,
    )
    if "max_grad_norm" in options:  # numerical comparisons keep the order of rows
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(features)
    trainer.bench_losses = losses
    return trainer


def padder(task: Any, *, width: int | None = None, decoder: bool = False, counts: Any = None) -> Any:
    """A collator like transformers': pad to the longest row, or to the given width and targets to 100."""

    def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        def block(key: str, fill: int, size: int | None) -> Any:
            size = size or -(-max(len(f[key]) for f in features) // 8) * 8
            return torch.tensor([f[key] + [fill] * (size - len(f[key])) for f in features])

        batch = {
            "input_ids": block("input_ids", 0, width), "attention_mask": block("attention_mask", 0, width),
            "labels": block("labels", -100, 100 if width else None),
        }  # fmt: skip
        if decoder:
            shifted = batch["labels"].roll(1, dims=1)
            shifted[:, 0] = task.start_token
            batch["decoder_input_ids"] = shifted.masked_fill(shifted == -100, 0)
        if counts is not None:
            counts["tokens"] += int(batch["attention_mask"].sum()) + int((batch["labels"] != -100).sum())
        return batch

    return collate


def speed_child(name: str, folder: str) -> None:
    """Print tokens/s and the peak memory as JSON."""
    import resource

    bench = setup(folder, data("squad2/train-v2.0.subset.json"), limit=LIMIT)
    task, rows, steps = bench.task, bench.data.store, STEPS[name]
    if name == "ours":
        tokens, seconds = run_ours(bench, folder, steps)
    else:
        from transformers import AutoModelForSeq2SeqLM, TrainerCallback

        from plainloop.models.cpu_dropout import speed_up_dropout

        counts: dict[str, float] = {"tokens": 0, "start": 0.0, "seconds": 0.0}

        class Clock(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == WARMUP:
                    counts.update(tokens=0, start=time.perf_counter())
                counts["seconds"] = time.perf_counter() - counts["start"]

        model = AutoModelForSeq2SeqLM.from_pretrained(folder)
        if name == "b+":
            speed_up_dropout(model)
        trainer = trainer_for(
            model, folder, as_features(rows, range(len(rows))),
            padder(task, width=512 if name == "a" else None, counts=counts),
            bf16=bench.precision == "bf16",
            per_device_train_batch_size=BATCH, max_steps=WARMUP + steps, optim="adamw_torch_fused",
            train_sampling_strategy="random" if name == "a" else "group_by_length", logging_steps=50,
        )  # fmt: skip
        trainer.add_callback(Clock())
        trainer.train()
        tokens, seconds = counts["tokens"], counts["seconds"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"name": name, "tokens_per_s": tokens / seconds, "peak_gb": peak}), flush=True)


def run_ours(bench: Bench, folder: str, steps: int) -> tuple[float, float]:
    """Run the real loop with its loader and log; return non-padding tokens and seconds."""
    from plainloop.data.loader import step_batches
    from plainloop.trainer.hooks import LogLine
    from plainloop.trainer.loop import fit
    from plainloop.trainer.run_folder.log import Log
    from plainloop.trainer.state import Progress

    state, options, source = our_state(bench, precision=bench.precision)
    log, line = Log(Path(folder), enabled=True, tensorboard=False), LogLine(10, options.lr)
    log.start(0, WARMUP + steps, ())

    def run(first: int, last: int) -> None:
        loader = step_batches(source, start=first, total=last, workers=0, pin=False)
        progress = Progress(state, last, source.sampler.steps_per_epoch, log, bench.world)
        fit(progress, loader, [line], options)

    run(0, WARMUP)
    started = time.perf_counter()
    run(WARMUP, WARMUP + steps)
    seconds = time.perf_counter() - started
    return sum(source[i].tokens for i in range(WARMUP, WARMUP + steps)), seconds


def our_state(bench: Bench, *, precision: str) -> Any:
    from plainloop.trainer.loop import StepOptions

    options = StepOptions(bench.task.loss_sum, lambda _: LR, bench.world, 1, precision, 1.0)
    return bench.state(bench.model(), lr=LR, weight_decay=0.0), options, bench.steps(BATCH)


def speed(folder: str, rounds: int = ROUNDS) -> None:
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in STEPS}
    for number in range(rounds):
        for name in STEPS if number % 2 == 0 else reversed(STEPS):
            environment = os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
            line = [sys.executable, __file__, "--child", name, folder]
            done = subprocess.run(line, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            results[name].append(
                json.loads([t for t in done.stdout.splitlines() if t.startswith('{"name')][-1])
            )
            shown = "round {}: {name} {tokens_per_s:.0f} tok/s, {peak_gb:.2f} GB"
            print(shown.format(number + 1, **results[name][-1]), flush=True)
    show_ratios(results, {"a": "4", "b": "1.3", "b+": "none"})


def generation(folder: str, rounds: int = ROUNDS) -> None:
    import torch

    from plainloop.trainer.tasks.evaluation import EvaluationSettings
    from plainloop.trainer.tasks.generation import generate_texts

    file = data("causalqa/squad2_valid_original_split.csv")
    bench = setup(folder, file, source=1024, split="dev")
    task, rows = bench.task, bench.data.store
    count = 16 if TINY else len(rows)
    model = bench.model().eval()
    settings = EvaluationSettings(bench.world, "fp32", 8192, bench.config.evaluation)

    def decode(ids: Any) -> list[str]:
        texts = task.tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)
        return [text.strip() for text in texts]

    seconds: dict[str, list[float]] = {"usual": [], "ours": []}
    for _ in range(rounds):
        started = time.perf_counter()
        texts = generate_texts(
            model,
            rows,
            task.collate(rows),
            np.arange(count),
            settings,
            decode=decode,
            nulls=(),
            max_new_tokens=20,
            num_beams=1,
        )
        seconds["ours"].append(time.perf_counter() - started)
        assert texts is not None
        started = time.perf_counter()
        usual: list[str] = []
        collate = padder(task, width=1024)
        features = as_features(rows, range(count))
        with torch.inference_mode():
            for i in range(0, len(features), 8):
                batch = collate([{**f, "labels": f["labels"][:100]} for f in features[i : i + 8]])
                ids = model.network.generate(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=20
                )
                usual += [t.strip() for t in task.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        seconds["usual"].append(time.perf_counter() - started)
        same = sum(texts[i] == text for i, text in enumerate(usual))
        print(
            f"usual {seconds['usual'][-1]:.1f} s, ours {seconds['ours'][-1]:.1f} s; {same} of {len(usual)}"
            " texts are the same",
            flush=True,
        )
    ratio = statistics.median(u / o for u, o in zip(seconds["usual"], seconds["ours"], strict=True))
    print(f"usual / ours = {ratio:.2f} (median of rounds; target 3)")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        speed_child(*sys.argv[2:])
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder)
        for name in sys.argv[1:] or ["generate", "speed"]:
            {"speed": speed, "generate": generation}[name](folder)


if __name__ == "__main__":
    main()

"""Numerical comparison of task text with transformers' Seq2SeqTrainer: python tests/bench/text_exact.py

Needs PLAINLOOP_REAL_DATA. Model and data as in text.py; fp32, dropout off. First the gradient norm of 16 rows
with very different target lengths, for 1, 2 and 4 micro-batches; then 50 steps of ours and of a
Seq2SeqTrainer with a corrected loss, on the same batches.
"""

from __future__ import annotations

import tempfile

import numpy as np
from text import BATCH, TINY, as_features, data, our_state, padder, setup, trainer_for, write_model


def norms(folder: str) -> None:
    """One step on the same 16 rows. The gradient norm should not depend on accumulation in either trainer."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    from plainloop.trainer.loop import train_step

    bench = setup(folder, data("causalqa/squad2_valid_original_split.csv"), dropout=0.0)
    task, rows = bench.task, bench.data.store
    target = np.asarray(rows.arrays["target_length"])
    order = np.argsort(-target, kind="stable")
    chosen = np.concatenate([order[:4], order[-12:]])  # four long targets, then twelve short ones
    print(f"target lengths: {target[chosen].tolist()}")
    features = as_features(rows, chosen)
    for correct in (False, True):
        for steps in (1,) if TINY else (1, 2, 4):
            model = AutoModelForSeq2SeqLM.from_pretrained(folder, dropout_rate=0.0)
            trainer = trainer_for(
                model, folder, features, padder(task, decoder=correct), correct=correct, max_steps=1,
                logging_steps=1,
                per_device_train_batch_size=16 // steps, gradient_accumulation_steps=steps, max_grad_norm=1e9,
            )  # fmt: skip
            trainer.train()
            name = "Seq2SeqTrainer, loss corrected" if correct else "unmodified Seq2SeqTrainer"
            norm = trainer.state.log_history[0]["grad_norm"]
            print(
                f"{name}, accumulation {steps}: gradient norm {norm:.6f}",
                flush=True,
            )
    for micro_batches in (1, 2, 4):
        state, options, source = our_state(bench, precision="fp32")
        batch = source[0]._replace(
            micro_batches=[source.collate(part) for part in np.split(chosen, micro_batches)],
            num_targets=int(target[chosen].sum()),
        )
        train_step(state, batch, options)
        print(f"plainloop, {micro_batches} micro-batches: gradient norm {state.grad_norm.item():.6f}")
    assert torch.isfinite(state.grad_norm)


def curve(folder: str, steps: int = 4 if TINY else 50) -> None:
    from transformers import AutoModelForSeq2SeqLM

    from plainloop.trainer.loop import train_step

    bench = setup(folder, data("squad2/train-v2.0.subset.json"), limit=BATCH * steps, dropout=0.0)
    task, rows = bench.task, bench.data.store
    state, options, source = our_state(bench, precision="fp32")
    ours = []
    for step in range(steps):
        state.loss_sum.zero_()
        batch = source[step]
        train_step(state, batch, options)
        ours.append(state.loss_sum.item() / batch.num_targets)
    order = np.concatenate([source.sampler.batch(step) for step in range(steps)])
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dropout_rate=0.0)
    trainer = trainer_for(
        model, folder, as_features(rows, order), padder(task, decoder=True), correct=True, max_steps=steps,
        per_device_train_batch_size=BATCH, lr_scheduler_type="constant", optim="adamw_torch_fused",
        max_grad_norm=1.0,
        logging_steps=50,
    )  # fmt: skip
    trainer.train()
    theirs = trainer.bench_losses
    worst = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    half = steps // 2 - 1
    shown = ("{:.4f} {:.4f} {:.4f}".format(*(losses[i] for i in (0, half, -1))) for losses in (ours, theirs))
    print(
        f"loss of step 1, {half + 1}, {steps}: ours {next(shown)}, theirs {next(shown)};"
        f" largest relative difference {worst:.1e}"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder)
        norms(folder)
        curve(folder)


if __name__ == "__main__":
    main()

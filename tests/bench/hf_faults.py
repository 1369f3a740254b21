"""How HF Trainer handles the faults that tests/e2e and tests/trainer inject into plainloop, one line each.

python tests/bench/hf_faults.py

A tiny BERT, 20 steps, a checkpoint every 5. Each fault is injected into the checkpoint of step 10, from
which a second process resumes; its final weights are compared with those of an undisturbed run.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import accelerate
import torch
import transformers

STEPS = 20


def worker(folder: str, steps: int, mode: str) -> None:
    """mode: resume | jit | plain."""
    from transformers import BertConfig, BertForQuestionAnswering, Trainer, TrainerCallback, TrainingArguments

    class Slow(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            time.sleep(0.2 if mode == "jit" else 0.02)
            (Path(folder) / "begun").touch()

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = BertForQuestionAnswering(config)
    random = torch.Generator().manual_seed(1)
    rows = [
        {
            "input_ids": torch.randint(0, 100, (16,), generator=random),
            "start_positions": 3,
            "end_positions": 5,
        }
        for _ in range(400)
    ]
    arguments = TrainingArguments(
        folder, max_steps=steps, save_steps=5, per_device_train_batch_size=8, report_to=[], use_cpu=True,
        learning_rate=1e-3, lr_scheduler_type="constant", disable_tqdm=True, logging_steps=1000,
        enable_jit_checkpoint=mode == "jit",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[Slow()])
    trainer.train(resume_from_checkpoint=True if mode == "resume" else None)
    torch.save(trainer.model.state_dict(), Path(folder) / "final.pt")


def run(folder: Path, steps: int, mode: str = "plain") -> tuple[int, str]:
    line = [sys.executable, __file__, "worker", str(folder), str(steps), mode]
    done = subprocess.run(line, capture_output=True, text=True)
    return done.returncode, done.stderr.strip().splitlines()[-1] if done.returncode else ""


def difference(one: Path, other: Path) -> float:
    a, b = (torch.load(p / "final.pt", weights_only=True) for p in (one, other))
    return max(float((a[k].float() - b[k].float()).abs().max()) for k in a)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x40
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


FAULTS = {
    "none": ("model.safetensors", lambda file: None),
    "optimizer.pt is missing": ("optimizer.pt", Path.unlink),
    "one bit of model.safetensors flipped": ("model.safetensors", flip),
    "one bit of optimizer.pt flipped": ("optimizer.pt", flip),
    "newest model.safetensors cut": ("model.safetensors", cut),
    "newest optimizer.pt cut": ("optimizer.pt", cut),
}


def sigterm_to_one_rank(folder: Path, mode: str, skew_s: float | None) -> str:
    """Two ranks under torchrun; SIGTERM to rank 0 and, if skew_s is given, to rank 1 skew_s later."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*line, __file__, "worker", str(folder), "400", mode],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (folder / "begun").exists():
        time.sleep(0.1)
    time.sleep(1.5)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for i, pid in enumerate(children if skew_s else children[:1]):
        time.sleep(skew_s if i and skew_s else 0)
        subprocess.run(["kill", "-TERM", pid])
    told = time.monotonic()
    try:
        process.wait(timeout=90)
        ended = f"ended after {time.monotonic() - told:.0f} s with {process.returncode}"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        for pid in children:
            subprocess.run(["kill", "-KILL", pid], stderr=subprocess.DEVNULL)
        ended = "still hung after 90 s"
    saved = sorted((p.name for p in folder.glob("checkpoint-*")), key=lambda name: (len(name), name))
    return f"{ended}; newest checkpoint {saved[-1] if saved else 'none'}; {len(saved)} in all"


def main() -> None:
    print(*(f"{m.__name__} {m.__version__}" for m in (transformers, torch, accelerate)), sep=", ")
    root = Path(tempfile.mkdtemp())
    run(root / "whole", STEPS)
    run(root / "half", STEPS // 2)
    tiny = "TINY" in os.environ  # smoke test: one fault
    for name, (file, damage) in list(FAULTS.items())[: 1 if tiny else None]:
        folder = root / "resumed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(root / "half", folder)
        damage(folder / "checkpoint-10" / file)
        code, error = run(folder, STEPS, "resume")
        told = error[:120] if code else f"weights differ by {difference(folder, root / 'whole'):.1e}"
        print(f"{name}: exit {code}; {told}", flush=True)
    for mode, skew_s in () if tiny else (("plain", None), ("jit", None), ("jit", 0.6)):
        shutil.rmtree(root / "signal", ignore_errors=True)
        (root / "signal").mkdir()
        to = f"both ranks, {skew_s} s apart" if skew_s else "one rank"
        print(f"SIGTERM to {to}, {mode}: {sigterm_to_one_rank(root / 'signal', mode, skew_s)}", flush=True)
    shutil.rmtree(root)


if __name__ == "__main__":
    worker(sys.argv[2], int(sys.argv[3]), sys.argv[4]) if sys.argv[1:2] == ["worker"] else main()

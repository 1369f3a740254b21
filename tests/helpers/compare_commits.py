"""Does a change alter the arithmetic? Train at another commit and at this one, and compare bit by bit.

    python tests/helpers/compare_commits.py COMMIT

Eight fp32 runs on each side: task span and text, on one and two ranks, uninterrupted and stopped and resumed.
Losses, gradient norms, evaluations, final weights and optimizer state must be equal. Takes five minutes.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TINY = "TINY" in os.environ  # smoke test: one task, one rank
STEPS, STOP_AT = 8, 3
SEEN = ("loss", "grad_norm", "lr", "exact", "f1", "em", "rougeL_f1")


def make_inputs(folder: Path) -> dict[str, list[str]]:
    """Generated data and random models; the options of a run of each task. Made once, by this checkout."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers.tiny_models import tiny_bert, tiny_t5_for  # noqa: PLC0415

    from plainloop.data.demo import write_demo, write_text_demo

    train, dev = write_demo(folder / "squad", contexts=40)
    text_train, text_dev = write_text_demo(folder / "causalqa", rows=120, dev_rows=40)
    tiny_bert(folder / "bert", train)
    tiny_t5_for(folder / "t5", text_train)
    span = (
        f"--task span --model.path {folder}/bert --data.train {train} --data.dev {dev} --data.max_length 96"
    )
    text = f"--task text --model.path {folder}/t5 --data.train {text_train} --data.dev {text_dev}"
    found = {"span": f"{span} --data.stride 24".split(), "text": f"{text} --text.max_new_tokens 8".split()}
    return {"span": found["span"]} if TINY else found


def train(package: Path, options: list[str], run_dir: Path, ranks: int) -> None:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    )
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [
            sys.executable, *launcher, "-m", "plainloop.trainer", "train", *options,
            "--run_dir", str(run_dir),
            "--batch_size", "8", "--tokens_per_device", "200", "--precision", "fp32", "--optim.lr", "1e-3",
            "--max_steps", str(STEPS), "--log.every_steps", "1", "--log.tensorboard", "false",
            "--checkpoint.every_steps", "0", "--evaluation.every_steps", "4",
            "--data.cache_dir", f"{run_dir}-cache",
        ],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if result.returncode and "--stop_at_step" not in options:
        raise SystemExit(result.stderr[-3000:])


def outcome(run_dir: Path) -> dict[str, Any]:
    """Logged metrics, and a digest of the tensors of the last checkpoint."""
    from safetensors.numpy import load_file

    found: dict[str, Any] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        kept = {name: record[name] for name in SEEN if name in record}
        if kept:
            found[f"{record['kind']} {record['step']}"] = kept
    checkpoint = run_dir / f"checkpoints/step-{STEPS:08d}"
    for file in ("model.safetensors", "optimizer.safetensors"):
        tensors = load_file(checkpoint / file)
        bits = b"".join(name.encode() + tensors[name].tobytes() for name in sorted(tensors))
        found[file] = hashlib.sha256(bits).hexdigest()
    return found


def all_runs(package: Path, inputs: dict[str, list[str]], folder: Path) -> dict[str, Any]:
    outcomes = {}
    for task, options in inputs.items():
        for ranks in (1,) if TINY else (1, 2):
            whole, halves = folder / f"{task}-{ranks}-whole", folder / f"{task}-{ranks}-halves"
            train(package, options, whole, ranks)
            if TINY:
                return {whole.name: outcome(whole)}
            train(package, [*options, "--stop_at_step", str(STOP_AT)], halves, ranks)
            train(package, options, halves, ranks)
            outcomes |= {run.name: outcome(run) for run in (whole, halves)}
    return outcomes


def main(commit: str) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder, worktree = Path(name), Path(name) / "before"
        subprocess.run(
            ["git", "worktree", "add", "--quiet", "--detach", worktree, commit], cwd=ROOT, check=True
        )
        try:
            inputs = make_inputs(folder)
            before = all_runs(worktree / ".pkg", inputs, folder / "runs-before")
            now = all_runs(ROOT / ".pkg", inputs, folder / "runs-now")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", worktree], cwd=ROOT, check=True)
    different = [run for run in before if before[run] != now[run]]
    for run in before:
        first = f"loss {before[run]['train 1']['loss']!r}, model {before[run]['model.safetensors'][:16]}"
        same = "DIFFERENT" if run in different else "equal to the last bit"
        print(f"{run:16} {len(before[run])} records, {same}: {first}")
    return int(bool(different))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))

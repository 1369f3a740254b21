"""Reading and tokenising SQuAD-like data: plainloop and `datasets.map`, questions/s and peak memory.

python tests/bench/tokenise.py [QUESTIONS ...]; default: 130,000 and four times that. The questions are those
of the real training file (or generated ones), repeated under new ids, in one JSONL file. Each variant runs in
a process of its own, with two processes for tokenising, at --data.max_length 384 and --data.stride 128.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import training_file

PROCESSES = 2


def write_questions(folder: str, count: int) -> Path:
    from plainloop.data.readers.examples import read_examples

    examples, path = read_examples(training_file(folder)), Path(folder) / f"{count}.jsonl"
    with open(path, "w", encoding="utf-8") as stream:
        for number in range(count):
            e = examples[number % len(examples)]
            answers = {"text": [a.text for a in e.answers], "answer_start": [a.start for a in e.answers]}
            row = {"id": f"{number}", "question": e.question, "context": e.context, "answers": answers}
            stream.write(json.dumps(row) + "\n")
    return path


def plainloop(path: str, folder: str) -> int:
    import torch

    from plainloop.trainer.commands.demo import packaged_encoder
    from plainloop.trainer.config.options import TrainConfig
    from plainloop.trainer.distributed.world import World
    from plainloop.trainer.tasks import base as tasks
    from plainloop.trainer.tasks.span import SpanTask

    config = TrainConfig()
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, path=packaged_encoder()),
        data=dataclasses.replace(config.data, cache_dir=folder, processes=PROCESSES),
    )  # fmt: skip
    world = World(0, 1, 0, torch.device("cpu"))
    return len(tasks.load_split(SpanTask(config), "train", path, config, world).store)


def hugging_face(path: str, folder: str) -> int:
    """load_dataset and map, with features and labels made as in the usual example."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    from plainloop.trainer.commands.demo import packaged_encoder

    tokenizer = AutoTokenizer.from_pretrained(packaged_encoder())

    def prepare(rows: dict[str, list[Any]]) -> Any:
        questions = [question.lstrip() for question in rows["question"]]
        encoded = tokenizer(
            questions, rows["context"], truncation="only_second", max_length=384, stride=128,
            return_overflowing_tokens=True, return_offsets_mapping=True, padding="max_length",
        )  # fmt: skip
        owners, starts, ends = encoded.pop("overflow_to_sample_mapping"), [], []
        for i, offsets in enumerate(encoded.pop("offset_mapping")):
            answers, sequence = rows["answers"][owners[i]], encoded.sequence_ids(i)
            low = sequence.index(1)
            high = len(sequence) - 1 - sequence[::-1].index(1)
            inside = False
            if answers["answer_start"]:
                first = answers["answer_start"][0]
                last = first + len(answers["text"][0])
                inside = offsets[low][0] <= first and offsets[high][1] >= last
            if not inside:
                starts.append(0)
                ends.append(0)
                continue
            while low < len(offsets) and offsets[low][0] <= first:
                low += 1
            while offsets[high][1] >= last:
                high -= 1
            starts.append(low - 1)
            ends.append(high + 1)
        encoded["start_positions"], encoded["end_positions"] = starts, ends
        return encoded

    rows = load_dataset("json", data_files=path, split="train", cache_dir=folder)
    done = rows.map(prepare, batched=True, num_proc=PROCESSES, remove_columns=rows.column_names)
    return len(done)


VARIANTS = {"plainloop": plainloop, "datasets.map": hugging_face}


def measure(variant: str, path: Path) -> dict[str, float]:
    """Run a variant in a process of its own. Memory in GB: private memory of the process and its children."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--run", variant, str(path), folder]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(result.stdout.splitlines()[-1]))


def run(variant: str, path: str, folder: str) -> None:
    started = time.perf_counter()
    windows = VARIANTS[variant](path, folder)
    seconds = time.perf_counter() - started
    gigabyte = 1 << 20  # ru_maxrss is in KiB
    parent = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / gigabyte
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / gigabyte
    print(json.dumps({"windows": windows, "seconds": seconds, "parent": parent, "child": child}))


def main() -> None:
    counts = [int(argument) for argument in sys.argv[1:]] or [130_000, 520_000]
    if os.environ.get("TINY"):
        counts = [3000]
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            path = write_questions(folder, count)
            speed = {}
            for variant in VARIANTS:
                found = measure(variant, path)
                speed[variant] = count / found["seconds"]
                print(
                    f"{variant}: {count} questions, {found['windows']:.0f} windows, {found['seconds']:.1f} s,"
                    f" {speed[variant]:.0f} questions/s; peak memory {found['parent']:.2f} GB, each of"
                    f" {PROCESSES} processes {found['child']:.2f} GB",
                    flush=True,
                )
            print(f"plainloop / datasets.map = {speed['plainloop'] / speed['datasets.map']:.2f}")
            path.unlink()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(*sys.argv[2:])
    else:
        main()

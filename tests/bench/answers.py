"""Answering questions: `plainloop predict`'s Predictor against a loop as people write it, questions/s.

python tests/bench/answers.py [--tiny] [--model RUN] [--questions N] [--rounds N] [--haystack]

The loop: AutoModelForQuestionAnswering in fp32, windows of 384 tokens with a stride of 128, padded to 384, in
batches of 8, and the best span of each question. Ours runs in fp32 too, in the precision chosen for this
machine, and with onnxruntime if it is installed. One process, two threads. `same` is the share of questions
with the same best text as the loop's. --haystack: also transformers-haystack's reader, if installed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from plainloop.data.types import Example

WIDTH, STRIDE, LONGEST = 384, 128, 30
Answers = list[str]


def by_hand(path: str) -> Callable[[Sequence[Example]], Answers]:
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForQuestionAnswering.from_pretrained(path).eval()

    def answer(examples: Sequence[Example]) -> Answers:
        encoded = tokenizer(
            [e.question.strip() for e in examples], [e.context for e in examples], truncation="only_second",
            max_length=WIDTH, stride=STRIDE, padding="max_length", return_overflowing_tokens=True,
            return_offsets_mapping=True, return_tensors="pt",
        )  # fmt: skip
        owner, offsets = encoded.pop("overflow_to_sample_mapping").tolist(), encoded.pop("offset_mapping")
        inside = torch.tensor([[s == 1 for s in encoded.sequence_ids(i)] for i in range(len(owner))])
        best = [(-torch.inf, "")] * len(examples)
        band = torch.ones(WIDTH, WIDTH).triu().tril(LONGEST - 1).bool()
        for at in range(0, len(owner), 8):
            with torch.inference_mode():
                output = model(**{name: tensor[at : at + 8] for name, tensor in encoded.items()})
            for i, (start, end) in enumerate(
                zip(output.start_logits, output.end_logits, strict=True), start=at
            ):
                valid = band & inside[i][:, None] & inside[i][None, :]
                sums = (start[:, None] + end[None, :]).masked_fill(~valid, -torch.inf)
                first, last = divmod(int(sums.argmax()), WIDTH)
                score = float(sums[first, last])
                if score > best[owner[i]][0]:
                    text = examples[owner[i]].context[int(offsets[i, first, 0]) : int(offsets[i, last, 1])]
                    best[owner[i]] = score, text
        return [text for _, text in best]

    return answer


def ours(path: str, **options: Any) -> Callable[[Sequence[Example]], Answers]:
    from plainloop.trainer.trained.predictor import Predictor

    predictor = Predictor.from_run(path, max_length=WIDTH, stride=STRIDE, null_threshold=1e9, **options)
    return lambda examples: [a["answer"] for _, a in predictor.stream(examples, processes=1)]


def onnx(path: str, folder: str) -> Callable[[Sequence[Example]], Answers]:
    from plainloop.trainer.config.trained_options import ExportConfig
    from plainloop.trainer.publish.export import export

    export(ExportConfig(run=path, out=f"{folder}/onnx", onnx=True))
    return ours(f"{folder}/onnx")


def haystack(path: str) -> Callable[[Sequence[Example]], Answers]:
    from haystack import Document
    from haystack_integrations.components.readers.transformers import TransformersExtractiveReader

    reader = TransformersExtractiveReader(
        model=path, max_seq_length=WIDTH, stride=STRIDE, no_answer=False, top_k=1,
        max_batch_size=8,
    )  # fmt: skip
    reader.warm_up()

    def answer(examples: Sequence[Example]) -> Answers:
        found = [reader.run(query=e.question, documents=[Document(content=e.context)]) for e in examples]
        return [one["answers"][0].data if one["answers"] else "" for one in found]

    return answer


def a_run(folder: str) -> tuple[str, str]:
    """A run of a few steps, and its data: for a tiny round."""
    from plainloop.data.demo import write_demo
    from plainloop.trainer.cli import main
    from plainloop.trainer.commands.demo import packaged_encoder

    train, dev = write_demo(Path(folder) / "demo", contexts=8)
    options = ["--max_steps", "2", "--batch_size", "4", "--log.tensorboard", "false", "--device", "cpu"]
    paths = ["--model.path", packaged_encoder(), "--data.train", str(train), "--run_dir", f"{folder}/run"]
    assert main(["train", *paths, *options, "--data.cache_dir", folder]) == 0
    return f"{folder}/run", str(dev)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--haystack", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        path, data = (given.model, given.data) if given.model else a_run(folder)
        if given.tiny or "TINY" in os.environ:
            given.questions, given.rounds = 8, 1
        compare(path, data, folder, given)


def compare(path: str, data: str, folder: str, given: Any) -> None:
    from plainloop.data.readers.examples import read_examples
    from plainloop.trainer.trained.model_folder import checkpoint_path

    count, rounds = given.questions, given.rounds
    every = read_examples(data)
    examples = every[:: max(1, len(every) // count)][:count]
    checkpoint = checkpoint_path(path)
    variants = {
        "loop": by_hand(checkpoint),
        "ours fp32": ours(path, precision="fp32"),
        "ours auto": ours(path),
    }
    try:
        variants["ours onnx"] = onnx(path, folder)
    except ValueError as error:
        print(error, file=sys.stderr)
    if given.haystack:
        variants["haystack"] = haystack(checkpoint)
    texts = {name: answer(examples[:16]) for name, answer in variants.items()}  # warm up
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, answer in variants.items():
            started = time.perf_counter()
            texts[name] = answer(examples)
            speeds[name].append(len(examples) / (time.perf_counter() - started))
    for name, values in speeds.items():
        same = statistics.fmean(a == b for a, b in zip(texts[name], texts["loop"], strict=True))
        print(f"{name:10} {statistics.median(values):8.1f} questions/s   same {same:.3f}")
    for name in variants:
        ratios = [a / b for a, b in zip(speeds[name], speeds["loop"], strict=True)]
        print(f"{name} / loop = {statistics.median(ratios):.2f} (median of {rounds} rounds)")


if __name__ == "__main__":
    main()

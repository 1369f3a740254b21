import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from plainloop.data.loader import EncoderCollate, Steps, step_batches
from plainloop.data.samplers import MULTIPLES, Sampler, few_widths
from plainloop.data.store import Store, build
from plainloop.data.types import IGNORE_INDEX


def store(path: Path) -> Store:
    lengths = np.array([3, 9, 5], dtype=np.int32)
    arrays = {
        "input_ids": np.arange(1, 18, dtype=np.int32),
        "length": lengths,
        "segment": np.array([2, 4, 5], dtype=np.int32),
        "label": np.array([[0, 0], [5, 6], [3, 3]], dtype=np.int32),
    }
    return build(path / "store", lambda writer: writer.append(arrays) or {})


def test_collate_by_hand(tmp_path: Path) -> None:
    inputs, labels = EncoderCollate(store(tmp_path), pad_token_id=0, max_length=16, segments=True)(
        np.array([0, 2])
    )
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 0, 0, 0, 0, 0], [13, 14, 15, 16, 17, 0, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    assert inputs["token_type_ids"].tolist() == [[0, 0, 1, 0, 0, 0, 0, 0], [0] * 8]
    assert labels["start"].tolist() == [0, 3] and labels["end"].tolist() == [0, 3]


def steps(path: Path, world_size: int, rank: int) -> Steps:
    data = store(path)
    collate = EncoderCollate(data, pad_token_id=0, max_length=16, segments=False)
    sampler = Sampler(data.lengths, batch_size=2, seed=0)
    return Steps(sampler, collate, np.ones(3, dtype=np.int64), world_size=world_size, rank=rank, max_tokens=8)


def test_rank_without_rows_gets_a_row_that_is_ignored_in_the_loss(tmp_path: Path) -> None:
    batch = steps(tmp_path, 3, 2)[0]
    assert len(batch.micro_batches) == 1
    assert (batch.micro_batches[0].labels["start"] == IGNORE_INDEX).all()
    assert batch.num_targets == steps(tmp_path, 1, 0)[0].num_targets


def test_batches_can_start_at_any_step_and_do_not_depend_on_workers(tmp_path: Path) -> None:
    source = steps(tmp_path, 1, 0)
    for workers in (0, 2):
        batches = list(step_batches(source, start=3, total=7, workers=workers, pin=False))
        assert len(batches) == 4
        for step, batch in enumerate(batches, start=3):
            for got, expected in zip(batch.micro_batches, source[step].micro_batches, strict=True):
                assert torch.equal(got.inputs["input_ids"], expected.inputs["input_ids"])


def test_largest_micro_batches_respect_the_token_budget_and_widths(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(5, 120, size=200).astype(np.int32)
    arrays = {
        "input_ids": np.ones(int(lengths.sum()), dtype=np.int32), "length": lengths,
        "segment": lengths, "label": np.zeros((200, 2), dtype=np.int32),
    }  # fmt: skip
    rows = build(tmp_path / "many", lambda writer: writer.append(arrays) or {})
    for widths in (MULTIPLES, few_widths(lengths, [3], 128)):
        collate = EncoderCollate(rows, pad_token_id=0, max_length=128, segments=False, widths=widths)
        given = {"world_size": 1, "rank": 0, "max_tokens": 600}
        steps = Steps(Sampler(lengths, 16, 0), collate, np.ones(200, dtype=np.int64), **given)
        sizes = [m.inputs["input_ids"].numel() for m in steps.largest()]
        seen = [m.inputs["input_ids"].numel() for i in range(13) for m in steps[i].micro_batches]
        assert max(seen) <= max(sizes) <= 600
        assert steps.largest()[0].inputs["input_ids"].shape[1] == widths.pad(int(lengths.max()), 0, 128)


ORPHAN = """
import os, time
from plainloop.data.processes import end_with_parent
if not (rank := os.fork()):
    parent = os.getpid()
    if os.fork():
        os._exit(0)
    while os.getppid() == parent:
        time.sleep(0.001)
    end_with_parent(parent=parent)
    print("still alive", flush=True)
    os._exit(0)
os.waitpid(rank, 0)
"""


def test_a_worker_whose_rank_died_before_it_could_ask_the_kernel_ends() -> None:
    """Else it would hold the connections of the dead rank, and the job would hang: nobody sees the death."""
    result = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

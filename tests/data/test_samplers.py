import itertools
from typing import Any

import numpy as np
import pytest

from plainloop.data.samplers import (
    Sampler,
    few_widths,
    padded,
    padded_tokens,
    shard_evaluation,
    shard_step,
    to_micro_batches,
)

LENGTHS = np.random.default_rng(0).integers(5, 120, size=103)


def test_epoch_contains_every_row_once() -> None:
    sampler = Sampler(LENGTHS, batch_size=10, seed=3, bucket=4)
    batches = sampler.epoch_batches(1)
    assert sorted(np.concatenate(batches)) == list(range(103))
    assert sorted(map(len, batches)) == [3] + [10] * 10
    assert sampler.steps_per_epoch == 11


def test_batches_are_a_function_of_seed_and_step() -> None:
    sampler, same = (Sampler(LENGTHS, batch_size=10, seed=3) for _ in range(2))
    assert np.array_equal(sampler.batch(25), same.batch(25))
    assert np.array_equal(sampler.batch(25), sampler.epoch_batches(2)[3])
    assert not np.array_equal(sampler.batch(25), Sampler(LENGTHS, batch_size=10, seed=4).batch(25))
    assert not np.array_equal(sampler.batch(3), sampler.batch(14))  # same position in another epoch


def test_bucketing_sorts_by_length_and_still_shuffles() -> None:
    lengths = np.random.default_rng(0).integers(5, 120, size=1000)

    def padding(bucket: int) -> float:
        batches = Sampler(lengths, batch_size=10, seed=0, bucket=bucket).epoch_batches(0)
        return 1 - lengths.sum() / padded_tokens(batches, lengths)

    assert padding(0) > 0.3 and padding(50) < 0.1
    first = [Sampler(lengths, batch_size=10, seed=0).epoch_batches(epoch)[0] for epoch in (0, 1)]
    assert set(first[0]) != set(first[1])


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_a_step_is_sharded_so_that_every_row_is_on_one_rank_within_the_token_budget(world_size: int) -> None:
    rows = np.arange(20, 40)
    shares = shard_step(rows, LENGTHS, world_size=world_size, max_tokens=256)
    assert sorted(np.concatenate([m for share in shares for m in share])) == list(rows)
    for micro_batch in (m for share in shares for m in share):
        assert padded(LENGTHS[micro_batch].max()) * len(micro_batch) <= 256 or len(micro_batch) == 1
    work = [sum(padded(int(n)) for m in share for n in LENGTHS[m]) for share in shares]
    assert max(work) - min(work) <= padded(int(LENGTHS[rows].max()))


def test_fewer_rows_than_ranks_leaves_empty_shares() -> None:
    assert [len(share) for share in shard_step(np.array([4, 9]), LENGTHS, world_size=3, max_tokens=999)] == [
        1,
        1,
        0,
    ]


def test_micro_batches_by_hand() -> None:
    lengths = np.array([30, 8, 16, 3])  # padded: 32, 8, 16, 8
    assert [list(m) for m in to_micro_batches(np.array([0, 2, 1, 3]), lengths, max_tokens=48)] == [
        [0],
        [2, 1, 3],
    ]
    assert [list(m) for m in to_micro_batches(np.array([0, 2, 1, 3]), lengths, max_tokens=1)] == [
        [0],
        [2],
        [1],
        [3],
    ]


def test_evaluations_have_the_same_micro_batches_for_any_number_of_ranks() -> None:
    rows = np.arange(len(LENGTHS))

    def micro_batches(world_size: int) -> set[tuple[int, ...]]:
        return {
            tuple(m)
            for share in shard_evaluation(rows, LENGTHS, world_size=world_size, max_tokens=300)
            for m in share
        }

    assert micro_batches(1) == micro_batches(2) == micro_batches(5)


def test_padded() -> None:
    assert [padded(n) for n in (1, 8, 9)] == [8, 8, 16]
    assert padded(381, limit=383) == 383 and padded(380, limit=384) == 384


def test_few_widths_minimize_padding() -> None:
    """Compare with every choice of that many candidates."""
    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(1, 100, size=40)
        candidates = sorted({padded(int(n), 99) for n in lengths})
        for count in (1, 2, 3):
            (found,) = few_widths(lengths, [count], 99).of_part
            assert len(found) <= count and found[-1] == candidates[-1] and set(found) <= set(candidates)

            def cost(widths: tuple[int, ...], lengths: Any = lengths) -> int:
                return sum(min(w for w in widths if w >= n) for n in lengths)

            choices = itertools.combinations(candidates, min(count, len(candidates)))
            assert cost(found) == min(cost(c) for c in choices if c[-1] == candidates[-1])


def test_micro_batches_are_padded_to_the_widths() -> None:
    widths = few_widths(LENGTHS, [3], 384)
    rows = np.arange(len(LENGTHS))[:40]
    for share in shard_step(rows, LENGTHS, world_size=2, max_tokens=1024, widths=widths):
        for micro_batch in share:
            width = widths.pad(int(LENGTHS[micro_batch].max()), 0)
            assert width in widths.of_part[0]
            assert width * len(micro_batch) <= 1024 or len(micro_batch) == 1
            assert padded_tokens([micro_batch], LENGTHS, widths) == width * len(micro_batch)
    two = few_widths(np.stack([LENGTHS, LENGTHS % 7 + 1], axis=1), [3, 2], 2**31)
    assert two.num_shapes == len(two.of_part[0]) * len(two.of_part[1]) <= 6

"""The batch partition against what it promises, over every small case."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import pytest

from hvdtrain.data.partition import LAST_BATCH, BatchPartition, Step, share
from hvdtrain.errors import ConfigError

LENGTHS = (1, 2, 3, 5, 7, 8, 11, 16, 17, 24)
GLOBAL_BATCHES = (1, 2, 3, 5, 8, 17, 30)
WORLDS = (1, 2, 3, 8)
ACCUMULATES = (1, 2, 3, 4)
CASES = list(itertools.product(LENGTHS, GLOBAL_BATCHES, WORLDS, ACCUMULATES))


def all_ranks(length: int, batch: int, world: int, accumulate: int = 1, **more: Any) -> list[BatchPartition]:
    return [
        BatchPartition(
            length=length, global_batch_size=batch, world_size=world, rank=rank, accumulate=accumulate, **more
        )
        for rank in range(world)
    ]


def positions(step: Step) -> list[int]:
    return [position for micro_batch in step.micro_batches for position in micro_batch]


def test_shares_are_contiguous_complete_and_differ_by_at_most_one_the_larger_first() -> None:
    for total, parts in itertools.product(range(20), range(1, 10)):
        shares = [share(total, parts, index) for index in range(parts)]
        assert [position for part in shares for position in part] == list(range(total))
        sizes = [len(part) for part in shares]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize(("total", "parts", "index"), [(-1, 1, 0), (4, 0, 0), (4, 2, 2), (4, 2, -1)])
def test_a_share_that_does_not_exist_is_refused(total: int, parts: int, index: int) -> None:
    with pytest.raises(ConfigError, match="there is no part"):
        share(total, parts, index)


def test_every_sample_is_met_exactly_once_over_all_ranks_and_micro_batches() -> None:
    for length, batch, world, accumulate in CASES:
        seen = [
            position
            for partition in all_ranks(length, batch, world, accumulate)
            for step in partition.steps()
            for position in positions(step)
        ]
        assert sorted(seen) == list(range(length)), (length, batch, world, accumulate)


def test_the_global_batches_are_the_same_at_every_world_size_and_accumulation() -> None:
    for length, batch, world, accumulate in CASES:
        expected = [list(range(length))[start : start + batch] for start in range(0, length, batch)]
        ranks = all_ranks(length, batch, world, accumulate)
        found = [
            [position for step in steps for position in positions(step)]
            for steps in zip(*(partition.steps() for partition in ranks), strict=True)
        ]
        assert found == expected, (length, batch, world, accumulate)


def test_ranks_and_micro_batches_differ_by_at_most_one_sample() -> None:
    for length, batch, world, accumulate in CASES:
        for steps in zip(
            *(partition.steps() for partition in all_ranks(length, batch, world, accumulate)), strict=True
        ):
            shares = [len(positions(step)) for step in steps]
            assert max(shares) - min(shares) <= 1
            for step in steps:
                sizes = [len(micro_batch) for micro_batch in step.micro_batches]
                assert all(sizes)
                assert not sizes or max(sizes) - min(sizes) <= 1
                assert len(sizes) == min(accumulate, len(positions(step)))


def test_all_ranks_agree_on_the_number_of_steps_their_samples_and_whether_everybody_has_one() -> None:
    for length, batch, world, accumulate in CASES:
        ranks = all_ranks(length, batch, world, accumulate)
        assert {partition.steps_per_epoch for partition in ranks} == {-(-length // batch)}
        for steps in zip(*(partition.steps() for partition in ranks), strict=True):
            assert len({(step.start, step.samples, step.every_rank) for step in steps}) == 1
            assert steps[0].samples == sum(len(positions(step)) for step in steps)
            assert steps[0].every_rank == all(step.micro_batches for step in steps)


def test_resuming_at_any_global_batch_gives_the_rest_of_the_epoch() -> None:
    for length, batch, world, accumulate in CASES:
        for partition in all_ranks(length, batch, world, accumulate):
            whole = list(partition.steps())
            for done, step in enumerate(whole):
                assert list(partition.steps(step.start)) == whole[done:]
            assert list(partition.steps(length)) == []


def test_resuming_on_another_number_of_ranks_meets_each_remaining_sample_once() -> None:
    done = {
        position for partition in all_ranks(23, 6, 2) for step in [partition.step(0)] for position in positions(step)
    }
    rest = [p for partition in all_ranks(23, 6, 3) for step in partition.steps(6) for p in positions(step)]
    assert sorted(rest) == sorted(set(range(23)) - done)


@pytest.mark.parametrize("start", [-6, -1, 1, 5, 7, 22, 24, 30])
def test_resuming_where_no_global_batch_begins_is_refused(start: int) -> None:
    with pytest.raises(ConfigError, match=f"after {start} of 23 samples.*global batch of 6"):
        BatchPartition(length=23, global_batch_size=6).steps(start)


def test_a_data_set_smaller_than_the_world_leaves_the_last_ranks_without_samples() -> None:
    ranks = all_ranks(3, 8, 5)
    assert [positions(partition.step(0)) for partition in ranks] == [[0], [1], [2], [], []]
    assert ranks[4].step(0) == Step(start=0, samples=3, micro_batches=(), every_rank=False, passes=1)


def test_a_global_batch_smaller_than_the_world_is_exact_too() -> None:
    ranks = all_ranks(5, 2, 3)
    assert [[positions(step) for step in partition.steps()] for partition in ranks] == [
        [[0], [2], [4]],
        [[1], [3], []],
        [[], [], []],
    ]


def test_dropping_the_last_batch_leaves_only_whole_ones() -> None:
    for partition in all_ranks(23, 6, 2, last_batch="drop"):
        steps = list(partition.steps())
        assert [step.samples for step in steps] == [6, 6, 6]
        assert (partition.steps_per_epoch, partition.samples_per_epoch) == (3, 18)
        assert list(partition.steps(18)) == list(partition.steps(23)) == []
        assert list(partition.steps(12)) == steps[2:]
    for partition in all_ranks(24, 6, 2, last_batch="drop"):
        assert partition.steps_per_epoch == 4


def test_merging_joins_the_last_batch_with_the_one_before_and_loses_nothing() -> None:
    for length, batch, world, accumulate in CASES:
        ranks = all_ranks(length, batch, world, accumulate, last_batch="merge")
        steps = [list(partition.steps()) for partition in ranks]
        met = [position for rank in steps for step in rank for position in positions(step)]
        assert sorted(met) == list(range(length)), (length, batch, world, accumulate)
        assert all(step.samples >= min(batch, length) for step in steps[0])
        assert [step.samples for step in steps[0]][:-1] == [batch] * (len(steps[0]) - 1)
        assert ranks[0].samples_per_epoch == length


def test_merging_needs_a_batch_before() -> None:
    for length in (3, 6):  # shorter than a global batch, and just one
        (partition,) = all_ranks(length, 6, 1, last_batch="merge")
        assert [step.samples for step in partition.steps()] == [length]


def test_a_run_goes_on_at_each_step_whatever_becomes_of_the_last_batch() -> None:
    for length, batch, world, accumulate in CASES:
        for last_batch in LAST_BATCH:
            if last_batch == "drop" and length < batch:
                continue
            (partition, *_) = all_ranks(length, batch, world, accumulate, last_batch=last_batch)
            steps = list(partition.steps())
            for done in range(len(steps) + 1):
                assert list(partition.steps(sum(step.samples for step in steps[:done]))) == steps[done:]


def test_a_run_that_kept_its_last_batch_cannot_go_on_merging_where_only_that_is_left() -> None:
    with pytest.raises(ConfigError, match=r"no global batch of 6 begins there.*last_batch.*now merge"):
        BatchPartition(length=23, global_batch_size=6, last_batch="merge").steps(18)


def test_empty_batches_are_needed_exactly_where_some_rank_makes_fewer_passes_than_another() -> None:
    for length, batch, world, accumulate in CASES:
        for last_batch in LAST_BATCH:
            if last_batch == "drop" and length < batch:
                continue
            ranks = all_ranks(length, batch, world, accumulate, last_batch=last_batch)
            needed = any(len(step.micro_batches) < step.passes for partition in ranks for step in partition.steps())
            assert {partition.needs_empty_batches for partition in ranks} == {needed}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "the data set has 0 samples; it needs at least 1"),
        ({"global_batch_size": 0}, "global_batch_size must be at least 1, got 0"),
        ({"global_batch_size": -4}, "global_batch_size must be at least 1, got -4"),
        ({"world_size": 0}, "world_size must be at least 1, got 0"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 does not exist in a world of 2"),
        ({"rank": -1}, "rank -1 does not exist"),
        ({"last_batch": "Drop"}, "last_batch must be one of keep, drop, merge, got 'Drop'"),
        ({"global_batch_size": 11, "last_batch": "drop"}, "10 samples, fewer than the global batch of 11"),
    ],
)
def test_values_that_cannot_work_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchPartition(**{"length": 10, "global_batch_size": 4, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize("index", [-1, 3])
def test_a_global_batch_outside_the_epoch_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match=f"no global batch {index}"):
        BatchPartition(length=10, global_batch_size=4).step(index)


def test_memory_does_not_grow_with_the_data_set() -> None:
    tracemalloc.start()
    try:
        partition = BatchPartition(length=10**12, global_batch_size=10**9, world_size=1000, rank=999, accumulate=4)
        last = list(partition.steps(10**12 - 10**9))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert partition.steps_per_epoch == 1000
    assert last[0].micro_batches[-1][-1] == 10**12 - 1
    assert peak < 100_000

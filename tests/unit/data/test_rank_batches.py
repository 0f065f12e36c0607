"""One rank's batches, on ranks that are threads of this process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Sampler, TensorDataset, WeightedRandomSampler
from turns import Turns, on_ranks

from hvdtrain.data.partition import LAST_BATCH
from hvdtrain.data.rank_batches import RankBatches, evaluation_batches
from hvdtrain.data.source import source_of
from hvdtrain.errors import ConfigError


def numbers(length: int) -> TensorDataset:
    return TensorDataset(torch.arange(length))


def met(batches: Any) -> list[list[int]]:
    return [batch[0].tolist() for batch in batches]


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 30),
    batch_size=st.integers(1, 5),
    world=st.integers(1, 4),
    last_batch=st.sampled_from(LAST_BATCH),
    shuffle=st.booleans(),
)
def test_every_rank_iterates_equally_often_over_disjoint_batches(
    length: int, batch_size: int, world: int, last_batch: str, shuffle: bool
) -> None:
    if last_batch == "drop" and length < batch_size * world:
        return
    data = DataLoader(numbers(length), batch_size=batch_size, shuffle=shuffle)

    def epoch(ranks: Turns) -> tuple[int, list[list[int]]]:
        batches = RankBatches(source_of(data, last_batch=last_batch), ranks, seed=3)
        return len(batches), met(batches)

    found = on_ranks(world, epoch)
    assert {steps for steps, _ in found} == {len(batches) for _, batches in found} == {found[0][0]}
    seen = sorted(index for _, batches in found for batch in batches for index in batch)
    if last_batch == "drop":
        assert len(seen) == len(set(seen)) == length // (batch_size * world) * batch_size * world
    else:
        assert seen == list(range(length))


def test_each_iteration_is_the_next_epoch_unless_one_is_set() -> None:
    def epochs(ranks: Turns) -> list[Any]:
        batches = RankBatches(source_of(numbers(12), batch_size=3, shuffle=True), ranks, seed=1)
        first, second = met(batches), met(batches)
        batches.set_epoch(0)
        assert (batches.epoch, batches.batch_size, len(batches.dataset)) == (0, 3, 12)
        return [first, second, met(batches)]

    for first, second, again in on_ranks(2, epochs):
        assert first == again != second


def test_micro_batches_come_with_their_sizes_and_empty_ones_keep_ranks_in_step() -> None:
    def steps(ranks: Turns) -> list[Any]:
        batches = RankBatches(source_of(numbers(13)), ranks, global_batch_size=8, accumulate=2, equal_passes=True)
        return [(step.samples, [(len(batch[0]), size) for batch, size in step]) for step in batches.steps(0)]

    assert on_ranks(4, steps) == [
        [(8, [(1, 1), (1, 1)]), (5, [(1, 1), (1, 1)])],
        *[[(8, [(1, 1), (1, 1)]), (5, [(1, 1), (0, 0)])]] * 3,
    ]


def test_an_epoch_goes_on_in_the_middle() -> None:
    def rest(ranks: Turns) -> bool:
        batches = RankBatches(
            source_of(numbers(23), shuffle=True, last_batch="merge"), ranks, global_batch_size=6, seed=2
        )
        whole = [met(batch for batch, _ in step) for step in batches.steps(1)]
        return [met(batch for batch, _ in step) for step in batches.steps(1, 12)] == whole[2:]

    assert on_ranks(2, rest) == [True, True]


@pytest.mark.parametrize("done", range(5))
def test_a_position_goes_on_with_what_was_left_of_the_epoch(done: int) -> None:
    def rest(ranks: Turns) -> bool:
        whole, first, second = (
            RankBatches(source_of(numbers(23), batch_size=3, shuffle=True), ranks, seed=2) for _ in range(3)
        )
        expected = [met(whole), met(whole)]
        iterator = iter(first)
        before = [next(iterator)[0].tolist() for _ in range(done)]
        second.load_state_dict(first.state_dict())
        return [before + met(second), met(second)] == expected

    assert on_ranks(2, rest) == [True, True]


def test_after_an_epoch_that_ended_or_was_broken_off_the_position_is_the_next_ones_beginning() -> None:
    def positions(ranks: Turns) -> list[Any]:
        batches = RankBatches(source_of(numbers(7), batch_size=1), ranks)
        said = [batches.state_dict()]
        for _ in batches:
            said.append(batches.state_dict())
        said.append(batches.state_dict())
        for _ in batches:
            break
        return [(state["epoch"], state["samples"]) for state in [*said, batches.state_dict()]]

    assert on_ranks(2, positions) == [[(0, 0), (0, 2), (0, 4), (0, 6), (0, 7), (1, 0), (2, 0)]] * 2


def test_a_position_that_no_batch_begins_at_is_refused() -> None:
    def refuse(ranks: Turns) -> None:
        with pytest.raises(ConfigError, match="cannot continue after 5 of 7 samples"):
            RankBatches(source_of(numbers(7), batch_size=1), ranks).load_state_dict({"epoch": 0, "samples": 5})

    on_ranks(2, refuse)


# -- a sampler of the user's ------------------------------------------------------------------------------------------


def test_a_samplers_order_is_cut_over_the_ranks_and_nothing_is_met_twice() -> None:
    def epoch(ranks: Turns) -> list[list[int]]:
        return met(RankBatches(source_of(numbers(20), batch_size=2, sampler=[9, 7, 5, 3, 1]), ranks))

    assert on_ranks(2, epoch) == [[[9, 7], [1]], [[5, 3], []]]


def test_ranks_without_a_sample_take_part_in_comparing_orders() -> None:
    def epoch(ranks: Turns) -> list[list[int]]:
        return met(RankBatches(source_of(numbers(20), batch_size=1, sampler=[4]), ranks))

    assert on_ranks(3, epoch) == [[[4]], [[]], [[]]]


def test_a_random_sampler_gives_all_ranks_one_order_whatever_their_random_state() -> None:
    def epoch(ranks: Turns) -> list[list[int]]:
        torch.manual_seed(ranks.topology.rank)
        sampler = WeightedRandomSampler([1.0] * 20, 12)
        return met(RankBatches(source_of(numbers(20), batch_size=3, sampler=sampler), ranks, seed=4))

    one = [index for batch in on_ranks(1, epoch)[0] for index in batch]
    left, right = on_ranks(2, epoch)
    assert [index for pair in zip(left, right, strict=True) for batch in pair for index in batch] == one


class Mine(Sampler[int]):
    """Depends on the rank, as it must not."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[int]:
        return iter(range(8) if self.rank in (0, 2) else range(7, -1, -1))


def test_ranks_whose_samplers_disagree_are_named_on_every_rank() -> None:
    def epoch(ranks: Turns) -> Any:
        return met(RankBatches(source_of(numbers(8), batch_size=1, sampler=Mine(ranks.topology.rank)), ranks))

    for error in on_ranks(4, epoch):
        with pytest.raises(ConfigError, match="a Mine, gives ranks 1, 3 another order than rank 0 in epoch 1"):
            raise error


# -- empty batches ----------------------------------------------------------------------------------------------------


class Secret:
    def __init__(self, rows: list[Any]) -> None:
        self.rows = iter(rows)


@pytest.mark.parametrize(("length", "refused"), [(5, True), (6, False), (7, False), (8, False)])
def test_only_where_an_empty_batch_is_needed_must_it_be_possible_and_then_all_ranks_say_so(
    length: int, refused: bool
) -> None:
    def epoch(ranks: Turns) -> int:
        return len(list(RankBatches(source_of(numbers(length), batch_size=2, collate=Secret), ranks)))

    for result in on_ranks(2, epoch):
        assert isinstance(result, ConfigError) is refused, result


# -- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 7, 12])
@pytest.mark.parametrize("sampler", [False, True])
def test_evaluation_meets_each_sample_once(length: int, sampler: bool) -> None:
    order = list(range(0, length, 2)) if sampler else None
    loader = DataLoader(numbers(length), batch_size=3, sampler=order, drop_last=True)

    def evaluated(ranks: Turns) -> list[int]:
        batches = list(evaluation_batches(source_of(loader), ranks, batch_size=2))
        assert all(len(batch[0]) == samples for batch, samples in batches)
        return [index for batch, _ in batches for index in batch[0].tolist()]

    assert sorted(index for found in on_ranks(3, evaluated) for index in found) == (order or list(range(length)))

"""The order of samples: the same at every world size, continued at any step, and nobody else's random state touched."""

from __future__ import annotations

import itertools
import pickle
import random

import numpy as np
import pytest
import torch

from hvdtrain.data.partition import BatchPartition
from hvdtrain.data.samplers import EvalSampler, IndexBatch, PartitionSampler, epoch_order
from hvdtrain.errors import ConfigError


def sampler(length: int = 23, batch: int = 6, world: int = 1, rank: int = 0, accumulate: int = 1) -> PartitionSampler:
    partition = BatchPartition(
        length=length, global_batch_size=batch, world_size=world, rank=rank, accumulate=accumulate
    )
    return PartitionSampler(partition, shuffle=True, seed=5)


def global_batches(world: int, epoch: int, accumulate: int = 1) -> list[list[int]]:
    """What all ranks together load for each global batch."""
    found: list[list[int]] = []
    samplers = [sampler(world=world, rank=rank, accumulate=accumulate) for rank in range(world)]
    batches = []
    for one in samplers:
        one.set_position(epoch)
        batches.append(iter(one))
    for step in range(samplers[0].partition.steps_per_epoch):
        found.append([])
        for one, mine in zip(samplers, batches, strict=True):
            for _ in one.partition.step(step).micro_batches:
                found[-1] += next(mine)
    assert all(next(mine, None) is None for mine in batches)
    return found


@pytest.mark.parametrize("length", [1, 2, 10, 1000])
def test_an_epoch_order_is_a_permutation(length: int) -> None:
    order = epoch_order(length, shuffle=True, seed=3, epoch=4)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(length))


def test_without_shuffle_the_order_is_the_data_sets() -> None:
    assert epoch_order(6, shuffle=False, seed=3, epoch=4).tolist() == [0, 1, 2, 3, 4, 5]


def test_orders_differ_by_seed_and_by_epoch_and_repeat_for_equal_ones() -> None:
    orders = [
        tuple(epoch_order(50, shuffle=True, seed=seed, epoch=epoch).tolist())
        for seed, epoch in itertools.product((0, 1, 2, 2**32, 2**63), (0, 1, 2, 3))
    ]
    assert len(set(orders)) == len(orders)
    assert tuple(epoch_order(50, shuffle=True, seed=0, epoch=0).tolist()) == orders[0]


def test_the_order_never_changes_between_versions() -> None:
    # A checkpoint of last year must continue with the samples that it has not met: these numbers are for ever.
    assert epoch_order(10, shuffle=True, seed=1, epoch=2).tolist() == [6, 3, 1, 5, 7, 2, 4, 9, 8, 0]


@pytest.mark.parametrize("arguments", [{"length": -1}, {"seed": -1}, {"seed": 2**64}, {"epoch": -1}])
def test_an_order_out_of_bounds_is_refused(arguments: dict[str, int]) -> None:
    (name,) = arguments
    with pytest.raises(ConfigError, match=f"{name} must be 0 or more"):
        epoch_order(**{"length": 4, "shuffle": True, "seed": 0, "epoch": 0, **arguments})  # type: ignore[arg-type]


def test_the_global_random_state_is_left_alone() -> None:
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    list(sampler())
    list(EvalSampler(10, batch_size=3))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize(("world", "accumulate"), [(1, 3), (2, 1), (2, 2), (3, 1), (8, 1)])
def test_the_global_batches_are_those_of_one_process(world: int, accumulate: int, epoch: int) -> None:
    assert global_batches(world, epoch, accumulate) == global_batches(1, epoch)


def test_a_position_in_an_epoch_gives_the_rest_of_its_batches() -> None:
    for world, rank, accumulate in ((1, 0, 1), (2, 1, 2), (8, 7, 1)):
        one = sampler(world=world, rank=rank, accumulate=accumulate)
        one.set_position(3)
        whole = list(one)
        for step in range(one.partition.steps_per_epoch + 1):
            one.set_position(3, min(6 * step, 23))
            done = sum(len(one.partition.step(index).micro_batches) for index in range(step))
            assert list(one) == whole[done:]
            assert len(one) == len(whole) - done


def test_an_iterator_keeps_the_position_that_it_was_made_at() -> None:
    one = sampler()
    first = list(one)
    running = iter(one)
    one.set_position(1)
    assert list(running) == first
    assert list(one) != first


def test_a_position_between_global_batches_is_refused() -> None:
    with pytest.raises(ConfigError, match="after 7 of 23 samples"):
        sampler().set_position(0, 7)


def test_keys_tell_all_batches_apart_and_do_not_depend_on_the_number_of_ranks() -> None:
    def keys(world: int, accumulate: int) -> list[tuple[int, ...]]:
        found = []
        for epoch, rank in itertools.product(range(3), range(world)):
            one = sampler(world=world, rank=rank, accumulate=accumulate)
            one.set_position(epoch)
            found += [batch.key for batch in one if isinstance(batch, IndexBatch)]
        found += [batch.key for batch in EvalSampler(23, batch_size=4) if isinstance(batch, IndexBatch)]
        return found

    assert len(set(keys(2, 1))) == len(keys(2, 1)) == 3 * 2 * 4 + 6
    assert sorted(keys(2, 1)) == sorted(keys(1, 2))


def test_a_batch_keeps_its_key_on_the_way_to_another_process() -> None:
    batch = pickle.loads(pickle.dumps(IndexBatch([3, 1], (0, 2, 6))))
    assert (batch, batch.key) == ([3, 1], (0, 2, 6))


def test_evaluation_meets_each_sample_once_in_order() -> None:
    for length, batch_size, world in itertools.product((1, 2, 3, 7, 12), (1, 2, 5, 20), (1, 2, 3, 8)):
        samplers = [EvalSampler(length, batch_size=batch_size, world_size=world, rank=rank) for rank in range(world)]
        batches = [list(one) for one in samplers]
        assert [index for mine in batches for batch in mine for index in batch] == list(range(length))
        assert [len(mine) for mine in batches] == [len(one) for one in samplers]
        assert all(1 <= len(batch) <= batch_size for mine in batches for batch in mine)


def test_evaluating_fewer_samples_than_ranks_leaves_some_ranks_nothing() -> None:
    assert list(EvalSampler(2, batch_size=4, world_size=3, rank=2)) == []


@pytest.mark.parametrize("batch_size", [0, -1])
def test_evaluating_with_a_batch_size_below_one_is_refused(batch_size: int) -> None:
    with pytest.raises(ConfigError, match=f"batch_size must be at least 1, got {batch_size}"):
        EvalSampler(4, batch_size=batch_size)

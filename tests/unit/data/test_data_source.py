"""What is read off a user's DataLoader, and what cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from hvdtrain.data.source import Source, source_of
from hvdtrain.errors import ConfigError

DATA = TensorDataset(torch.arange(10))


class Backwards(Sampler[int]):
    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[int]:
        return iter(range(9, -1, -1))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield 1


def started(worker: int) -> None:
    pass


def test_a_loader_says_everything_but_its_random_numbers() -> None:
    loader = DataLoader(
        DATA,
        batch_size=3,
        shuffle=True,
        num_workers=2,
        collate_fn=list,
        drop_last=True,
        timeout=7,
        worker_init_fn=started,
        prefetch_factor=4,
        persistent_workers=True,
        multiprocessing_context="spawn",
        generator=torch.Generator().manual_seed(3),
    )
    assert source_of(loader) == Source(
        dataset=DATA,
        batch_size=3,
        shuffle=True,
        last_batch="drop",
        collate=list,
        workers=2,
        persistent_workers=True,
        timeout_s=7,
        worker_init=started,
        prefetch_factor=4,
        multiprocessing_context=loader.multiprocessing_context,
    )


def test_a_plain_loader_leaves_the_usual() -> None:
    assert source_of(DataLoader(DATA)) == Source(dataset=DATA, batch_size=1)
    assert source_of(DATA) == Source(dataset=DATA)


@pytest.mark.parametrize(
    ("sampler", "shuffle", "own"),
    [
        (SequentialSampler(DATA), False, False),
        (RandomSampler(DATA), True, False),
        (RandomSampler(DATA, replacement=True), False, True),
        (RandomSampler(DATA, num_samples=4), False, True),
        (Backwards(), False, True),
        ([3, 1, 2], False, True),
        (DistributedSampler(DATA, num_replicas=2, rank=1), True, False),
        (DistributedSampler(DATA, num_replicas=2, rank=1, shuffle=False), False, False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_order_is_read_off_the_sampler(sampler: Any, shuffle: bool, own: bool) -> None:
    for loader in (
        DataLoader(DATA, batch_size=2, sampler=sampler),
        DataLoader(DATA, batch_sampler=BatchSampler(sampler, 2, False)),
    ):
        source = source_of(loader)
        assert (source.shuffle, source.sampler, source.batch_size) == (shuffle, sampler if own else None, 2)
        assert source.length == (len(sampler) if own else 10)


def test_what_is_said_goes_before_what_the_loader_says() -> None:
    loader = DataLoader(DATA, batch_size=3, shuffle=True, drop_last=True, collate_fn=list)
    said = source_of(
        loader, batch_size=4, shuffle=False, last_batch="merge", collate=tuple, workers=1, pin_memory=False
    )
    assert said == Source(
        dataset=DATA,
        batch_size=4,
        last_batch="merge",
        collate=tuple,
        workers=1,
        pin_memory=False,
        persistent_workers=None,
    )
    ordered = source_of(loader, sampler=[1, 2])
    assert (ordered.shuffle, ordered.sampler) == (False, [1, 2])


class Mine(DistributedSampler[Any]):
    pass


class OwnBatches(Sampler[list[int]]):
    def __iter__(self) -> Iterator[list[int]]:
        yield [1]


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        (Stream(), {"shuffle": True}, "Stream is a stream.*shuffle=True has no effect; let the stream itself"),
        (Stream(), {"sampler": [1]}, "sampler= has no effect"),
        (Stream(), {"last_batch": "merge"}, "unknown length: last_batch='merge'.*leave it out"),
        (DataLoader(Stream(), drop_last=True), {}, "unknown length: last_batch='drop' .drop_last"),
        (DataLoader(Stream(), batch_size=None), {}, "batch_size=None.*let the stream yield samples"),
        ((index for index in range(3)), {}, "a generator can be read only once.*the function that makes it"),
        (DataLoader(DATA, batch_sampler=OwnBatches()), {}, "OwnBatches of your own.*batch_size="),
        (DataLoader(DATA, batch_size=None), {}, "batch_size=None.*batch_size="),
        (DataLoader(DATA, sampler=Mine(DATA, 2, 0)), {}, "a Mine, already cuts the data into 2 parts"),
        (DATA, {"sampler": [1], "shuffle": True}, "shuffle=True and sampler= exclude"),
        (DataLoader(DATA, sampler=Backwards()), {"shuffle": True}, "shuffle=True and sampler= exclude"),
        (DATA, {"drop_last": True, "last_batch": "merge"}, "drop_last=True and last_batch='merge' exclude"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_what_to_do(data: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        source_of(data, **arguments)


class Drawn(Sampler[int]):
    """Draws from the process's generator, whatever its state."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(10).tolist())


class Told(Sampler[int]):
    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter([self.epoch] * 3)


def weighted(seed: int | None) -> WeightedRandomSampler:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return WeightedRandomSampler([1.0] * 10, 40, generator=generator)


@pytest.mark.parametrize(
    "make", [Drawn, lambda: weighted(None), lambda: weighted(3), lambda: SubsetRandomSampler(range(3, 10))]
)
def test_an_epochs_order_depends_on_seed_and_epoch_alone(make: Any) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = Source(dataset=DATA, sampler=make()), Source(dataset=DATA, sampler=make())
    orders = [first.order(epoch, seed=5) for epoch in range(3)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)  # another rank, or the same after a resume
    assert second.order(2, seed=5) == orders[2]
    assert len({tuple(order) for order in [*orders, first.order(0, seed=6)]}) == 4


def test_a_samplers_own_generator_counts_and_is_left_as_it_was() -> None:
    one, other = weighted(3), weighted(4)
    state = one.generator.get_state()  # type: ignore[union-attr]
    assert Source(dataset=DATA, sampler=one).order(0, seed=0) != Source(dataset=DATA, sampler=other).order(0, seed=0)
    assert torch.equal(one.generator.get_state(), state)  # type: ignore[union-attr]


def test_a_sampler_that_wants_to_know_the_epoch_is_told() -> None:
    assert Source(dataset=DATA, sampler=Told()).order(4, seed=0) == [4, 4, 4]


def test_a_sampler_without_a_length_and_with_tensors_or_names_for_indices_will_do() -> None:
    source = Source(dataset=DATA, sampler=map_of(torch.arange(3)))
    assert (source.length, source.order(0, seed=0)) == (3, [0, 1, 2])
    assert Source(dataset={"a": 1}, sampler=["a"]).order(0, seed=0) == ["a"]


class map_of(Sampler[Any]):
    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)


class Liar(Backwards):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


@pytest.mark.parametrize(
    ("sampler", "message"), [(Liar(), "gave 4 indices for epoch 2.*length is 10"), ([], "gave 0 indices")]
)
def test_a_sampler_that_gives_another_number_than_it_says_is_refused(sampler: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Source(dataset=DATA, sampler=sampler).order(1, seed=0)


def test_a_data_set_needs_no_base_class() -> None:
    assert source_of([1, 2, 3]).length == 3
    assert not isinstance([1, 2, 3], Dataset)

"""Ranks that were given different data are named, and no others; ranks are threads of this process."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from turns import Turns, on_ranks

from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.data.same_data import check_same_data
from hvdtrain.data.source import source_of
from hvdtrain.errors import ConfigError

X = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 10
WHOLE = TensorDataset(X, Y)


class Made(Dataset[Any]):
    """A data set of the user's: ``make`` gets the index."""

    def __init__(self, make: Callable[[int], Any], length: int = 20) -> None:
        self.make, self.length, self.loads = make, length, 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        self.loads += 1
        return self.make(index)


def compared(data: Callable[[int], Any], world: int = 3, **arguments: Any) -> list[Any]:
    """What each rank hears that is given ``data(rank)``."""
    return on_ranks(
        world,
        lambda ranks: check_same_data(source_of(data(ranks.topology.rank), **arguments), ranks, name="train_data"),
    )


class OwnGenerator:
    """Augmentation that draws from a generator of its own, now and then or always."""

    def __init__(self, rank: int, chance: float) -> None:
        self.rng, self.chance = np.random.default_rng(rank), chance

    def __call__(self, index: int) -> Any:
        return torch.full((4,), float(index) + (self.rng.random() < self.chance))


class Seldom:
    """Augmentation that comes out the same for the first samples, and for the next."""

    def __init__(self, rank: int) -> None:
        self.rank, self.calls = rank, 0

    def __call__(self, index: int) -> Any:
        self.calls += 1
        return torch.full((4,), float(index) + (self.rank == 1 and self.calls in (1, 4)))


def noisy(index: int) -> Any:
    return torch.rand(random.randint(2, 9)), np.random.rand(3), index


ALIKE: dict[str, Callable[[int], Any]] = {
    "one object": lambda rank: WHOLE,
    "equal tensors": lambda rank: ArrayDataset(X.clone(), Y.clone()),
    "last bits": lambda rank: TensorDataset(X * (1 + 1e-7 * rank), Y),
    "not a number": lambda rank: Made(lambda i: [float("nan"), torch.tensor([1.0, float("inf"), float(i)])]),
    "augmented": lambda rank: Made(noisy),
    "augmented by itself": lambda rank: Made(OwnGenerator(rank, 0.5)),
    "augmented by itself now and then": lambda rank: Made(OwnGenerator(rank, 0.95)),
    "augmented by itself seldom": lambda rank: Made(Seldom(rank)),
    "paths": lambda rank: Made(lambda i: {"path": f"/mnt/host{rank}/images/{i}.jpeg", "label": i}),
    "objects": lambda rank: Made(lambda i: object()),
    "empty": lambda rank: [],
    "ragged": lambda rank: Made(lambda i: [torch.arange(i), ["a"] * i, b"bytes", None, {"k": 1 + 2j}]),
    "sparse": lambda rank: Made(lambda i: (torch.eye(3) * i).to_sparse()),
    "complex": lambda rank: Made(lambda i: torch.ones(2, dtype=torch.complex64).conj() * i),
    "text arrays": lambda rank: Made(lambda i: np.array(["a", "b"])),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_the_same_data_passes_on_all_ranks(kind: str) -> None:
    torch.manual_seed(1)
    assert compared(ALIKE[kind]) == [None] * 3


DIFFERENT: dict[str, Callable[[int], Any]] = {
    "contiguous parts": lambda rank: Subset(WHOLE, range(20 * rank, 20 * rank + 20)),
    "every second": lambda rank: Subset(WHOLE, range(rank, 40, 2)),
    "tensors": lambda rank: TensorDataset(X[rank::2], Y[rank::2]),
    "arrays": lambda rank: ArrayDataset(X[rank::2]),
    "numbers": lambda rank: list(range(rank, 40, 2)),
    "texts": lambda rank: [f"{rank}-{index}" for index in range(20)],
    "dictionaries": lambda rank: Made(lambda i: {"ids": np.arange(5) + 20 * rank + i}),
    "other shapes": lambda rank: Made(lambda i: torch.zeros(4 + rank)),
    "other dtypes": lambda rank: Made(lambda i: torch.zeros(4, dtype=[torch.float32, torch.float64][rank])),
    "other structures": lambda rank: Made(lambda i: [torch.zeros(4)] * (1 + rank)),
    "pixels": lambda rank: Made(lambda i: (X[i + 20 * rank] * 40 + 128).clamp(0, 255).byte()),
    "augmented parts": lambda rank: Made(lambda i: X[i + 20 * rank] + torch.rand(3, 8, 8)),
    "the last one": lambda rank: ConcatDataset([Subset(WHOLE, range(19)), Subset(WHOLE, [30 + rank])]),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_other_data_of_the_same_length_is_refused_on_all_ranks_with_the_two_ways_out(kind: str) -> None:
    for error in compared(DIFFERENT[kind], 2):
        with pytest.raises(
            ConfigError,
            match=r"train_data differs.*rank 1 has other data than rank 0, sample \d+ is not the same.*same whole data set.*"
            r"replica\.backward\(loss, samples=len\(batch\)\)",
        ):
            raise error


def test_other_lengths_are_told_before_anything_is_loaded() -> None:
    data = [Made(lambda i: i, 20 + (rank > 0)) for rank in range(3)]
    for error in compared(lambda rank: data[rank]):
        with pytest.raises(
            ConfigError, match="ranks 1, 2 have other data than rank 0, 20 samples on rank 0 and 21 on rank 1"
        ):
            raise error
    assert [one.loads for one in data] == [0, 0, 0]


def test_three_samples_are_loaded_and_no_random_number_is_drawn() -> None:
    data = Made(noisy)
    torch.manual_seed(1)
    state = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    assert compared(lambda rank: data, 2) == [None, None]
    assert data.loads == 6
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), str(np.random.get_state())) == state[1:]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_loader_processes_see_the_same() -> None:
    assert compared(lambda rank: Made(noisy), 2, workers=1) == [None, None]
    for error in compared(lambda rank: Subset(WHOLE, range(rank, 40, 2)), 2, workers=1):
        with pytest.raises(ConfigError, match="train_data differs"):
            raise error


def test_another_order_is_told_as_such() -> None:
    orders = [[1, 2, 3], [3, 2, 1]]
    found = on_ranks(2, lambda ranks: check_same_data(source_of(WHOLE, sampler=orders[ranks.topology.rank]), ranks))
    for error in found:
        with pytest.raises(ConfigError, match="the sampler, a list, gives rank 1 another order"):
            raise error


def test_one_rank_compares_nothing() -> None:
    data = Made(noisy)

    def alone(ranks: Turns) -> int:
        check_same_data(source_of(data), ranks)
        return ranks.gathered + data.loads

    assert on_ranks(1, alone) == [0]

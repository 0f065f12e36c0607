"""Loaders against a data set that really is random, in processes that really are forked."""

from __future__ import annotations

import os
import pickle
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.data.loader import _SeededBatches, empty_batch, look_at_samples, make_loader
from hvdtrain.data.nested import to_device
from hvdtrain.data.partition import BatchPartition
from hvdtrain.data.samplers import EvalSampler, PartitionSampler
from hvdtrain.data.shared_memory import check_shared_memory
from hvdtrain.errors import ConfigError

# torch warns where there are fewer cores than loader processes; which process loads what is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Noisy(Dataset[Tensor]):
    """Each sample: its index, and a random number from torch, from `random` and from NumPy."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> Tensor:
        drawn = [float(torch.rand(())), random.random(), float(np.random.rand())]
        return torch.tensor([index, *drawn], dtype=torch.float64)


class Slow(Noisy):
    def __getitem__(self, index: int) -> Tensor:
        time.sleep(0.2)
        return super().__getitem__(index)


def sampler(world: int = 1, rank: int = 0, accumulate: int = 1, start: int = 0, epoch: int = 0) -> PartitionSampler:
    partition = BatchPartition(length=23, global_batch_size=6, world_size=world, rank=rank, accumulate=accumulate)
    one = PartitionSampler(partition, shuffle=True, seed=5)
    one.set_position(epoch, start)
    return one


def loaded(batches: PartitionSampler, workers: int, seed: int = 5, dataset: Dataset[Any] | None = None) -> list[Any]:
    loader = make_loader(dataset or Noisy(), batches, workers=workers, seed=seed, timeout_s=60)
    return [batch.tolist() for batch in loader]


def test_batches_hold_the_samplers_indices_in_its_order() -> None:
    for workers in (0, 2):
        found = [[int(sample[0]) for sample in batch] for batch in loaded(sampler(), workers)]
        assert found == list(sampler())


def test_augmentation_in_loader_processes_does_not_depend_on_their_number() -> None:
    one = loaded(sampler(), 1)
    assert one == loaded(sampler(), 2) == loaded(sampler(), 3)
    numbers = [number for batch in one for sample in batch for number in sample[1:]]
    assert len(set(numbers)) == len(numbers) == 3 * 23


def test_augmentation_goes_on_where_an_interrupted_epoch_was() -> None:
    assert loaded(sampler(start=12), 2) == loaded(sampler(), 1)[2:]


def test_augmentation_differs_by_seed_and_by_epoch() -> None:
    runs = [loaded(sampler(), 1), loaded(sampler(), 1, seed=6), loaded(sampler(epoch=1), 1)]
    drawn = [{sample[1] for batch in run for sample in batch} for run in runs]
    assert not drawn[0] & drawn[1]
    assert not drawn[0] & drawn[2]


def test_augmentation_is_the_same_on_two_ranks_and_in_two_micro_batches() -> None:
    ranks = [loaded(sampler(world=2, rank=rank), 1) for rank in range(2)]
    assert [batch for pair in zip(*ranks, strict=True) for batch in pair] == loaded(sampler(accumulate=2), 1)


def test_evaluation_in_loader_processes_repeats_itself() -> None:
    def evaluated(workers: int) -> list[Any]:
        return [batch.tolist() for batch in make_loader(Noisy(), EvalSampler(23, batch_size=4), workers=workers)]

    assert evaluated(1) == evaluated(2)


def test_one_loader_serves_epoch_after_epoch_with_the_same_processes() -> None:
    batches = sampler()
    loader = make_loader(Noisy(), batches, workers=2, seed=5, timeout_s=60)
    first = [batch.tolist() for batch in loader]
    processes = {worker.pid for worker in loader._iterator._workers}  # type: ignore[union-attr]
    batches.set_position(1)
    next(iter(loader))  # an epoch that is given up
    batches.set_position(0, 6)
    assert [batch.tolist() for batch in loader] == first[1:]
    assert {worker.pid for worker in loader._iterator._workers} == processes  # type: ignore[union-attr]


def test_without_loader_processes_augmentation_draws_from_this_processs_random_state() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    expected = torch.rand(23).tolist()
    torch.set_rng_state(state)
    found = [sample[1] for batch in loaded(sampler(), 0) for sample in batch]
    assert found == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_making_and_iterating_a_loader_leaves_the_global_random_state_alone(workers: int) -> None:
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    loader = make_loader(ArrayDataset(torch.arange(23)), sampler(), workers=workers, seed=1, timeout_s=60)
    for _ in range(2):
        list(loader)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]


def test_a_data_set_that_loads_several_samples_at_once_still_may() -> None:
    class Bulk(Noisy):
        def __getitem__(self, index: int) -> Tensor:
            raise AssertionError("one by one")

        def __getitems__(self, indices: list[int]) -> list[Tensor]:
            return [torch.tensor([index]) for index in indices]

    for workers in (0, 1):
        assert [batch[:, 0].tolist() for batch in make_loader(Bulk(), sampler(), workers=workers)] == list(sampler())


def test_a_loader_process_that_hangs_is_given_up_after_the_timeout() -> None:
    loader = make_loader(Slow(), sampler(), workers=1, timeout_s=0.5)
    with pytest.raises(RuntimeError, match=r"timed out after 0\.5 seconds"):
        next(iter(loader))


def test_what_loader_processes_get_can_be_pickled() -> None:
    wrapped = pickle.loads(pickle.dumps(_SeededBatches(Noisy(), 3)))
    assert len(wrapped) == 23


def test_a_collate_function_gets_the_samples() -> None:
    arrays = ArrayDataset(torch.arange(23), torch.arange(23) * 2)
    for workers in (0, 1):
        loader = make_loader(arrays, sampler(), workers=workers, collate=lambda samples: [int(y) for _, y in samples])
        assert list(loader) == [[2 * index for index in batch] for batch in sampler()]


@pytest.mark.parametrize("workers", [0, 1])
def test_arrays_are_loaded_as_whole_batches(workers: int) -> None:
    images, labels = torch.rand(23, 1, 8, 8), torch.arange(23)
    for indices, (x, y) in zip(
        sampler(), make_loader(ArrayDataset(images, labels), sampler(), workers=workers), strict=True
    ):
        assert torch.equal(x, images[indices])
        assert torch.equal(y, labels[indices])


def test_arrays_behave_as_a_data_set_of_samples_elsewhere() -> None:
    arrays = ArrayDataset(torch.arange(23) * 10, torch.arange(23))
    assert len(arrays) == 23
    assert arrays[3] == (torch.tensor(30), torch.tensor(3))
    subset = Subset(arrays, list(range(22, -1, -1)))
    for indices, (x, y) in zip(sampler(), make_loader(subset, sampler()), strict=True):
        assert y.tolist() == [22 - index for index in indices]
        assert torch.equal(x, y * 10)


def test_a_batch_of_arrays_shares_no_memory_with_them() -> None:
    arrays = ArrayDataset(torch.zeros(4, 2))
    (batch,) = arrays.batch([0, 1])
    batch += 1
    assert arrays.tensors[0].sum() == 0


def test_a_subclass_of_arrays_that_changes_its_samples_is_asked_for_them() -> None:
    class Augmented(ArrayDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            return tuple(tensor + 100 for tensor in super().__getitem__(index))

    (first, *_) = make_loader(Augmented(torch.arange(23)), sampler())
    assert first[0].tolist() == [index + 100 for index in next(iter(sampler()))]


@pytest.mark.parametrize(
    "tensors", [(), (torch.zeros(()),), (torch.zeros(3), torch.zeros(4)), (torch.zeros(3), torch.zeros(()))]
)
def test_arrays_that_do_not_belong_together_are_refused(tensors: tuple[Tensor, ...]) -> None:
    with pytest.raises(ConfigError, match="equal length along their first dimension"):
        ArrayDataset(*tensors)


@pytest.mark.parametrize("workers", [0, 1])
def test_looking_at_samples_sees_the_same_each_time_and_changes_no_random_number(workers: int) -> None:
    def drawn() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())

    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    expected = drawn()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    first, *others = look_at_samples(Noisy(), [3, 22, 3], lambda samples: samples[0].tolist(), workers=workers)
    assert drawn() == expected
    assert (first[0], others[0][0]) == (3, 22)
    assert others[1] == first
    assert first == look_at_samples(Noisy(), [3], lambda samples: samples[0].tolist(), workers=1 - workers)[0]


class Opened(Noisy):
    """Opens something when it is first read, as a data set over a file does."""

    def __init__(self) -> None:
        self.opened_in = 0

    def __getitem__(self, index: int) -> Tensor:
        self.opened_in = os.getpid()
        return super().__getitem__(index)


def test_what_a_data_set_opens_is_opened_in_loader_processes_where_there_are_any() -> None:
    dataset = Opened()
    look_at_samples(dataset, [0], len, workers=1)
    empty_batch(dataset, workers=1)
    look_at_samples(dataset, [0], len, workers=1, multiprocessing_context="spawn")  # a copy is read
    check_shared_memory(dataset, batch_size=1, workers=1, ranks=1)
    assert dataset.opened_in == 0
    empty_batch(dataset)
    assert dataset.opened_in == os.getpid()


def ragged(samples: list[Tensor]) -> dict[str, Any]:
    number = int(torch.randint(1, 10**6, ()))
    names = [sample.pop() for sample in ([float(s[0]), "name"] for s in samples)]
    return {"x": torch.stack(samples), "names": names, "number": float(number)} | {
        "draws": [torch.zeros(number), torch.zeros(10**6 - number)]
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_the_empty_batch_is_collated_as_any_other_and_no_random_number_is_drawn(workers: int) -> None:
    state = torch.get_rng_state()
    empty = empty_batch(Noisy(), collate=ragged, workers=workers)
    assert torch.equal(torch.get_rng_state(), state)
    assert empty["x"].shape == (0, 4)
    assert empty["names"] == []
    assert [len(one) for one in empty["draws"]] == [
        empty["number"],
        10**6 - empty["number"],
    ]  # drawn alike for the batches that are compared


def test_the_empty_batch_of_arrays_is_one_of_arrays() -> None:
    empty = empty_batch(ArrayDataset(torch.rand(5, 2), torch.arange(5)))
    assert type(empty) is tuple
    assert [tuple(tensor.shape) for tensor in empty] == [(0, 2), (0,)]


def test_a_collate_function_may_take_its_samples_apart() -> None:
    rows = [{"x": torch.ones(2), "label": 1}]
    empty = empty_batch(rows, collate=lambda samples: [torch.tensor([one.pop("label") for one in samples])])  # type: ignore[arg-type]
    assert empty[0].shape == (0,)
    assert rows == [{"x": rows[0]["x"], "label": 1}]


def test_a_data_set_that_makes_whole_batches_shows_its_empty_one() -> None:
    class Whole(Noisy):
        def __getitems__(self, indices: list[int]) -> dict[str, Any]:
            return {"x": torch.tensor(indices), "names": [str(index) for index in indices]}

    empty = empty_batch(Whole(), collate=lambda batch: batch)
    assert (empty["x"].tolist(), empty["names"]) == ([], [])


def test_a_worker_is_told_what_the_user_wants_and_still_outlives_sigterm() -> None:
    def told(worker: int) -> None:
        os.environ["TOLD"] = str(worker)

    class Asks(Noisy):
        def __getitem__(self, index: int) -> Any:
            handler = signal.getsignal(signal.SIGTERM)
            return [os.environ.get("TOLD", ""), type(getattr(handler, "__self__", None)).__name__]

    loader = make_loader(Asks(), sampler(), workers=1, worker_init=told, collate=list)
    assert next(iter(loader))[0] == ["0", "OutliveSigterm"]
    assert "TOLD" not in os.environ


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield 1


@pytest.mark.parametrize(
    ("dataset", "arguments", "message"),
    [
        (Noisy(), {"workers": -1}, "workers must be 0 or more, got -1"),
        (Noisy(), {"timeout_s": -2}, "timeout_s must be 0 or more, got -2"),
        (Stream(), {}, "a Stream is no data set: it needs __len__"),
        (object(), {}, "a object is no data set"),
    ],
)
def test_what_cannot_work_is_refused(dataset: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_loader(dataset, sampler(), **arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_batches_arrive_on_a_gpu_from_pinned_memory() -> None:
    loader = make_loader(ArrayDataset(torch.arange(23)), sampler(), pin_memory=True)
    for indices, batch in zip(sampler(), loader, strict=True):
        assert batch[0].is_pinned()
        assert to_device(batch, "cuda", non_blocking=True)[0].tolist() == indices

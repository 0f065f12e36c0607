"""A data set that is cut once: who reads what, in which step, in which order."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from turns import Turns, on_ranks

from hvdtrain.data.partition import LAST_BATCH, BatchPartition, SamplePartition, share, taken
from hvdtrain.data.rank_batches import RankBatches, evaluation_batches
from hvdtrain.data.same_data import check_same_data
from hvdtrain.data.shards import PARTITIONS, own_shard, shard_of
from hvdtrain.data.source import source_of
from hvdtrain.errors import ConfigError

CUT_ONCE = [kind for kind in PARTITIONS if kind not in ("batch", "sample-own")]


class Files(Dataset[Any]):
    """Remembers what was read."""

    def __init__(self, length: int, there: int | None = None) -> None:
        self.length, self.there = length, length if there is None else there
        self.read: set[int] = set()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        if index >= self.there:
            raise IndexError(f"no sample {index}")
        self.read.add(index)
        return torch.tensor(index)


@settings(max_examples=150, deadline=None)
@given(
    nodes=st.lists(st.sampled_from("abc"), min_size=1, max_size=6),
    length=st.integers(1, 40),
    global_batch_size=st.integers(1, 12),
    accumulate=st.integers(1, 3),
    kind=st.sampled_from(CUT_ONCE),
    last_batch=st.sampled_from(LAST_BATCH),
    shuffle=st.booleans(),
)
def test_every_sample_is_met_once_by_a_rank_that_keeps_it_in_global_batches_of_the_usual_sizes(
    nodes: list[str],
    length: int,
    global_batch_size: int,
    accumulate: int,
    kind: str,
    last_batch: str,
    shuffle: bool,
) -> None:
    if last_batch == "drop" and length < global_batch_size:
        return
    cut: dict[str, Any] = {
        "length": length,
        "global_batch_size": global_batch_size,
        "world_size": len(nodes),
        "accumulate": accumulate,
        "last_batch": last_batch,
    }
    usual = BatchPartition(**cut)
    met: list[list[int]] = [[] for _ in range(usual.steps_per_epoch)]
    sizes: list[list[list[int]]] = [[] for _ in met]
    for rank in range(len(nodes)):
        shard = shard_of(kind, length, rank, nodes)
        partition = SamplePartition(rank=shard.place, **cut)
        order = shard.order(shuffle=shuffle, seed=1, epoch=2)
        assert partition.steps_per_epoch == usual.steps_per_epoch
        steps = list(partition.steps())
        for first in range(len(steps) + 1):
            assert partition.micro_batches(first) == sum(len(step.micro_batches) for step in steps[first:])
        for index, step in enumerate(steps):
            assert (step.start, step.samples) == (usual.step(index).start, usual.step(index).samples)
            mine = [order[positions.start : positions.stop] for positions in step.micro_batches]
            assert {i for part in mine for i in part} <= set(shard.kept)
            sizes[index].append([len(part) for part in mine])
            met[index] += [i for part in mine for i in part]
            assert (step.every_rank, step.passes) == (usual.step(index).every_rank, usual.step(index).passes)
    for index, step in enumerate(usual.steps()):
        shares = [sum(parts) for parts in sizes[index]]
        assert len(met[index]) == step.samples
        assert max(shares) - min(shares) <= 1
        assert step.every_rank == (min(shares) > 0)
        assert step.passes == max(map(len, sizes[index]))
    flat = [i for step in met for i in step]
    assert len(set(flat)) == len(flat) == usual.samples_per_epoch
    kept = {
        nodes[rank] if kind == "sample-node" else rank: shard_of(kind, length, rank, nodes).kept
        for rank in range(len(nodes))
    }
    assert sorted(i for part in kept.values() for i in part) == list(range(length))


def test_a_node_keeps_as_much_as_it_has_ranks_and_its_ranks_take_turns() -> None:
    nodes = ["b", "a", "b", "b"]  # ranks need not fill node by node
    shards = [shard_of("sample-node", 40, rank, nodes) for rank in range(4)]
    assert [shard.kept for shard in shards] == [range(30), range(30, 40), range(30), range(30)]
    assert {shard.cut for shard in shards} == {"sample-node over 3+1 ranks"}
    orders = [shards[0].order(shuffle=True, seed=0, epoch=epoch)[0:10] for epoch in range(2)]
    assert sorted(orders[0]) != sorted(orders[1])


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any),
    global_batch_size=st.integers(1, 15),
    accumulate=st.integers(1, 3),
    last_batch=st.sampled_from(LAST_BATCH),
)
def test_parts_of_any_size_are_used_up_at_the_same_pace(
    sizes: list[int], global_batch_size: int, accumulate: int, last_batch: str
) -> None:
    cut: dict[str, Any] = {
        "length": sum(sizes),
        "global_batch_size": global_batch_size,
        "world_size": len(sizes),
        "accumulate": accumulate,
        "last_batch": last_batch,
    }
    if last_batch == "drop" and sum(sizes) < global_batch_size:
        return
    usual = BatchPartition(**cut)
    parts = [SamplePartition(rank=rank, sizes=tuple(sizes), **cut) for rank in range(len(sizes))]
    shards = [own_shard(rank, sizes) for rank in range(len(sizes))]
    met: list[list[int]] = [[] for _ in sizes]
    steps = zip(usual.steps(), *(part.steps() for part in parts), strict=True)
    for step, *mine in steps:
        given = [sum(map(len, one.micro_batches)) for one in mine]
        assert sum(given) == step.samples
        assert {(one.start, one.samples) for one in mine} == {(step.start, step.samples)}
        assert {one.every_rank for one in mine} == {min(given) > 0}
        assert {one.passes for one in mine} == {max(len(one.micro_batches) for one in mine)}
        for rank, one in enumerate(mine):
            order = shards[rank].order(shuffle=True, seed=0, epoch=1)
            met[rank] += [i for positions in one.micro_batches for i in order[positions.start : positions.stop]]
            pace = sizes[rank] * (step.start + step.samples) / sum(sizes)
            assert abs(len(met[rank]) - pace) <= max(1, len(sizes) / 2)
    assert all(len(set(indices)) == len(indices) for indices in met)
    assert sum(map(len, met)) == usual.samples_per_epoch
    if last_batch != "drop":
        assert [sorted(indices) for indices in met] == [list(range(size)) for size in sizes]
    every = [[len(step.micro_batches) for step in part.steps()] for part in parts]
    assert parts[0].needs_empty_batches == any(len(set(passes)) > 1 for passes in zip(*every, strict=True))
    assert parts[0].every_rank == all(min(passes) > 0 for passes in zip(*every, strict=True))


def test_shares_that_differ_by_one_are_what_the_general_rule_gives() -> None:
    for length, world in itertools.product(range(1, 25), range(1, 6)):
        sizes = tuple(len(share(length, world, rank)) for rank in range(world))
        for done in range(length + 1):
            assert taken(sizes, done) == tuple(len(share(done, world, rank)) for rank in range(world))


@pytest.mark.parametrize("sizes", [(5, 11, 2), (0, 4, 1)])
def test_data_sets_of_their_own_are_trained_and_evaluated_on_each_sample_once(sizes: tuple[int, ...]) -> None:
    def work(ranks: Turns) -> list[Any]:
        data = Files(sizes[ranks.topology.rank])
        source = source_of(data, batch_size=2, shuffle=True, partition="sample-own")
        check_same_data(source, ranks)
        batches = RankBatches(source, ranks)
        steps = [(step.samples, [i for batch, _ in step for i in batch.tolist()]) for step in batches.steps(0)]
        evaluated = [i for batch, _ in evaluation_batches(source, ranks, batch_size=2) for i in batch.tolist()]
        return [batches.cut, [samples for samples, _ in steps], [i for _, mine in steps for i in mine], evaluated]

    found = on_ranks(3, work)
    for (cut, steps, trained, evaluated), size in zip(found, sizes, strict=True):
        assert cut == f"sample-own of {'+'.join(map(str, sizes))} samples"
        assert steps == found[0][1]
        assert sorted(trained) == evaluated == list(range(size))
    assert sum(found[0][1]) == sum(sizes)


def test_an_own_data_set_without_samples_needs_no_batch_and_can_make_none() -> None:
    def iterate(ranks: Turns) -> Any:
        return list(RankBatches(source_of(Files(ranks.topology.rank * 4), batch_size=2, partition="sample-own"), ranks))

    for error in on_ranks(2, iterate):
        assert isinstance(error, ConfigError)
        assert "4 samples for 2 ranks, and with partition='sample-own' some rank has none of its own" in str(error)


def test_shards_of_one_length_are_shuffled_each_for_itself() -> None:
    first, second = (shard_of("sample", 40, rank, range(2)).order(shuffle=True, seed=0, epoch=0) for rank in range(2))
    assert first[0:20] != [index - 20 for index in second[20:40]]


@pytest.mark.parametrize("kind", CUT_ONCE)
@pytest.mark.parametrize("shuffle", [False, True])
def test_no_rank_reads_what_it_does_not_keep_in_training_evaluation_or_comparison(kind: str, shuffle: bool) -> None:
    def reads(ranks: Turns) -> tuple[list[int], list[list[int]], list[list[int]]]:
        data = Files(11)
        source = source_of(DataLoader(data, batch_size=2, shuffle=shuffle), partition=kind)
        check_same_data(source, ranks)
        batches = RankBatches(source, ranks)
        trained = [batch.tolist() for _ in range(2) for batch in batches]
        evaluated = [batch.tolist() for batch, _ in evaluation_batches(source, ranks, batch_size=2)]
        return sorted(data.read), trained, evaluated

    found = on_ranks(3, reads)
    assert sorted(i for _, _, batches in found for batch in batches for i in batch) == list(range(11))
    assert sorted(i for _, batches, _ in found for batch in batches for i in batch) == sorted([*range(11)] * 2)
    assert len({len(batches) for _, batches, _ in found}) == 1
    if kind != "sample-node":  # these ranks share one node
        assert [len(read) for read, _, _ in found] == [4, 4, 3]


@pytest.mark.parametrize("kind", CUT_ONCE)
def test_a_rank_without_any_sample_takes_part_in_training_and_evaluation(kind: str) -> None:
    def work(ranks: Turns) -> list[Any]:
        source = source_of(Files(2), partition=kind)
        check_same_data(source, ranks)
        batches = RankBatches(source, ranks, global_batch_size=4, equal_passes=True)
        evaluated = list(evaluation_batches(source, ranks, batch_size=2))
        return [[step.samples for step in batches.steps(0)], len(evaluated)]

    assert on_ranks(3, work) == [[[2], 1], [[2], 1], [[2], 0]]

    def needs_an_empty_batch(ranks: Turns) -> Any:
        return list(RankBatches(source_of(Files(2), batch_size=1, partition=kind), ranks))

    for error in on_ranks(3, needs_an_empty_batch):
        assert isinstance(error, ConfigError)
        assert "2 samples for 3 ranks, and with" in str(error)


def test_a_position_goes_on_where_it_was_and_only_with_the_same_cut() -> None:
    def batches(ranks: Turns, kind: str) -> RankBatches:
        return RankBatches(source_of(Files(23), batch_size=2, shuffle=True, partition=kind), ranks, seed=2)

    def rest(ranks: Turns) -> dict[str, Any]:
        whole, first, second = (batches(ranks, "sample") for _ in range(3))
        expected = [x.tolist() for _ in range(2) for x in whole]
        iterator = iter(first)
        before = [next(iterator).tolist() for _ in range(2)]
        state = first.state_dict()
        second.load_state_dict(state)
        assert before + [x.tolist() for _ in range(2) for x in second] == expected
        return state

    (state, *_) = on_ranks(2, rest)
    assert state == {"epoch": 0, "samples": 8, "cut": "sample over 2 ranks"}
    for world, kind in ((2, "sample-strided"), (2, "batch"), (4, "sample")):
        for error in on_ranks(world, lambda ranks, kind=kind: batches(ranks, kind).load_state_dict(state)):  # type: ignore[misc]
            assert isinstance(error, ConfigError)
            assert "was 'sample over 2 ranks' and is" in str(error)
    for error in on_ranks(3, lambda ranks: batches(ranks, "sample").load_state_dict({**state, "samples": 0})):
        assert error is None


def test_a_sampler_and_a_partition_that_there_is_not_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"and a sampler \(a list\) exclude each other"):
        source_of(Files(4), sampler=[0, 1], partition="sample")
    with pytest.raises(
        ConfigError, match="partition must be one of batch, sample, sample-strided, sample-node, sample-own, got 'node'"
    ):
        source_of(Files(4), partition="node")


@pytest.mark.parametrize("kind", CUT_ONCE)
def test_a_part_for_each_rank_is_refused_where_it_shows_without_reading_the_others(kind: str) -> None:
    whole = torch.arange(12)

    def check(ranks: Turns) -> None:
        mine = range(ranks.topology.rank, 12, 3)
        for data in (Subset(Files(12), mine), TensorDataset(whole[mine.start :: 3]), whole[mine.start :: 3].tolist()):
            with pytest.raises(ConfigError, match=r"train_data differs between the ranks: ranks 1, 2.*same whole data"):
                check_same_data(source_of(data, partition=kind), ranks)
        check_same_data(source_of(Subset(Files(12), range(9)), partition=kind), ranks)
        check_same_data(source_of(TensorDataset(whole), partition=kind), ranks)

    assert on_ranks(3, check) == [None] * 3


# -- data whose length lies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARTITIONS)
def test_samples_that_are_promised_and_missing_are_named_on_every_rank(kind: str) -> None:
    found = on_ranks(3, lambda ranks: check_same_data(source_of(Files(9, there=8), partition=kind), ranks))
    for error in found:
        assert isinstance(error, ConfigError)
        assert "no sample 8), and its length says 9 samples" in str(error)
    assert len(set(map(str, found))) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_is_missing_in_the_middle_is_explained_where_it_is_read(workers: int) -> None:
    def train(ranks: Turns) -> Any:
        source = source_of(Files(9, there=5), batch_size=2, workers=workers)
        return [list(step) for step in RankBatches(source, ranks).steps(0)]

    def evaluate(ranks: Turns) -> Any:
        return list(evaluation_batches(source_of(Files(9, there=5)), ranks, batch_size=2))

    for body in (train, evaluate):
        (error,) = on_ranks(1, body)
        assert isinstance(error, ConfigError)
        assert "no sample 5), and its length says 9 samples. If it has fewer" in str(error)

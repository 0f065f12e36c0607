"""How streams are split over ranks and loader processes, and met once by all of them together."""

from __future__ import annotations

import gc
import itertools
import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils import worker as torch_worker

from hvdtrain.backends.ahead import Ahead
from hvdtrain.data.loader import stream_loader
from hvdtrain.data.portions import Cut, End, Opening, Portion, PortionReader, Start
from hvdtrain.data.rank_stream import RankStream, evaluation_of
from hvdtrain.data.source import Source
from hvdtrain.data.streams import STRIDE, is_stream, part_of, way_of
from hvdtrain.errors import ConfigError
from hvdtrain.testing.threads import run_ranks
from hvdtrain.topology import Topology


class Whole(IterableDataset[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Any:
        return iter(range(self.length))


class Files:
    """Files that it shares out itself."""

    def __init__(self, lengths: list[int], files: Any = None) -> None:
        self.lengths = lengths
        self.files = range(len(lengths)) if files is None else files

    def shard(self, num_shards: int, index: int) -> Files:
        return type(self)(self.lengths, self.files[index::num_shards])

    def __iter__(self) -> Any:
        for file in self.files:
            start = sum(self.lengths[:file])
            yield from range(start, start + self.lengths[file])


class Rank:
    """What a backend is to a stream, over ranks that are threads."""

    device = torch.device("cpu")
    timeout_s = 0.0

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator
        size, rank = communicator.world_size, communicator.rank
        self.topology = Topology(
            rank=rank,
            world_size=size,
            local_rank=rank,
            local_world_size=size,
            node_rank=0,
            num_nodes=1,
            launcher="test",
        )

    def ahead(self, number: int) -> Ahead:
        return Ahead(number, self._communicator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._communicator, name)


layouts = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(0, 9), min_size=1, max_size=6),
        "whole": st.booleans(),
        "ranks": st.integers(1, 4),
        "workers": st.integers(0, 3),
        "batch": st.integers(1, 3),
        "accumulate": st.integers(1, 3),
        "stop": st.integers(1, 6),
    }
)


def stream_of(layout: dict[str, Any]) -> Any:
    return Whole(sum(layout["lengths"])) if layout["whole"] else Files(layout["lengths"])


def portions(stream: Any, cut: Cut, start: Start | None = None) -> list[Portion]:
    """What a DataLoader would hand out: its processes' portions in turn."""
    reader = PortionReader(stream, cut)
    reader.start = start or Start()
    read = []
    try:
        for worker in range(cut.readers):
            if cut.workers:
                info = {"id": worker, "num_workers": cut.workers, "seed": 0, "dataset": reader}
                torch_worker._worker_info = torch_worker.WorkerInfo(**info)
            read.append(list(reader))
    finally:
        torch_worker._worker_info = None
    assert all(isinstance(items[0], Opening) and isinstance(items[-1], End) for items in read)
    turns = itertools.zip_longest(*(items[1:-1] for items in read))
    return [portion for turn in turns for portion in turn if portion is not None]


def samples_in(found: list[Portion]) -> list[int]:
    return [number for portion in found for batch in portion.batches for number in batch.tolist()]


@given(layouts)
@settings(max_examples=200, deadline=None)
def test_ranks_and_loader_processes_of_any_number_read_each_sample_once(layout: dict[str, Any]) -> None:
    stream, n = stream_of(layout), layout["ranks"]
    size = layout["batch"] * layout["accumulate"] * n
    ranks = [
        portions(
            stream,
            Cut(
                global_batch_size=size,
                accumulate=layout["accumulate"],
                rank=rank,
                world_size=n,
                workers=layout["workers"],
            ),
        )
        for rank in range(n)
    ]
    assert sorted(number for mine in ranks for number in samples_in(mine)) == [*range(sum(layout["lengths"]))]
    assert all(sum(p.sizes) <= size // n and len(p.sizes) <= layout["accumulate"] for mine in ranks for p in mine)
    if layout["whole"]:  # the same global batches, whatever the numbers of ranks and processes
        for step, together in enumerate(zip(*ranks, strict=True)):
            block = range(step * size, min((step + 1) * size, stream.length))
            assert sorted(samples_in(list(together))) == [*block]
            assert {portion.total for portion in together} == {len(block)}


def epoch(rank: Rank, layout: dict[str, Any], place: Any = None, stop: int | None = None) -> tuple[list[Any], Any]:
    """This rank's steps, each with all ranks' samples in it, and the place after some."""
    source = Source(dataset=stream_of(layout), batch_size=layout["batch"])
    batches = RankStream(source, rank, accumulate=layout["accumulate"])  # type: ignore[arg-type]
    start = 0
    if place is not None:
        batches.load_state_dict(place)
        start = place["ranks"][0]["samples"]
    steps = []
    for step in batches.steps(0, start):
        mine = [number for batch, _ in step for number in batch.tolist()]
        assert len(mine) == sum(step.sizes)
        steps.append(sorted(number for theirs in rank.all_gather_object(mine) for number in theirs))
        assert len(steps[-1]) == step.samples > 0
        if stop is not None and len(steps) == stop:
            return steps, batches.state_dict()
    return steps, batches.state_dict()


@given(layouts)
@settings(max_examples=200, deadline=None)
def test_ranks_of_any_number_make_the_same_steps_and_go_on_after_any(layout: dict[str, Any]) -> None:
    def body(communicator: Any) -> None:
        rank = Rank(communicator)
        if not sum(layout["lengths"]):
            with pytest.raises(ConfigError, match="no sample on any rank"):
                epoch(rank, layout)
            return
        whole, _ = epoch(rank, layout)
        assert sorted(itertools.chain(*whole)) == [*range(sum(layout["lengths"]))]
        stop = 1 + layout["stop"] % len(whole)
        first, place = epoch(rank, layout, stop=stop)
        rest, _ = epoch(rank, layout, place)
        assert first + rest == whole

    run_ranks(layout["ranks"], body)


@given(layouts)
@settings(max_examples=60, deadline=None)
def test_an_evaluation_meets_each_sample_once(layout: dict[str, Any]) -> None:
    def body(communicator: Any) -> list[int]:
        rank = Rank(communicator)
        batches = evaluation_of(Source(dataset=stream_of(layout)), rank, batch_size=layout["batch"])
        found = [(batch.tolist(), samples) for batch, samples in batches]
        assert all(len(batch) == samples for batch, samples in found)
        return [number for batch, _ in found for number in batch]

    met = run_ranks(layout["ranks"], body)
    assert sorted(itertools.chain(*met)) == [*range(sum(layout["lengths"]))]


def test_what_is_a_stream() -> None:
    assert is_stream(Whole(3))
    assert is_stream(Files([1]))
    assert is_stream(lambda: iter([1]))
    assert not is_stream([1, 2])
    assert not is_stream(torch.ones(3))
    assert not is_stream(int)


class Shuffled(Whole):
    """Draws its order, and more while it is read, from the process's random numbers."""

    def __iter__(self) -> Any:
        order = torch.randperm(self.length).tolist()
        random.shuffle(order)
        for number in order:
            yield number, random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_stream_draws_the_same_on_every_rank_and_leaves_the_processs_numbers_alone() -> None:
    def everything(start: Start | None = None, workers: int = 0) -> list[Any]:
        cut = Cut(global_batch_size=4, accumulate=1, rank=0, world_size=1, workers=workers)
        torch.manual_seed(threading.get_ident() % 2**31)  # the process's own
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        found = [[column.tolist() for column in portion.batches[0]] for portion in portions(Shuffled(11), cut, start)]
        if not workers:
            assert torch.equal(torch.get_rng_state(), before[0])
            assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
        return found

    whole = everything()
    assert sorted(itertools.chain(*(step[0] for step in whole))) == [*range(11)]
    assert everything(workers=2) == whole
    assert everything(Start(at=8, skip=(8,))) == whole[2:]
    assert everything(Start(epoch=1))[0] != whole[0]


class ByWorker(Whole):
    """Splits itself over loader processes, as torch's documentation shows it, and knows of no ranks."""

    def __iter__(self) -> Any:
        info = get_worker_info()
        return iter(range(self.length) if info is None else range(info.id, self.length, info.num_workers))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_stream_that_splits_itself_over_processes_alone_loses_nothing(workers: int) -> None:
    met = [
        samples_in(
            portions(ByWorker(23), Cut(global_batch_size=4, accumulate=1, rank=r, world_size=2, workers=workers))
        )
        for r in range(2)
    ]
    assert sorted(itertools.chain(*met)) == [*range(23)]


def test_a_batch_smaller_than_the_number_of_ranks_is_refused_where_ranks_read_parts() -> None:
    def body(communicator: Any) -> None:
        rank: Any = Rank(communicator)
        RankStream(Source(dataset=Whole(4)), rank, global_batch_size=1)
        with pytest.raises(ConfigError, match="a global batch of 1 leaves nothing for some of 2 ranks"):
            RankStream(Source(dataset=Files([4])), rank, global_batch_size=1)

    run_ranks(2, body)


# -- other people's streams -------------------------------------------------------------------------------------------


def met_by_all(stream: Any, collate: Any, ranks: int, workers: int) -> list[int]:
    """All samples, by the numbers that ``collate`` finds in them."""
    found = []
    for rank in range(ranks):
        cut = Cut(global_batch_size=2 * ranks, accumulate=1, rank=rank, world_size=ranks, workers=workers)
        items = list(stream_loader(PortionReader(stream, cut, collate=collate), workers=workers))
        found += [number for item in items if isinstance(item, Portion) for batch in item.batches for number in batch]
    return sorted(found)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("shards", [1, 4, 6])
def test_hugging_faces_streams_are_split_by_their_own_rule(shards: int, ranks: int, workers: int) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_dict({"number": list(range(17))}).to_iterable_dataset(num_shards=shards)
    assert "split_dataset_by_node" in way_of(whole)
    met = met_by_all(whole, lambda rows: [row["number"] for row in rows], ranks, workers)
    assert met == [*range(17)]


def test_hugging_faces_streams_are_shuffled_anew_in_each_epoch() -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_dict({"number": list(range(17))}).to_iterable_dataset(num_shards=4)
    cut = Cut(global_batch_size=4, accumulate=1, rank=0, world_size=1, workers=0)
    reader = PortionReader(
        whole.shuffle(seed=1, buffer_size=5), cut, collate=lambda rows: [row["number"] for row in rows]
    )
    orders = []
    for epoch in (0, 1, 0):
        reader.start = Start(epoch=epoch)
        portions = [item for item in reader if isinstance(item, Portion)]
        orders.append([number for portion in portions for number in portion.batches[0]])
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == [*range(17)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_webdatasets_shards_are_split_whatever_its_node_splitter(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, ranks: int, workers: int
) -> None:
    wds = pytest.importorskip("webdataset")
    number = itertools.count()
    for shard in range(5):
        with wds.TarWriter(str(tmp_path / f"{shard}.tar")) as tar:
            for _ in range(shard):
                index = next(number)
                tar.write({"__key__": f"{index:03}", "cls": index})
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")  # of some launcher: it must not be split twice
    urls = [str(tmp_path / f"{shard}.tar") for shard in range(5)]
    for splitter in (wds.split_by_node, wds.shardlists.single_node_only):
        pipeline = wds.WebDataset(urls, nodesplitter=splitter, shardshuffle=False, empty_check=False).decode()
        assert way_of(pipeline) == "by its list of shards"
        assert met_by_all(pipeline, lambda rows: [row["cls"] for row in rows], ranks, workers) == [*range(10)]
    pipeline = wds.DataPipeline(wds.SimpleShardList(urls), wds.split_by_worker, wds.tarfile_to_samples(), wds.decode())
    assert way_of(pipeline) == STRIDE
    assert met_by_all(pipeline, lambda rows: [row["cls"] for row in rows], ranks, workers) == [*range(10)]
    gc.collect()  # webdataset leaves its files to the collector


@pytest.mark.parametrize("stop", [1, 2])
def test_streams_that_carry_a_state_go_on_without_reading_again(stop: int) -> None:
    nodes = pytest.importorskip("torchdata.nodes")
    datasets = pytest.importorskip("datasets")

    def rows() -> Any:
        return datasets.Dataset.from_dict({"number": list(range(13))}).to_iterable_dataset(num_shards=3)

    def loader() -> Any:
        return nodes.Loader(nodes.IterableWrapper([{"number": number} for number in range(13)]))

    for make in (rows, loader):

        def body(communicator: Any, make: Any = make) -> None:
            rank: Any = Rank(communicator)

            def read(place: Any = None, until: int | None = None) -> Any:
                source = Source(dataset=make(), batch_size=2, collate=lambda rows: [row["number"] for row in rows])
                batches = RankStream(source, rank)
                if place is not None:
                    batches.load_state_dict(place)
                steps = []
                for step in batches.steps(0, place["ranks"][0]["samples"] if place else 0):
                    steps.append([number for batch, _ in step for number in batch])
                    if len(steps) == until:
                        break
                return steps, batches.state_dict()

            whole, _ = read()
            first, place = read(until=stop)
            assert any(state is not None for one in place["ranks"] for state in one["states"])
            assert first + read(place)[0] == whole

        run_ranks(2, body)


def test_a_node_of_torchdatas_is_refused_with_the_loader_that_reads_it_again() -> None:
    nodes = pytest.importorskip("torchdata.nodes")
    with pytest.raises(ConfigError, match=r"read only once.*torchdata\.nodes\.Loader\(node\)"):
        Source(dataset=nodes.IterableWrapper([1]))


def test_a_part_is_asked_for_by_number() -> None:
    part = part_of(Files([2, 3, 1]), rank=1, world_size=2, worker=0, workers=1)
    assert list(part) == [2, 3, 4]

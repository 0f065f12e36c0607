"""Streams: each sample once, a step's gradient that of its samples, no rank waits for one that is done, and resumes."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import hvdtrain
from hvdtrain.errors import CheckpointError, ConfigError, DataError

pytestmark = pytest.mark.feature("streams")

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def sample(number):
    x = torch.linspace(-1, 1, 4, dtype=torch.float64) * (number % 7 - 3) + number / 50
    return x, torch.stack([x.sum(), x.prod()]) + number % 3


def numbers(batch):
    """Which samples a batch holds."""
    x = batch[0]
    return [round(float(50 * (row[1] + row[2]) / 2)) for row in x]


class Counted(IterableDataset):
    """Samples 0 to length, the same on every rank."""

    def __init__(self, length):
        self.length = length

    def __iter__(self):
        return map(sample, range(self.length))


class Parted:
    """Files of unequal length, some empty, which it splits itself; without the name of a data set."""

    def __init__(self, lengths, files=None):
        self.starts = [sum(lengths[:i]) for i in range(len(lengths))]
        self.lengths = lengths
        self.files = range(len(lengths)) if files is None else files

    def shard(self, num_shards, index):
        return type(self)(self.lengths, self.files[index::num_shards])

    def __iter__(self):
        for file in self.files:
            yield from map(sample, range(self.starts[file], self.starts[file] + self.lengths[file]))


class Learned:
    """A task that remembers which samples each step had."""

    def __init__(self):
        self.steps = []

    def loss(self, model, batch):
        self.steps.append(numbers(batch))
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    def metrics(self, model, batch):
        return {"loss": nn.functional.mse_loss(model(batch[0]), batch[1])}


def net():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def trainer(backend, model, task, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return hvdtrain.Trainer(backend, model, optimizer, task=task, precision="fp64", **options)


def trained(backend, data, model=None, task=None, *, epochs=1, max_steps=None, **options):
    """Fit, and return the model, the samples that this rank has met, and the result."""
    model, task = model or net(), task or Learned()
    fit = {name: options.pop(name) for name in ("global_batch_size", "batch_size", "resume_from") if name in options}
    result = trainer(backend, model, task, **options).fit(data, epochs=epochs, max_steps=max_steps, **fit)
    return model, [number for step in task.steps for number in step], result


def all_samples(backend, mine):
    return sorted(number for theirs in backend.all_gather_object(mine) for number in theirs)


def equal(model, other):
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("length", "batch"), [(1, 4), (8, 4), (23, 7)])
def test_a_stream_trains_like_one_process_at_any_number_of_ranks(backend, reference, length, batch, accumulate):
    options = {"global_batch_size": batch, "epochs": 2}
    alone, _, expected = trained(reference, Counted(length), **options)
    mine, met, result = trained(backend, Counted(length), accumulate=accumulate, **options)
    equal(mine, alone)
    assert (result.samples, result.steps, result.epochs) == (2 * length, 2 * -(-length // batch), 2)
    assert result.train_loss == pytest.approx(expected.train_loss, rel=1e-10)
    assert all_samples(backend, met) == sorted([*range(length)] * 2)


@pytest.mark.parametrize("data", [Counted(11), lambda: map(sample, range(11)), DataLoader(Counted(11), batch_size=2)])
def test_a_stream_is_an_iterable_a_function_or_in_a_loader(backend, data):
    options = {} if isinstance(data, DataLoader) else {"batch_size": 2}
    _, met, result = trained(backend, data, **options)
    assert all_samples(backend, met) == [*range(11)]
    assert result.steps == -(-11 // (2 * backend.world_size))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("lengths", [[5], [0, 4, 1], [9, 0, 2, 3, 7]])
def test_parts_of_unequal_length_are_met_once_and_each_step_is_the_mean_over_its_samples(backend, lengths, accumulate):
    task = Learned()
    model, met, result = trained(backend, Parted(lengths), task=task, batch_size=2, epochs=2, accumulate=accumulate)
    total = sum(lengths)
    assert result.samples == 2 * total
    assert all_samples(backend, met) == sorted([*range(total)] * 2)

    own = net()
    optimizer = torch.optim.SGD(own.parameters(), lr=0.05, momentum=0.9)
    for step in steps_of(backend, lengths, 2 * accumulate) * 2:
        x, y = (torch.stack(column) for column in zip(*map(sample, step), strict=True))
        nn.functional.mse_loss(own(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    equal(model, own)


def steps_of(backend, lengths, each):
    """The samples of each step over all ranks, which take ``each`` at a time of their own files."""
    n = backend.world_size
    ranks = [[round(50 * float(x[1] + x[2]) / 2) for x, _ in Parted(lengths).shard(n, rank)] for rank in range(n)]
    return [
        [number for of_rank in ranks for number in of_rank[start : start + each]]
        for start in range(0, max(map(len, ranks)), each)
    ]


def test_steps_that_some_ranks_have_no_part_in_normalise_batches_like_one_process(backend, reference):
    def fit(where, data, **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()
        model = hvdtrain.convert_sync_batch_norm(model, where)
        trained(where, data, model, **options)
        return model.state_dict()

    expected = fit(reference, Counted(11), global_batch_size=9)
    found = fit(backend, Counted(11), global_batch_size=9)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name, **CLOSE)
    n = backend.world_size
    for lengths in ([4, *[2] * (n - 1)], [0, *[4] * n]):  # of ranks that have other numbers of micro-batches, or none
        fit(backend, Parted(lengths), batch_size=2, accumulate=2)


@pytest.mark.parametrize("data", [Counted(9), Parted([5, 0, 4])], ids=["whole", "parts"])
def test_an_own_loop_over_a_stream_meets_each_sample_once_and_may_evaluate_and_stop_in_it(backend, data):
    model = net()
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loader = backend.loader(data, batch_size=2)
    for epoch in range(2):
        met = []
        for x, y in loader:
            met += numbers((x, y))
            if epoch:
                backend.all_gather_object(len(met))  # between two batches
            replica.backward(nn.functional.mse_loss(replica.model(x), y), samples=len(x))
            replica.step()
        assert all_samples(backend, met) == [*range(9)]
    for x, _ in loader:
        first = numbers((x,))
        break
    assert [number for x, _ in loader for number in numbers((x,))][: len(first)] == first


@pytest.mark.parametrize("data", [Counted(7), Parted([2, 0, 4, 1])], ids=["whole", "parts"])
def test_an_evaluation_counts_each_sample_of_a_stream_once(backend, reference, data):
    expected = trainer(reference, net(), Learned()).evaluate(Counted(7), batch_size=7)
    found = trainer(backend, net(), Learned()).evaluate(data, batch_size=2)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-10)


# -- loader processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: Counted(13), lambda: Parted([6, 0, 3, 4])], ids=["whole", "parts"])
def test_loader_processes_share_the_samples_of_a_rank(backend, make):
    _, met, result = trained(backend, make(), batch_size=2, workers=2)
    assert all_samples(backend, met) == [*range(13)]
    assert result.samples == 13


# -- going on ---------------------------------------------------------------------------------------------------------


class Stateful(Counted):
    """Knows where it is; says how many samples it has been asked for."""

    def __init__(self, length):
        super().__init__(length)
        self.next = self.read = 0

    def __iter__(self):
        while self.next < self.length:
            self.next += 1
            self.read += 1
            yield sample(self.next - 1)
        self.next = 0

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


class StatefulParts(Parted):
    def __init__(self, lengths, files=None):
        super().__init__(lengths, files)
        self.at = 0

    def __iter__(self):
        for number, one in enumerate(list(super().__iter__())):
            if number >= self.at:
                self.at += 1
                yield one
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.costly(2)
@pytest.mark.parametrize("stop", [1, 4])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Counted(17),
        lambda: Stateful(17),
        lambda: Parted([9, 2, 0, 6]),
        lambda: StatefulParts([9, 2, 0, 6]),
    ],
    ids=["whole", "whole and its state", "parts", "parts and their state"],
)
def test_a_run_that_stopped_in_the_middle_of_a_stream_goes_on_bit_for_bit(backend, tmp_path, make, stop):
    folder = backend.broadcast_object(str(tmp_path))
    options = {"batch_size": 2, "epochs": 2}
    whole, met, result = trained(backend, make(), **options)
    checkpoints = hvdtrain.Checkpoints(folder)
    _, first, _ = trained(
        backend, make(), **options, max_steps=stop, checkpoints=checkpoints, checkpoint_every=1, log_every=1
    )
    model, rest, after = trained(backend, make(), **options, resume_from=checkpoints.find(backend))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    assert after.steps == result.steps
    assert first + rest[-(len(met) - len(first)) or len(rest) :] == met  # a rehearsal comes before


def test_what_knows_its_place_is_not_read_twice(backend, tmp_path, logged):
    checkpoints = hvdtrain.Checkpoints(backend.broadcast_object(str(tmp_path)))
    n = backend.world_size
    trained(backend, Stateful(8 * n), batch_size=2, max_steps=2, checkpoints=checkpoints)
    again = Stateful(8 * n)
    trained(backend, again, batch_size=2, resume_from=checkpoints.find(backend))
    assert again.read == 4 * n
    trained(backend, Counted(8 * n), batch_size=2, max_steps=1, checkpoints=checkpoints)
    trained(backend, Counted(8 * n), batch_size=2, resume_from=checkpoints.find(backend))
    said = [message for message in logged if "is read again" in message]
    assert len(said) == (backend.rank == 0)


def test_an_own_loop_over_a_stream_goes_on(backend, tmp_path):
    folder = backend.broadcast_object(str(tmp_path))
    n = backend.world_size
    for name, make in {"whole": lambda: Stateful(6 * n + 1), "parts": lambda: Parted([n + 3, 2, 0, 4 * n])}.items():

        def loop(until, checkpoints, make=make):
            model, met = net(), []
            replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
            loader = backend.loader(make(), batch_size=2)
            state = hvdtrain.LoopState(backend, replica, loader=loader)
            steps = state.load(checkpoints)
            while loader.epoch < 2:
                for x, y in loader:
                    met += numbers((x, y))
                    replica.backward(nn.functional.mse_loss(replica.model(x), y), samples=len(x))
                    replica.step()
                    steps += 1
                    if steps == until:
                        state.save(checkpoints, steps)
                        return met
            return met

        expected = loop(99, hvdtrain.Checkpoints(f"{folder}/no {name}"))
        checkpoints = hvdtrain.Checkpoints(f"{folder}/{name}")
        first = loop(2, checkpoints)
        assert first + loop(99, checkpoints) == expected


def test_a_stream_of_another_number_of_ranks_goes_on_where_every_rank_reads_all_of_it(backend, reference, tmp_path):
    folder = backend.broadcast_object(str(tmp_path))
    for name, make in {
        "whole": lambda: Counted(13),
        "state": lambda: Stateful(13),
        "parts": lambda: Parted([9, 4]),
    }.items():
        checkpoints = hvdtrain.Checkpoints(f"{folder}/{name}")
        if backend.rank == 0:
            trained(reference, make(), global_batch_size=4, max_steps=2, checkpoints=checkpoints)
        backend.barrier()
        found = checkpoints.find(backend)
        if name == "parts" and backend.world_size > 1:
            with pytest.raises(CheckpointError, match=r"read with ranks 1 \(now \d\).*from the end of an epoch"):
                trained(backend, make(), global_batch_size=4, resume_from=found)
            continue
        alone, _, _ = trained(reference, make(), global_batch_size=4)
        model, _, result = trained(backend, make(), global_batch_size=4, resume_from=found)
        equal(model, alone)
        assert result.samples == 5


# -- bad input --------------------------------------------------------------------------------------------------------


def refused(backend, kind, message, call):
    with pytest.raises(kind, match=message) as caught:
        call()
    assert len(set(backend.all_gather_object(str(caught.value)))) == 1


@pytest.mark.parametrize("data", [Counted(0), Parted([0, 0])], ids=["whole", "parts"])
def test_a_stream_without_a_sample_on_any_rank_is_refused_before_the_first_step(backend, data):
    refused(backend, ConfigError, "yielded no sample on any rank", lambda: trained(backend, data, batch_size=2))
    refused(
        backend, ConfigError, "evaluation data set is empty", lambda: trainer(backend, net(), Learned()).evaluate(data)
    )


def test_a_part_for_each_rank_without_shard_is_refused(backend):
    if backend.world_size == 1:
        return
    mine = Counted(4 + backend.rank)
    mine.__class__ = type("Mine", (Counted,), {"__iter__": lambda self: map(sample, range(backend.rank, 20))})
    message = "Mine is not the same stream on every rank.*is another on rank 1 than on rank 0.*shard"
    refused(backend, ConfigError, message, lambda: trained(backend, mine, batch_size=2))


def test_streams_that_end_differently_are_refused_at_that_step(backend):
    if backend.world_size == 1:
        return
    n = backend.world_size
    with pytest.raises(DataError, match=rf"not the same stream.*after {4 * n} samples"):
        trained(backend, Counted(4 * n + 2 * n * (backend.rank == 0)), batch_size=2)


def test_a_collate_function_that_drops_samples_is_refused(backend):
    n = backend.world_size

    def dropping(rows):  # one of each rank
        kept = [(x, y) for x, y in rows if numbers((x.unsqueeze(0),))[0] not in range(n, 2 * n)]
        return torch.utils.data.default_collate(kept)

    with pytest.raises(ConfigError, match=r"a batch of 3 samples has 2 after collate=.*samples_of"):
        trained(backend, Counted(6 * n), batch_size=3, collate=dropping)


def test_the_kinds_of_data_must_agree(backend):
    if backend.world_size == 1:
        return
    data = Counted(8) if backend.rank else [sample(number) for number in range(8)]
    refused(
        backend, ConfigError, "train_data a stream is False on rank 0", lambda: trained(backend, data, batch_size=2)
    )

"""A rank's share of data: loaders of every kind, last batches, empty batches, and data or calls that differ."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, TensorDataset

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import ConfigError

pytestmark = pytest.mark.feature("loader")

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


class Words(Dataset):
    """Samples of different lengths, with text and with nothing."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"ids": torch.arange(index + 1), "text": f"t{index}", "none": None}


def pad(rows):
    ids = nn.utils.rnn.pad_sequence([row["ids"] for row in rows], batch_first=True)
    return {"ids": ids, "text": [row["text"] for row in rows], "none": None}


def all_of(backend, batches):
    """What all ranks met, step by step."""
    ranks = backend.all_gather_object(batches)
    assert len({len(one) for one in ranks}) == 1
    return [flat(step) for step in zip(*ranks, strict=True)]


def flat(lists):
    return [one for part in lists for one in part]


@pytest.mark.parametrize("length", [1, 4, 5, 9])
def test_a_collate_function_makes_every_batch_and_the_empty_one(backend, length):
    loader = backend.loader(Words(length), batch_size=2, collate=pad)
    batches = list(loader)
    assert len(batches) == len(loader)
    assert loader.dataset.length == length
    for batch in batches:
        assert len(batch["ids"]) == len(batch["text"])
        assert batch["none"] is None
    texts = all_of(backend, [batch["text"] for batch in batches])
    assert flat(texts) == [f"t{index}" for index in range(length)]


@pytest.mark.parametrize("last_batch", ["keep", "drop", "merge"])
def test_the_short_last_batch_is_kept_dropped_or_merged(backend, last_batch):
    n = backend.world_size
    loader = backend.loader(ArrayDataset(torch.arange(4 * n + 1)), batch_size=2, last_batch=last_batch)
    steps = all_of(backend, [x.tolist() for (x,) in loader])
    sizes = {"keep": [2 * n, 2 * n, 1], "drop": [2 * n, 2 * n], "merge": [2 * n, 2 * n + 1]}[last_batch]
    assert [len(step) for step in steps] == sizes
    assert flat(steps) == list(range(sum(sizes)))


def test_a_users_own_loader_is_cut_over_the_ranks(backend):
    data = TensorDataset(torch.arange(17))
    loader = backend.loader(
        DataLoader(data, batch_size=2, shuffle=True, collate_fn=lambda rows: [int(x) for (x,) in rows])
    )
    first, second = (all_of(backend, list(loader)) for _ in range(2))
    assert first != second
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(17))
    loader.set_epoch(0)
    assert all_of(backend, list(loader)) == first


def test_a_distributed_sampler_is_not_cut_twice(backend):
    data = TensorDataset(torch.arange(17))
    cut = DistributedSampler(data, num_replicas=backend.world_size, rank=backend.rank, shuffle=False)
    loader = backend.loader(DataLoader(data, batch_size=3, sampler=cut))
    assert flat(all_of(backend, [x.tolist() for (x,) in loader])) == list(range(17))


def test_a_random_sampler_without_a_seed_gives_all_ranks_one_order(backend):
    torch.manual_seed(100 + backend.rank)
    sampler = torch.utils.data.WeightedRandomSampler([1.0] * 30, 20)
    loader = backend.loader(TensorDataset(torch.arange(30)), batch_size=2, sampler=sampler)
    steps = all_of(backend, [x.tolist() for (x,) in loader])
    assert len(flat(steps)) == 20


def test_samplers_that_disagree_are_named_on_every_rank(backend):
    order = list(range(6)) if backend.rank == 0 else list(range(5, -1, -1))
    loader = backend.loader(TensorDataset(torch.arange(6)), batch_size=1, sampler=order)
    if backend.world_size == 1:
        assert len(list(loader)) == 6
        return
    with pytest.raises(ConfigError, match=r"gives ranks? 1.* another order than rank 0"):
        next(iter(loader))


# -- training ---------------------------------------------------------------------------------------------------------


def trainer(where, model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"loss": nn.functional.mse_loss} | options
    return hvdtrain.Trainer(where, model, optimizer, precision="fp64", **options)


def regression(length):
    x = torch.sin(torch.arange(length * 4, dtype=torch.float64)).reshape(length, 4)
    return TensorDataset(x, x[:, :2].square())


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 2)


@pytest.mark.parametrize("last_batch", ["keep", "drop", "merge"])
@pytest.mark.parametrize("length", [17, 24])
def test_a_loader_trains_as_one_process_does(backend, reference, last_batch, length):
    def trained(where):
        model = linear()
        data = DataLoader(regression(length), batch_size=8 // where.world_size, shuffle=True)
        result = trainer(where, model, seed=3).fit(data, data, epochs=2, last_batch=last_batch, global_batch_size=8)
        return result, model.state_dict()

    (mine, found), (alone, expected) = trained(backend), trained(reference)
    assert (mine.steps, mine.samples, mine.epochs) == (alone.steps, alone.samples, 2)
    assert mine.samples == 2 * (length // 8 * 8 if last_batch == "drop" else length)
    torch.testing.assert_close(mine.eval_metrics["loss"], alone.eval_metrics["loss"], **CLOSE)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name, **CLOSE)


def test_a_loaders_batch_size_serves_where_none_is_given(backend):
    n = backend.world_size
    fitted = trainer(backend, linear()).fit(DataLoader(regression(6 * n), batch_size=2), epochs=1)
    assert fitted.steps == 3
    with pytest.raises(ConfigError, match="batch_size"):
        trainer(backend, linear()).fit(regression(6 * n), epochs=1)


def test_dropping_the_only_batch_is_refused(backend):
    with pytest.raises(ConfigError, match="leaves no step"):
        trainer(backend, linear()).fit(regression(3), epochs=1, global_batch_size=8, drop_last=True)


def test_one_sample_and_batch_normalisation_name_the_ways_out_and_they_work(backend):
    n = backend.world_size
    data = regression(3 * n)

    def fit(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        return trainer(backend, model).fit(data, epochs=2, batch_size=2, **options).samples

    with pytest.raises(ConfigError, match=r"one value per channel.*--last-batch merge"):
        fit()
    assert fit(last_batch="merge") == 6 * n
    assert fit(last_batch="drop") == fit(drop_last=True) == 4 * n


@dataclasses.dataclass(frozen=True)
class Batch:
    x: torch.Tensor
    y: torch.Tensor
    names: list

    def __post_init__(self):
        object.__setattr__(self, "weights", torch.ones(len(self.x)))


class Own:
    def __init__(self, x, y, names):
        self.x, self.y, self.names, self.weights = x, y, names, [1.0] * len(x)

    def to(self, device):
        return Own(self.x.to(device), self.y.to(device), self.names)


class Opaque:
    def __init__(self, x, y, names):
        rows = x, y, names, [1.0] * len(x)
        self.get = lambda name: rows[["x", "y", "names", "weights"].index(name)]


def attributes(kind):
    def collate(rows):
        x, y = (torch.stack(column) for column in zip(*rows, strict=True))
        return kind(x, y, [f"sample {i}" for i in range(len(rows))])

    return collate


class OfObjects:
    def loss(self, model, batch):
        get = getattr(batch, "get", None) or (lambda name: getattr(batch, name))
        assert len(get("names")) == len(get("weights")) == len(get("x")) == len(get("y"))
        return nn.functional.mse_loss(model(get("x")), get("y"))

    metrics = None


@pytest.mark.parametrize("kind", [Batch, Own])
def test_an_empty_batch_of_objects_keeps_ranks_in_step_with_one_process(backend, reference, kind):
    def trained(where):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()
        model = hvdtrain.convert_sync_batch_norm(model, where)
        fitting = trainer(where, model, task=OfObjects(), loss=None, collate=attributes(kind))
        fitting.fit(regression(11), epochs=2, global_batch_size=9)  # the last batch has 2 samples
        return model.state_dict()

    for (name, mine), alone in zip(trained(backend).items(), trained(reference).values(), strict=True):
        torch.testing.assert_close(mine, alone, msg=name, **CLOSE)


def test_an_object_that_hides_its_samples_is_refused_before_training_only_where_an_empty_batch_is_needed(backend):
    n = backend.world_size

    def fit(length):
        model = hvdtrain.convert_sync_batch_norm(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), backend)
        fitting = trainer(backend, model, task=OfObjects(), loss=None, collate=attributes(Opaque))
        return fitting.fit(regression(length), epochs=1, batch_size=2).steps

    assert fit(4 * n) == 2
    if n == 1:
        return
    with pytest.raises(ConfigError, match=r"no empty batch can be made.*batch\.get.*collate="):
        fit(4 * n + 1)


# -- what differs between ranks ---------------------------------------------------------------------------------------


def refused(backend, message, call):
    """Every rank refuses it by the same sentence; one rank alone has nobody to differ from."""
    if backend.world_size == 1:
        call()
        return
    with pytest.raises(ConfigError, match=message) as caught:
        call()
    assert len(set(backend.all_gather_object(str(caught.value)))) == 1


def test_a_part_for_each_rank_is_refused_with_the_two_ways_out(backend):
    n, rank = backend.world_size, backend.rank
    whole = regression(8 * n)
    equal, longer = Subset(whole, range(rank, 8 * n, n)), Subset(whole, range(4 + rank))
    ways = r"train_data differs between the ranks: ranks? 1.*same whole data.*replica\.backward"
    for part in (equal, longer, DataLoader(equal, batch_size=2)):
        refused(backend, ways, lambda part=part: trainer(backend, linear()).fit(part, epochs=1, global_batch_size=4))
    refused(
        backend,
        "eval_data differs",
        lambda: trainer(backend, linear()).fit(whole, equal, epochs=1, global_batch_size=4),
    )
    refused(backend, "evaluation data differs", lambda: trainer(backend, linear()).evaluate(longer))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("epochs", lambda rank: {"epochs": 1 + rank}),
        ("max_steps", lambda rank: {"max_steps": 1 if rank else None}),
        ("global_batch_size", lambda rank: {"global_batch_size": 4 + rank}),
        ("last_batch", lambda rank: {"last_batch": "keep" if rank else "merge"}),
        ("eval_every", lambda rank: {"eval_every": 1 + rank}),
    ],
)
def test_arguments_that_differ_are_named(backend, name, arguments):
    given = {"epochs": 1, "global_batch_size": 4} | arguments(backend.rank)
    refused(
        backend,
        rf"called fit differently: {name} is .* on rank 0 and .* on ranks? 1",
        lambda: trainer(backend, linear()).fit(regression(8), **given),
    )


def test_augmentation_that_differs_between_ranks_is_no_other_data(backend):
    class Augmented(Dataset):
        rng = torch.Generator().manual_seed(backend.rank)

        def __len__(self):
            return 8

        def __getitem__(self, index):
            return torch.rand(4) + torch.rand(4, generator=self.rng), torch.rand(2)

    assert trainer(backend, linear()).fit(Augmented(), epochs=1, global_batch_size=4).steps == 2

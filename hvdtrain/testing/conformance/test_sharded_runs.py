"""Runs with a model that is cut over the ranks end as those with the whole model do, and their checkpoints are the same."""

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import CheckpointError, ConfigError, TrainingError
from hvdtrain.testing import cutting
from hvdtrain.testing.cutting import REFUSED_BY, UNITS

pytestmark = pytest.mark.feature("sharded model", refused_by=REFUSED_BY)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 7)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.LayerNorm(7)) for _ in range(3))
        self.last = nn.Linear(7, 3)

    def forward(self, x):
        x = self.first(x.flatten(1))
        for layer in self.layers:
            x = x + layer(x)
        return self.last(x)


def folder_of(backend, tmp_path):
    return backend.broadcast_object(str(tmp_path))


def offered(backend):
    return cutting.offered(backend, lambda: trainer(backend, UNITS))


def data(length):
    x = torch.randn(length, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return ArrayDataset(x, torch.arange(length) % 3)


class Task:
    """Classification, with a metric of its own weight."""

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def metrics(self, model, batch):
        output, y = model(batch[0]), batch[1]
        right = (output.argmax(1) == y).double()
        first = (y == 0).sum()
        return {
            "loss": nn.functional.cross_entropy(output, y),
            "accuracy": right.mean(),
            "first": (right[y == 0].sum() / first, first),
        }


def trainer(backend, shard, *, kind="adamw", task=None, model=None, schedule=False, **options):
    torch.manual_seed(1)
    model = (model or Model)().double()
    groups = [
        {"params": list(model.layers.parameters())},
        {"params": [*model.first.parameters(), *model.last.parameters()]},
    ]
    make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[kind]
    optimizer = make(groups, lr=0.02, weight_decay=0.1, **({"momentum": 0.9} if kind == "sgd" else {}))
    if schedule:
        options["schedule"] = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    if shard is not None:
        options["shard_modules"] = shard
    return hvdtrain.Trainer(backend, model, optimizer, task=task or Task(), precision="fp64", **options)


def close(backend, state, expected):
    """Compare what rank 0 has."""
    wrong = ""
    if backend.rank == 0:
        for name, value in expected["model"].items():
            if not (state["model"][name] - value).abs().max() <= 1e-12:
                wrong = name
        for index, of in expected["optimizer"]["state"].items():
            for name, value in of.items():
                if not (state["optimizer"]["state"][index][name] - value).abs().max() <= 1e-12:
                    wrong = f"{name} of {index}"
    assert not backend.broadcast_object(wrong)


RUNS = [  # of 25 samples the last batch has one: the other ranks have none
    (25, {}),
    (23, {"accumulate": 3, "clip_norm": 0.05, "kind": "sgd"}),
    (25, {"accumulate": 2, "on_nan": "skip", "schedule": True}),
]


@pytest.mark.costly(1)
@pytest.mark.parametrize(("length", "how"), RUNS)
def test_a_run_ends_as_with_the_whole_model(backend, reference, length, how):
    if not offered(backend):
        return
    ends, made = [], []
    for on, shard in ((reference, None), (backend, UNITS)):
        one = trainer(on, shard, **how)
        ends.append(one.fit(data(length), data(11), epochs=2, global_batch_size=6))
        made.append(one.replica.whole_state())
    close(backend, made[1], made[0])
    assert ends[0].steps == ends[1].steps
    assert abs(ends[0].train_loss - ends[1].train_loss) < 1e-12
    assert ends[0].eval_metrics == pytest.approx(ends[1].eval_metrics, rel=0, abs=1e-12)


@pytest.mark.parametrize(("length", "batch_size"), [(1, 4), (2, 1), (5, 1), (16, 4)])
def test_evaluations_and_predictions_are_those_of_the_whole_model(backend, reference, length, batch_size):
    if not offered(backend):
        return
    found = []
    for on, shard in ((reference, None), (backend, UNITS)):
        one = trainer(on, shard)
        metrics = one.evaluate(data(length), batch_size=batch_size)
        outputs = one.predict(data(length), batch_size=batch_size, to="all")
        found.append((metrics, outputs))
    assert found[0][0] == pytest.approx(found[1][0], rel=0, abs=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-12)


@pytest.mark.costly(1)
@pytest.mark.parametrize("partition", ["sample", "sample-strided"])
def test_it_reads_data_sets_that_are_cut_once(backend, partition):
    if not offered(backend):
        return
    ends = []
    for shard in (None, UNITS):
        one = trainer(backend, shard)
        metrics = one.fit(data(17), data(7), epochs=2, global_batch_size=5, partition=partition).eval_metrics
        ends.append((one.replica.whole_state(), metrics))
    close(backend, ends[1][0], ends[0][0])
    assert ends[0][1] == pytest.approx(ends[1][1], rel=0, abs=1e-12)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, length):
        self.whole = data(length)

    def __iter__(self):
        return (self.whole[index] for index in range(len(self.whole)))


@pytest.mark.costly(0.5)
def test_it_reads_streams(backend, reference):
    if not offered(backend):
        return
    ends = []
    for on, shard in ((reference, None), (backend, UNITS)):
        one = trainer(on, shard, accumulate=2)
        metrics = one.fit(Stream(19), Stream(10), epochs=2, global_batch_size=6, eval_batch_size=2).eval_metrics
        ends.append((one.replica.whole_state(), metrics))
    close(backend, ends[1][0], ends[0][0])
    assert ends[0][1] == pytest.approx(ends[1][1], rel=0, abs=1e-12)


WAYS = [
    (UNITS, None, "adamw", "at once"),
    (None, UNITS, "sgd", "at once"),
    ("layers[.]0|last", UNITS, "sgd", "meanwhile"),
    (UNITS, UNITS, "adamw", "meanwhile"),
]


@pytest.mark.costly(1)
@pytest.mark.parametrize(("before", "after", "kind", "written"), WAYS)
def test_a_run_goes_on_whether_it_is_cut_or_not(backend, reference, tmp_path, before, after, kind, written):
    if not offered(backend):
        return
    folder = folder_of(backend, tmp_path)
    plain = trainer(reference, None, kind=kind, schedule=True)
    plain.fit(data(25), epochs=2, global_batch_size=6)
    make = hvdtrain.Checkpoints if written == "at once" else hvdtrain.AsyncCheckpoints
    first = trainer(backend, before, kind=kind, schedule=True, checkpoints=make(folder))
    first.fit(data(25), epochs=1, global_batch_size=6, max_steps=4)
    checkpoints = make(folder)
    second = trainer(backend, after, kind=kind, schedule=True, checkpoints=checkpoints)
    end = second.fit(data(25), epochs=2, global_batch_size=6, resume_from=checkpoints.find(backend))
    assert end.resumed_from is not None
    assert end.steps == 10
    close(backend, second.replica.whole_state(), plain.replica.whole_state())


def test_a_checkpoint_is_the_one_that_the_whole_model_has_written(backend, reference, tmp_path):
    if not offered(backend):
        return
    folder = folder_of(backend, tmp_path)
    cut = trainer(backend, UNITS, checkpoints=hvdtrain.Checkpoints(folder))
    cut.fit(data(25), epochs=1, global_batch_size=6)
    wrong = ""
    if backend.rank == 0:  # one process reads what all have written
        one = trainer(reference, None)
        one.fit(data(25), epochs=1, global_batch_size=6, resume_from=hvdtrain.Checkpoints(folder).latest())
        plain = trainer(reference, None)
        plain.fit(data(25), epochs=1, global_batch_size=6)
        theirs, own = one.replica.whole_state(), plain.replica.whole_state()
        wrong = repr([n for n, value in own["model"].items() if (theirs["model"][n] - value).abs().max() > 1e-12])
    assert backend.broadcast_object(wrong) == "[]"


def test_a_checkpoint_of_another_model_is_refused_on_every_rank(backend, tmp_path):
    if not offered(backend):
        return
    folder = folder_of(backend, tmp_path)
    trainer(backend, UNITS, checkpoints=hvdtrain.Checkpoints(folder)).fit(data(6), global_batch_size=6)

    class Wider(Model):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(7, 4)

    other = trainer(backend, UNITS, model=Wider)
    with pytest.raises(CheckpointError, match=r"is of another model: last.weight is \(3, 7\)"):
        other.fit(data(6), global_batch_size=6, resume_from=hvdtrain.Checkpoints(folder).find(backend))


@pytest.mark.costly(1)
@pytest.mark.parametrize(("before", "after"), [(UNITS, None), (None, UNITS)])
def test_a_loop_of_ones_own_is_saved_and_goes_on(backend, tmp_path, before, after):
    if not offered(backend):
        return
    folder = folder_of(backend, tmp_path)

    def made(shard):
        torch.manual_seed(1)
        models = [Model().double() for _ in range(2)]
        optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in models]
        first, second = (
            backend.replicate(model, optimizer, shard_modules=shard)
            for model, optimizer in zip(models, optimizers, strict=True)
        )
        return (first, second), hvdtrain.LoopState(backend, first, second=second)

    def step(replicas, number):
        torch.manual_seed(50 + number)
        x = torch.randn(2 * backend.world_size, 4, dtype=torch.float64)[2 * backend.rank :][:2]
        for replica in replicas:
            replica.backward(replica.model(x).square().mean(), samples=2)
            replica.step()

    straight, _ = made(before)
    for number in range(4):
        step(straight, number)
    replicas, state = made(before)
    for number in range(2):
        step(replicas, number)
    state.save(hvdtrain.Checkpoints(folder), 2)
    again, state = made(after)
    assert state.load(hvdtrain.Checkpoints(folder)) == 2
    for number in range(2, 4):
        step(again, number)
    for one, other in zip(again, straight, strict=True):
        close(backend, one.whole_state(), other.whole_state())


@pytest.mark.costly(1)
@pytest.mark.parametrize(("before", "after"), [(UNITS, UNITS), (UNITS, None)])
def test_weights_are_averaged_and_the_average_goes_on_whether_it_is_cut_or_not(
    backend, reference, tmp_path, before, after
):
    if not offered(backend):
        return
    folder = folder_of(backend, tmp_path)
    plain_average = hvdtrain.ExponentialMovingAverage(0.7)
    plain = trainer(reference, None, callbacks=[plain_average])
    expected = plain.fit(data(24), data(9), epochs=2, global_batch_size=6)
    first = trainer(
        backend, before, callbacks=[hvdtrain.ExponentialMovingAverage(0.7)], checkpoints=hvdtrain.Checkpoints(folder)
    )
    first.fit(data(24), data(9), epochs=1, global_batch_size=6)
    average = hvdtrain.ExponentialMovingAverage(0.7)
    second = trainer(backend, after, callbacks=[average])
    found = second.fit(
        data(24), data(9), epochs=2, global_batch_size=6, resume_from=hvdtrain.Checkpoints(folder).find(backend)
    )
    assert found.eval_metrics == pytest.approx(expected.eval_metrics, rel=0, abs=1e-12)
    close(backend, second.replica.whole_state(), plain.replica.whole_state())
    with average.applied(second), plain_average.applied(plain):
        held, theirs = second.replica.whole_state(), plain.replica.whole_state()
    close(backend, held, theirs)
    second.fit(data(24), epochs=3, global_batch_size=6)  # begins with the average that is there


class Wrong(Task):
    """On one rank, metrics that are none, in the first of several batches."""

    def __init__(self, rank):
        self.rank = rank

    def metrics(self, model, batch):
        found = super().metrics(model, batch)
        return {"loss": "low"} if self.rank == 0 else found


def test_metrics_that_are_none_are_refused_on_every_rank(backend):
    if not offered(backend):
        return
    one = trainer(backend, UNITS, task=Wrong(backend.rank))
    with pytest.raises(ConfigError, match=r"metric 'loss' .*\(on rank 0\)"):
        one.evaluate(data(30), batch_size=2)
    backend.barrier()


class Skipping(Model):
    """Each rank leaves out another layer."""

    out = 0

    def forward(self, x):
        x = self.first(x)
        for number, layer in enumerate(self.layers):
            if number != self.out:
                x = x + layer(x)
        return self.last(x)


def test_ranks_that_run_other_modules_are_told_also_where_nothing_is_trained(backend):
    if not offered(backend) or backend.world_size == 1:
        return
    one = trainer(backend, UNITS, model=Skipping)
    one.replica.module.out = backend.rank % 3
    with pytest.raises(TrainingError, match=r"rank 0 and rank 1 ran other modules of the model, or in another order"):
        one.evaluate(data(2 * backend.world_size), batch_size=2)
    backend.barrier()


REFUSED = [
    ({"channels_last": True}, r"and channels_last=True .* exclude each other"),
    ({"reduce_dtype": "bf16"}, r"and reduce_dtype= .* exclude each other"),
    ({"bucket_bytes": 1000}, r"and bucket_bytes= .* exclude each other"),
    ({"precision": "bf16-pure"}, r"and MasterWeights .* exclude each other"),
]


@pytest.mark.parametrize(("asked", "words"), REFUSED)
def test_what_does_not_go_with_it_is_refused_by_the_table(backend, asked, words):
    if not offered(backend):
        return
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if asked.get("precision") == "bf16-pure":
        optimizer = hvdtrain.MasterWeights(optimizer)
    with pytest.raises(ConfigError, match=words):
        hvdtrain.Trainer(backend, model, optimizer, loss=nn.functional.mse_loss, shard_modules="2", **asked)

"""The training loop over ranks: random numbers, evaluation and its refusals, saving and resuming."""

import numpy as np
import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.data.random_numbers import untouched_random_numbers
from hvdtrain.errors import CheckpointError, ConfigError
from hvdtrain.training.random_numbers import OwnRandomNumbers, seed_everything

pytestmark = pytest.mark.feature("trainer")


def data(length=22):
    return ArrayDataset(torch.linspace(-1, 1, 4 * length).reshape(length, 4), torch.arange(length) % 3)


class Noting(nn.Dropout):
    """Dropout that remembers what it drew."""

    def __init__(self):
        super().__init__(0.5)
        self.drawn = []

    def forward(self, x):
        if self.training:
            self.drawn.append(super().forward(torch.ones(64)).ne(0).tolist())
        return super().forward(x)


def net(norm=nn.LayerNorm):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), norm(8), Noting(), nn.Linear(8, 3))


def make(backend, model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
    options = {"loss": nn.functional.cross_entropy, **options} if "task" not in options else options
    return hvdtrain.Trainer(backend, model, optimizer, schedule=schedule, **options)


def equal(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def all_different(values):
    return all(one != other for i, one in enumerate(values) for other in values[:i])


def test_ranks_drop_out_differently_and_reproducibly_and_are_alike_again_afterwards(backend):
    runs = []
    for _ in range(2):
        model = net()
        np.random.seed(1)
        make(backend, model).fit(data(), epochs=2, global_batch_size=4 * backend.world_size)
        runs.append(backend.all_gather_object(model[2].drawn))
        assert len(set(backend.all_gather_object((*torch.rand(3).tolist(), np.random.rand())))) == 1
    assert runs[0] == runs[1]
    for masks in zip(*runs[0], strict=True):
        assert all_different(masks)


def test_rank_zero_draws_what_one_process_draws(backend, reference):
    drawn = []
    for one in (reference, backend):
        model = net()
        make(one, model).fit(data(4 * one.world_size), epochs=2, global_batch_size=4 * one.world_size)
        drawn.append(model[2].drawn)
    assert len(drawn[0]) == len(drawn[1]) == 2
    assert (drawn[0] == drawn[1]) == (backend.rank == 0)


class Noisy(torch.utils.data.Dataset):
    def __init__(self):
        self.drawn = []

    def __len__(self):
        return 24

    def __getitem__(self, i):
        self.drawn.append((torch.rand(()).item(), np.random.rand()))
        return torch.full((4,), float(i)), i % 3


def test_ranks_augment_differently(backend):
    np.random.seed(1)
    noisy = Noisy()
    make(backend, net()).fit(noisy, epochs=1, global_batch_size=3 * backend.world_size)
    trained = noisy.drawn[-(24 // backend.world_size) :]  # before, the ranks have compared a few samples
    for generator in (0, 1):
        everyone = backend.all_gather_object([one[generator] for one in trained])
        numbers = [number for of_rank in everyone for number in of_rank]
        assert len(set(numbers)) == len(numbers)


def test_ranks_that_were_seeded_apart_keep_their_numbers(backend):
    with untouched_random_numbers():
        seed_everything(5, backend.rank)
        expected = torch.rand(4)
        seed_everything(5, backend.rank)
        with OwnRandomNumbers(backend):
            found = torch.rand(4)
    assert torch.equal(found, expected)


def test_own_numbers_go_on_unless_something_was_drawn_or_seeded_between(backend):
    with untouched_random_numbers():
        own = OwnRandomNumbers(backend)
        torch.manual_seed(9)
        with own:
            whole = torch.rand(6)
        torch.manual_seed(9)
        own = OwnRandomNumbers(backend)
        parts = []
        for _ in range(2):
            with own:
                parts.append(torch.rand(3))
        assert torch.equal(torch.cat(parts), whole)
        torch.manual_seed(9)
        with own:
            assert torch.equal(torch.rand(3), whole[:3])


@pytest.mark.costly(2)
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_resumed_fit_equals_the_uninterrupted_one_bit_for_bit(backend, tmp_path, stop):
    folder = backend.broadcast_object(str(tmp_path))
    batch = 2 * backend.world_size + 1  # ranks have unequal shares
    whole, first, second = (net(nn.BatchNorm1d) for _ in range(3))
    torch.manual_seed(3)
    make(backend, whole).fit(data(2 * batch), data(5), epochs=3, global_batch_size=batch)
    checkpoints = hvdtrain.Checkpoints(folder)
    torch.manual_seed(3)
    trainer = make(backend, first, checkpoints=checkpoints, checkpoint_every=1)
    trainer.fit(data(2 * batch), data(5), epochs=3, global_batch_size=batch, max_steps=stop)
    torch.manual_seed(99)
    result = make(backend, second).fit(
        data(2 * batch), data(5), epochs=3, global_batch_size=batch, resume_from=checkpoints.find(backend)
    )
    assert result.steps == 6
    assert equal(whole, second)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_an_own_loop_goes_on_bit_for_bit(backend, tmp_path, stop):
    folder = backend.broadcast_object(str(tmp_path))

    def run(steps, until, checkpoints):
        model = net(nn.BatchNorm1d)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        replica = backend.replicate(model, optimizer)
        loader = backend.loader(data(6 * backend.world_size), batch_size=3, shuffle=True)
        state = hvdtrain.LoopState(backend, replica, schedule=schedule, loader=loader)
        x = torch.ones(2, 4)
        with OwnRandomNumbers(backend):
            assert state.load(checkpoints, lambda model: model(x).sum()) == steps
            while loader.epoch < 3:
                for x, y in loader:
                    replica.backward(nn.functional.cross_entropy(replica.model(x), y), samples=len(x))
                    replica.step()
                    schedule.step()
                    steps += 1
                    if steps == until:
                        state.save(checkpoints, steps)
                        return model
        return model

    whole = run(0, 99, hvdtrain.Checkpoints(f"{folder}/none"))
    checkpoints = hvdtrain.Checkpoints(f"{folder}/parts")
    run(0, stop, checkpoints)
    assert equal(run(stop, 99, checkpoints), whole)


def test_a_state_of_another_number_of_ranks_goes_on(backend, reference, tmp_path):
    folder = backend.broadcast_object(str(tmp_path))
    checkpoints = hvdtrain.Checkpoints(folder)
    if backend.rank == 0:
        make(reference, net(), checkpoints=checkpoints).fit(data(), epochs=2, global_batch_size=4, max_steps=3)
    backend.barrier()
    result = make(backend, net()).fit(data(), epochs=2, global_batch_size=4, resume_from=checkpoints.find(backend))
    assert (result.steps, result.samples) == (12, 2 * 22 - 12)


class Measured:
    """A task that reports on each rank what it is told to."""

    def __init__(self, report):
        self.report = report

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def metrics(self, model, batch):
        return {"loss": self.loss(model, batch), **self.report(batch[0])}


def evaluate(backend, report, length=22):
    model = nn.Linear(4, 3)
    trainer = make(backend, model, task=Measured(report))
    return trainer.evaluate(data(length), batch_size=3)


@pytest.mark.parametrize("length", [1, 2, 22])
@pytest.mark.parametrize(
    "report",
    [lambda x: float(x.mean()), lambda x: x.double().mean(), lambda x: np.float64(x.mean())],
    ids=["float", "tensor", "numpy"],
)
def test_a_metric_of_any_type_is_the_mean_over_all_samples(backend, report, length):
    found = evaluate(backend, lambda x: {"it": report(x), "count": len(x) > 0}, length)
    assert found["it"] == pytest.approx(float(data(length).tensors[0].double().mean()), abs=1e-6)
    assert found["count"] == 1


@pytest.mark.parametrize("length", [1, 22])
@pytest.mark.parametrize("culprit", [0, -1])
@pytest.mark.parametrize(
    ("report", "message"),
    [
        (lambda x: {"it": torch.zeros(3)}, r"metric 'it' has shape \(3,\)"),
        (lambda x: {"it": "bad"}, "metric 'it' is a str"),
    ],
    ids=["vector", "text"],
)
def test_what_cannot_be_averaged_on_some_rank_is_refused_on_every_rank(backend, report, message, culprit, length):
    guilty = culprit % backend.world_size

    def mine(x):
        return report(x) if backend.rank == guilty else {"it": 1.0}

    if length <= guilty:  # it has no sample to report on
        assert evaluate(backend, mine, length)["it"] == 1.0
        return
    with pytest.raises(ConfigError, match=rf"{message}.*\(on rank {guilty}\)"):
        evaluate(backend, mine, length)


def test_ranks_with_different_metrics_are_refused_on_every_rank(backend):
    def mine(x):
        return {"it": 1.0} if backend.rank == 0 else {"other": 1.0}

    assert evaluate(backend, mine, 1)["it"] == 1.0  # only rank 0 has a sample
    if backend.world_size == 1:
        return
    with pytest.raises(ConfigError, match="rank 0 it, loss; rank 1 loss, other"):
        evaluate(backend, mine)


def test_a_missing_loss_is_refused_on_every_rank_also_without_samples(backend):
    class Lossless(Measured):
        def metrics(self, model, batch):
            return {"accuracy": 1.0}

    trainer = make(backend, nn.Linear(4, 3), task=Lossless(None))
    with pytest.raises(ConfigError, match=r"lack 'loss'.*they are: accuracy \(on rank 0\)"):
        trainer.evaluate(data(1))


def test_all_ranks_assemble_again_and_again(backend):
    for number in range(5):
        backend.assemble(f"meeting {number}")


class Failing(hvdtrain.AsyncCheckpoints):
    """Its disk has a fault, which shows while training goes on."""

    def write(self, content, last=""):
        raise CheckpointError("the disk has a fault")


def test_what_fails_beside_the_training_fails_it_on_every_rank(backend, tmp_path):
    checkpoints = Failing(backend.broadcast_object(str(tmp_path)))
    trainer = make(backend, net(), checkpoints=checkpoints, checkpoint_every=2, log_every=1)
    with pytest.raises(CheckpointError, match="the disk has a fault"):
        trainer.fit(data(40), epochs=1000, global_batch_size=4)
    assert trainer.position.steps in (2, 3, 4)  # raised at the next exchange, or else at the next checkpoint
    everyone = backend.all_gather_object(trainer.position.steps)
    assert everyone == [trainer.position.steps] * backend.world_size


def test_checkpoints_that_are_written_beside_are_those_that_are_written_at_once(backend, tmp_path):
    folder = backend.broadcast_object(str(tmp_path))
    models = []
    for kind in (hvdtrain.Checkpoints, hvdtrain.AsyncCheckpoints):
        make(backend, net(), checkpoints=kind(f"{folder}/{kind.__name__}"), checkpoint_every=1).fit(
            data(), epochs=2, global_batch_size=4, max_steps=7
        )
        model = net()
        checkpoints = kind(f"{folder}/{kind.__name__}")
        result = make(backend, model).fit(data(), epochs=2, global_batch_size=4, resume_from=checkpoints.find(backend))
        assert result.steps == 12
        models.append(model)
    assert equal(*models)

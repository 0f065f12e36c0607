"""Every torch schedule: stepped by steps, epochs or evaluations, and the same learning rates after a resume at any moment."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as S
from torch.optim.swa_utils import SWALR

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import CheckpointError, ConfigError
from hvdtrain.training.checkpoint import Checkpoints
from hvdtrain.training.schedules import Pacemaker, describe

EPOCHS, STEPS = 4, 12  # three steps an epoch
STOPS = {"step": (1, 2, 3, 4, 6, 8, 9, 11), "epoch": (3, 5, 6, 9)}  # before, at and after every milestone below


class Triangle:
    """A callable with a state of its own."""

    def __init__(self):
        self.calls = 0

    def __call__(self, step):
        self.calls += 1
        return 1.0 / (self.calls + step)


class Gradual(S.LRScheduler):
    """A user's own: warm-up that holds the schedule which follows, and a table with integers as keys."""

    def __init__(self, optimizer, after):
        self.after, self.seen, self.bend = after, Counter(), lambda x: x**2
        super().__init__(optimizer)

    def get_lr(self):
        self.seen[self.last_epoch % 3] += 1
        return [base * self.bend(self.last_epoch / 4 + 0.1) for base in self.base_lrs]

    def step(self):
        if self.last_epoch < 3:
            super().step()
        else:
            self.after.step()


def warm(o):
    return S.LinearLR(o, 0.1, total_iters=3)


SCHEDULES = {
    "LambdaLR": lambda o: S.LambdaLR(o, lambda t: 0.9**t),
    "LambdaLR with an object": lambda o: S.LambdaLR(o, Triangle()),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda t: 0.9 if t % 2 else 0.8),
    "StepLR": lambda o: S.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [1, 3, 3, 8], 0.5),
    "ConstantLR": lambda o: S.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: S.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: S.PolynomialLR(o, 4, 2.0),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 4),
    "CyclicLR": lambda o: S.CyclicLR(o, 0.01, 0.1, 2, 3, mode="triangular2"),
    "CyclicLR with a function": lambda o: S.CyclicLR(o, 0.01, 0.1, 2, scale_fn=lambda x: 1 / x, scale_mode="cycle"),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 0.5, total_steps=STEPS + 1),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 2, 2),
    "SWALR": lambda o: SWALR(o, 0.01, anneal_epochs=4),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=10.0, cooldown=1),
    "SequentialLR": lambda o: S.SequentialLR(o, [warm(o), S.MultiStepLR(o, [2, 4], 0.5), S.ExponentialLR(o, 0.9)], [3, 8]),
    "ChainedScheduler": lambda o: S.ChainedScheduler([warm(o), S.MultiStepLR(o, [2, 4], 0.5)]),
    "sequential in chained": lambda o: S.ChainedScheduler(
        [S.SequentialLR(o, [warm(o), S.MultiStepLR(o, [1, 3], 0.5)], [3]), S.StepLR(o, 2, 0.5)]
    ),
    "chained in sequential": lambda o: S.SequentialLR(
        o, [S.ChainedScheduler([S.ConstantLR(o, 0.5, 2), S.MultiStepLR(o, [1, 2], 0.5)]), S.StepLR(o, 2, 0.5)], [3]
    ),
    "a user's own": lambda o: Gradual(o, S.MultiStepLR(o, [2, 3], 0.5)),
}  # fmt: skip


def data():
    generator = torch.Generator().manual_seed(3)
    return ArrayDataset(torch.randn(11, 4, generator=generator), torch.randint(0, 3, (11,), generator=generator))


def trainer(alone, schedule, interval, log, checkpoints, checkpoint_every=0):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.3}], lr=0.1, momentum=0.9)
    return model, hvdtrain.Trainer(
        alone,
        model,
        optimizer,
        loss=nn.functional.cross_entropy,
        schedule=schedule(optimizer),
        schedule_interval=interval,
        logger=log,
        log_every=1,
        checkpoints=checkpoints,
        checkpoint_every=checkpoint_every,
    )


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch):
    """Hundreds of small checkpoints: whether they outlive a power cut is not the question here."""
    monkeypatch.setattr("hvdtrain.training.checkpoint_files.flush", lambda path: None)


def fit(one, name, **more):
    evaluated = data() if name == "ReduceLROnPlateau" else None
    return one.fit(data(), evaluated, epochs=EPOCHS, global_batch_size=4, **more)


@pytest.mark.filterwarnings("ignore:Detected call of")  # torch's, of schedules that are stepped inside others
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_run_has_the_learning_rates_of_the_uninterrupted_one(tmp_path, alone, records, name, interval):
    whole = records()
    model, uninterrupted = trainer(alone, SCHEDULES[name], interval, whole, Checkpoints(tmp_path, keep=99), 1)
    fit(uninterrupted, name)
    rates = [record.lr for record in whole.steps]
    assert len(rates) == STEPS
    assert len(set(rates)) > 1, "the schedule was never stepped"
    for stop in STOPS[interval]:
        rest = records()
        other, second = trainer(alone, SCHEDULES[name], interval, rest, None)
        fit(second, name, resume_from=tmp_path / f"step-{stop:08d}")
        assert [record.lr for record in rest.steps] == rates[stop:], f"resumed after step {stop}"
        assert torch.equal(other.weight, model.weight), f"resumed after step {stop}"


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", ["StepLR", "ReduceLROnPlateau"])
@pytest.mark.parametrize("stop", [1, 3, 5, 7])
def test_a_run_that_ended_early_goes_on_as_if_it_had_not(tmp_path, alone, records, name, interval, stop):
    whole, rest = records(), records()
    _, uninterrupted = trainer(alone, SCHEDULES[name], interval, whole, None)
    fit(uninterrupted, name)
    checkpoints = Checkpoints(tmp_path)
    _, first = trainer(alone, SCHEDULES[name], interval, None, checkpoints)
    fit(first, name, max_steps=stop)
    _, second = trainer(alone, SCHEDULES[name], interval, rest, None)
    fit(second, name, resume_from=checkpoints.latest())
    assert [record.lr for record in rest.steps] == [record.lr for record in whole.steps][stop:]


def test_what_torchs_sequential_cannot_go_on_to_is_refused():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    inner = S.ChainedScheduler([S.ConstantLR(optimizer), S.StepLR(optimizer, 1)])
    schedule = S.ChainedScheduler([S.SequentialLR(optimizer, [warm(optimizer), inner], [1])])
    with pytest.raises(ConfigError, match="SequentialLR cannot go on to a ChainedScheduler"):
        Pacemaker(schedule, "step")


def test_a_plateau_is_stepped_with_the_loss_of_every_regular_evaluation(alone, records):
    seen = []

    class Watched(S.ReduceLROnPlateau):
        def step(self, metrics):
            seen.append(metrics)
            super().step(metrics)

    log = records()
    _, one = trainer(alone, Watched, "step", log, None)
    one.fit(data(), data(), epochs=5, global_batch_size=4, eval_every=2)
    assert [record.epoch for record in log.evaluations] == [2, 4, 5]
    assert seen == [record.metrics["loss"] for record in log.evaluations[:2]]


def test_a_plateau_without_evaluation_data_is_refused(alone):
    for interval in ("step", "epoch"):
        _, one = trainer(alone, S.ReduceLROnPlateau, interval, None, None)
        with pytest.raises(ConfigError, match="no evaluation data, so it would never be stepped"):
            one.fit(data(), epochs=2, global_batch_size=4)


def test_a_plateau_that_can_change_nothing_is_said(alone, caplog):
    with caplog.at_level(logging.WARNING):
        trainer(alone, lambda o: S.ReduceLROnPlateau(o, eps=0.5), "epoch", None, None)
    assert "will never change the learning rate 0.3" in caplog.text


@pytest.mark.parametrize("around", ["sequential", "chained", "nested"])
def test_a_plateau_inside_another_schedule_is_refused(around):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    schedule = S.SequentialLR(optimizer, [warm(optimizer), S.StepLR(optimizer, 1)], [2])
    if around == "chained":
        schedule = S.ChainedScheduler([warm(optimizer), S.StepLR(optimizer, 1)])
    plateau = S.ReduceLROnPlateau(optimizer)  # torch refuses it as an argument, from some version on
    schedule._schedulers = [*schedule._schedulers[:1], plateau]
    if around == "nested":
        schedule = S.ChainedScheduler([schedule])
    with pytest.raises(ConfigError, match="holds a ReduceLROnPlateau"):
        Pacemaker(schedule, "epoch")


class Needy:
    def step(self, epoch):
        pass


class Lossy:
    def step(self, metrics):
        pass


@pytest.mark.parametrize(
    ("schedule", "message"),
    [(Needy(), "Needy.step needs epoch"), (object(), "needs a method step"), (Lossy(), None)],
    ids=["epoch", "nothing", "metrics"],
)
def test_a_schedule_of_another_shape_is_stepped_right_or_refused(schedule, message):
    if message is None:
        assert Pacemaker(schedule, "step").needs_evaluation
        return
    with pytest.raises(ConfigError, match=message):
        Pacemaker(schedule, "step")


class Curve:
    def __call__(self, step):
        return 1.0


class Unsavable(S.LRScheduler):
    def __init__(self, optimizer):
        self.points = iter([1.0, 0.5])
        super().__init__(optimizer)

    def get_lr(self):
        return self.base_lrs


def test_a_schedule_that_cannot_be_saved_is_refused_before_training_and_serves_without_checkpoints(tmp_path, alone):
    with pytest.raises(ConfigError, match=r"the schedule Unsavable\['points'\] cannot be saved.*list_iterator"):
        trainer(alone, Unsavable, "step", None, Checkpoints(tmp_path))
    with pytest.raises(ConfigError, match="give it state_dict and load_state_dict"):
        trainer(alone, lambda o: Lossy(), "step", None, Checkpoints(tmp_path))
    _, one = trainer(alone, Unsavable, "step", None, None)
    one.fit(data(), epochs=1, global_batch_size=4)


def test_another_schedule_or_optimizer_than_the_checkpoints_is_refused(tmp_path, alone, caplog):
    checkpoints = Checkpoints(tmp_path)
    _, one = trainer(alone, SCHEDULES["SequentialLR"], "step", None, checkpoints)
    one.fit(data(), epochs=1, global_batch_size=4)
    _, other = trainer(alone, SCHEDULES["sequential in chained"], "step", None, None)
    with pytest.raises(
        CheckpointError, match=r"with schedule SequentialLR\(LinearLR, MultiStepLR, ExponentialLR\), and"
    ):
        other.fit(data(), epochs=2, global_batch_size=4, resume_from=checkpoints.latest())
    model = nn.Linear(4, 3)
    adam = hvdtrain.Trainer(alone, model, torch.optim.Adam(model.parameters()), loss=nn.functional.cross_entropy)
    with pytest.raises(CheckpointError, match="written with optimizer SGD, and this run has Adam"):
        adam.fit(data(), epochs=2, global_batch_size=4, resume_from=checkpoints.latest())


def test_a_run_that_resumes_without_its_schedule_is_told(tmp_path, alone, caplog):
    checkpoints = Checkpoints(tmp_path)
    _, one = trainer(alone, SCHEDULES["StepLR"], "step", None, checkpoints)
    one.fit(data(), epochs=1, global_batch_size=4)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}], lr=0.1, momentum=0.9)
    bare = hvdtrain.Trainer(alone, model, optimizer, loss=nn.functional.cross_entropy)
    bare.fit(data(), epochs=2, global_batch_size=4, resume_from=checkpoints.latest())
    assert "was written with schedule StepLR, and this run has none: what was saved of it is left out" in caplog.text


def test_a_schedule_is_described_with_those_inside():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    assert describe(SCHEDULES["ChainedScheduler"](optimizer)) == "ChainedScheduler(LinearLR, MultiStepLR)"


def test_a_schedule_over_another_optimizer_is_refused(alone):
    model = nn.Linear(4, 3)
    ours, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    for schedule in (S.StepLR(other, 1), S.ChainedScheduler([S.StepLR(other, 1)])):
        with pytest.raises(ConfigError, match=f"{type(schedule).__name__} is over another optimizer"):
            hvdtrain.Trainer(alone, model, ours, loss=nn.functional.cross_entropy, schedule=schedule)
    inside = hvdtrain.ShardedOptimizer(ours, alone)  # shares its groups with the one that it wraps
    hvdtrain.Trainer(alone, model, inside, loss=nn.functional.cross_entropy, schedule=S.StepLR(ours, 1))

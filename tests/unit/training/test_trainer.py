"""The loop: what it evaluates, logs and saves when, and what it takes from a task."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import CheckpointError, ConfigError
from hvdtrain.training.checkpoint import Checkpoints

X = torch.linspace(-1, 1, 44).reshape(11, 4)
DATA = ArrayDataset(X, torch.arange(11) % 3)


def make(alone, model=None, **options):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if "task" not in options:
        options["loss"] = nn.functional.cross_entropy
    if "schedule" in options:
        options["schedule"] = options["schedule"](optimizer)
    return model, hvdtrain.Trainer(alone, model, optimizer, **options)


def equal(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("limit", [{"epochs": 0}, {"epochs": 3, "max_steps": 0}])
def test_no_epochs_or_steps_evaluate_and_return(alone, records, limit):
    log = records()
    model, trainer = make(alone, logger=log)
    before = [p.detach().clone() for p in model.parameters()]
    result = trainer.fit(DATA, DATA, global_batch_size=4, **limit)
    assert (result.epochs, result.steps, result.samples) == (0, 0, 0)
    assert result.eval_metrics["loss"] > 0
    assert [record.step for record in log.evaluations] == [0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert make(alone)[1].fit(DATA, global_batch_size=4, **limit).eval_metrics == {}


def test_a_negative_number_of_epochs_is_refused(alone):
    with pytest.raises(ConfigError, match="epochs must be 0 or more, got -1"):
        make(alone)[1].fit(DATA, epochs=-1, global_batch_size=4)


def test_a_record_has_the_learning_rate_of_its_step(alone, records):
    used, log = [], records()

    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            used.append(float(self.param_groups[0]["lr"]))
            return super().step(closure)

    for lr in (0.1, torch.tensor(0.1)):
        model = nn.Linear(4, 3)
        optimizer = Watching(model.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        trainer = hvdtrain.Trainer(
            alone, model, optimizer, loss=nn.functional.cross_entropy, schedule=schedule, logger=log, log_every=1
        )
        trainer.fit(DATA, epochs=2, global_batch_size=4)
    assert [record.lr for record in log.steps] == used
    assert used[:2] == [0.1, 0.05]


@pytest.mark.parametrize(
    ("batch", "stop"), [*[(4, stop) for stop in range(1, 9)], *[(11, stop) for stop in range(1, 5)]]
)
def test_a_run_that_is_killed_at_any_checkpoint_ends_as_if_it_had_not_been(tmp_path, alone, records, stop, batch):
    logs = [records(), records()]
    whole, trainer = make(alone, checkpoints=Checkpoints(tmp_path, keep=99), checkpoint_every=1, logger=logs[0])

    class Killed(BaseException):
        pass

    class Killer:
        def on_save(self, trainer, event):
            saved.append(event.path)
            if len(saved) == stop:  # the first `stop` checkpoints of the run, those between steps included
                raise Killed

    saved = []
    expected = trainer.fit(DATA, DATA, epochs=2, global_batch_size=batch)
    _, first = make(alone, checkpoints=Checkpoints(tmp_path / "cut", keep=99), checkpoint_every=1, callbacks=[Killer()])
    with pytest.raises(Killed):
        first.fit(DATA, DATA, epochs=2, global_batch_size=batch)
    other, second = make(alone, logger=logs[1])
    result = second.fit(DATA, DATA, epochs=2, global_batch_size=batch, resume_from=saved[-1])
    assert equal(whole, other)
    assert (result.epochs, result.steps) == (expected.epochs, expected.steps)
    assert result.eval_metrics == expected.eval_metrics
    assert result.train_loss == pytest.approx(expected.train_loss, abs=1e-12)
    assert result.resumed_from == saved[-1]
    missed = len(logs[1].evaluations)
    assert logs[1].evaluations == logs[0].evaluations[2 - missed :]


def test_a_finished_run_trains_and_evaluates_nothing_again(tmp_path, alone, records):
    checkpoints, log = Checkpoints(tmp_path), records()
    expected = make(alone, checkpoints=checkpoints)[1].fit(DATA, DATA, epochs=1, global_batch_size=4)
    result = make(alone, logger=log)[1].fit(
        DATA, DATA, epochs=1, global_batch_size=4, resume_from=checkpoints.find(alone)
    )
    assert (result.samples, result.steps) == (0, 3)
    assert result.eval_metrics == expected.eval_metrics
    assert log.evaluations == []


def test_two_calls_of_fit_are_one(alone):
    whole, trainer = make(alone)
    trainer.fit(DATA, epochs=3, global_batch_size=4)
    parts, trainer = make(alone)
    for epochs in (1, 2, 3):
        trainer.fit(DATA, epochs=epochs, global_batch_size=4)
    assert equal(whole, parts)


@pytest.mark.parametrize("how", ["called again", "resumed"])
@pytest.mark.parametrize(
    ("later", "total"),
    [({"global_batch_size": 11}, 8), ({"global_batch_size": 4, "last_batch": "merge"}, 10), ({}, 12)],
)
def test_epochs_are_trained_to_their_end_when_the_batch_size_changes(tmp_path, alone, records, how, later, total):
    log, checkpoints = records(), Checkpoints(tmp_path)
    _, trainer = make(alone, logger=log, log_every=1, checkpoints=checkpoints)
    trainer.fit(DATA, epochs=2, global_batch_size=4)
    log.steps.clear()
    if how == "resumed":
        _, trainer = make(alone, logger=log, log_every=1)
        later = {**later, "resume_from": checkpoints.find(alone)}
    result = trainer.fit(DATA, epochs=4, **({"global_batch_size": 4} | later))
    assert (result.epochs, result.steps) == (4, total)
    assert {record.total_steps for record in log.steps} == {total}


def test_a_result_is_of_its_own_call(alone):
    _, trainer = make(alone)
    results = [trainer.fit(DATA, epochs=epochs, global_batch_size=4) for epochs in (1, 3, 3)]
    assert [result.samples for result in results] == [11, 22, 0]
    assert results[2].train_seconds == 0


class Summed:
    """As `Mean`, but for what its loss is."""

    loss_reduction = "sum"

    def loss(self, model, batch):
        return nn.functional.mse_loss(model(batch[0]), torch.zeros(len(batch[0]), 3), reduction=self.loss_reduction)

    def metrics(self, model, batch):
        return {"loss": float(self.loss(model, batch)) / len(batch[0])}


class Mean(Summed):
    loss_reduction = "mean"

    def collate(self, samples):
        self.collated = True
        return torch.stack([x for x, _ in samples]), None


def test_a_task_that_is_given_later_is_learned_as_if_it_had_been_the_first(alone):
    later, task = Mean(), Mean()
    models = []
    for first, second in ((task, None), (Summed(), later)):
        model, trainer = make(alone, model=nn.Linear(4, 3, dtype=torch.float32), task=first)
        with torch.no_grad():
            model.weight.copy_(torch.eye(3, 4))
            model.bias.zero_()
        if second is not None:
            trainer.task = second
        trainer.fit(DATA, epochs=2, global_batch_size=4)
        assert trainer.task is (second or first)
        models.append(model)
    assert equal(*models)
    assert later.collated


def test_a_task_that_cannot_be_learned_leaves_the_one_before(alone):
    _, trainer = make(alone, task=(task := Mean()))
    broken = Mean()
    broken.loss_reduction = "max"
    with pytest.raises(ConfigError, match="loss_reduction must be 'mean' or 'sum', got 'max'"):
        trainer.task = broken
    assert trainer.task is task
    assert trainer.fit(DATA, epochs=1, global_batch_size=4).steps == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": -1}, "epochs must be 0 or more, got -1"),
        ({"epochs": 1, "eval_every": 0}, "eval_every must be 1 or more, got 0"),
        ({"epochs": 1, "max_steps": -1}, "max_steps must be 0 or more, got -1"),
        ({"epochs": 1, "eval_batch_size": 0}, "eval_batch_size must be 1 or more, got 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_anything_is_trained(alone, arguments, message):
    model, trainer = make(alone)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ConfigError, match=message):
        trainer.fit(DATA, DATA, global_batch_size=4, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_one_process_draws_what_was_seeded(alone):
    _model, trainer = make(alone)
    torch.manual_seed(7)
    trainer.fit(DATA, epochs=1, global_batch_size=11)
    found = torch.rand(3)
    torch.manual_seed(7)
    nn.functional.dropout(torch.ones(11, 8), 0.5)
    assert torch.equal(found, torch.rand(3))


def test_another_seed_or_batch_size_than_the_checkpoints_is_told(tmp_path, alone, caplog):
    checkpoints = Checkpoints(tmp_path)
    make(alone, checkpoints=checkpoints)[1].fit(DATA, epochs=2, global_batch_size=4, max_steps=1)
    with pytest.raises(
        CheckpointError, match="in the middle of an epoch: cannot continue after 4 of 11 samples: no global batch of 3"
    ):
        make(alone, seed=5)[1].fit(DATA, epochs=1, global_batch_size=3, resume_from=checkpoints.find(alone))
    assert "was written with --seed 0, this run has 5" in caplog.text


def test_an_own_loops_checkpoint_is_refused_by_the_trainer(tmp_path, alone):
    _model, trainer = make(alone)
    path = hvdtrain.LoopState(alone, trainer.replica).save(Checkpoints(tmp_path), 3)
    with pytest.raises(CheckpointError, match="written by another loop: it has no 'position'"):
        make(alone)[1].fit(DATA, global_batch_size=4, resume_from=path)


class Padded:
    """A task whose samples are of different lengths, so that only its own collate makes batches of them."""

    def loss(self, model, batch):
        return model(batch["x"]).square().mean()

    def metrics(self, model, batch):
        return {"loss": self.loss(model, batch), "padded": float(batch["x"].eq(0).double().sum(1).mean())}

    def collate(self, samples):
        return {"x": torch.stack([nn.functional.pad(x, (0, 4 - len(x))) for x in samples])}


class Ragged(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return torch.ones(1 + i % 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_tasks_collate_makes_the_batches_unless_another_is_given(alone, workers):
    _, trainer = make(alone, nn.Linear(4, 1), task=Padded(), workers=workers)
    result = trainer.fit(Ragged(), Ragged(), global_batch_size=3)
    assert result.eval_metrics["padded"] == pytest.approx((3 + 2 + 1 + 0 + 3 + 2) / 6)
    _, trainer = make(alone, nn.Linear(4, 1), task=Padded(), collate=lambda samples: {"x": torch.ones(len(samples), 4)})
    assert trainer.fit(Ragged(), Ragged(), global_batch_size=3).eval_metrics["padded"] == 0


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda output, y: 3.0, "must be a tensor, the mean over the batch's samples; got a float"),
        (lambda output, y: None, "got a NoneType"),
        (lambda output, y: output.sum(1), r"must be a scalar.*got shape \(4,\)"),
        (lambda output, y: output.sum().to(torch.complex64), "must be a real number.*complex64"),
        (lambda output, y: output.argmax(), "must be a real number.*int64"),
    ],
    ids=range(5),
)
def test_what_is_no_loss_is_refused_before_it_goes_further(alone, loss, message):
    model = nn.Linear(4, 3)
    trainer = hvdtrain.Trainer(alone, model, torch.optim.SGD(model.parameters()), loss=loss)
    with pytest.raises(ConfigError, match=message):
        trainer.fit(DATA, global_batch_size=4)


def test_a_compiled_model_is_trained_saved_and_resumed_as_a_plain_one(tmp_path, alone):
    def net():
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    checkpoints = Checkpoints(tmp_path)
    torch.manual_seed(1)
    one, two = net(), net()
    two.load_state_dict(one.state_dict())
    whole, trainer = make(alone, one)
    trainer.fit(DATA, DATA, epochs=2, global_batch_size=4)
    compiled, first = make(alone, torch.compile(two, backend="eager"), checkpoints=checkpoints)
    first.fit(DATA, DATA, epochs=1, global_batch_size=4)
    other, second = make(alone, net())
    second.fit(DATA, DATA, epochs=2, global_batch_size=4, resume_from=checkpoints.find(alone))
    again, third = make(alone, torch.compile(net(), backend="eager"))
    third.fit(DATA, DATA, epochs=2, global_batch_size=4, resume_from=checkpoints.find(alone))
    assert equal(other, whole)
    assert equal(again, whole)
    assert first.replica.module is compiled

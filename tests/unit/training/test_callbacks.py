"""Callbacks hear what happens in the order in which it does, and go on with the run; what is none is refused."""

from __future__ import annotations

import math
import os
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import CheckpointError, ConfigError
from hvdtrain.training.callbacks.goal import Goal
from hvdtrain.training.callbacks.weights import weights_of

BATCH, STEPS = 4, 3


def data(length=BATCH * STEPS):
    return ArrayDataset(torch.linspace(-1, 1, 2 * length).reshape(length, 2), torch.arange(length) % 3)


class Task:
    """A classifier whose evaluation reports, under "it", what it is told to."""

    def __init__(self, values=(0.0,) * 99):
        self._values = list(values)
        self.weights = []  # of each evaluation

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def metrics(self, model, batch):
        self.weights.append(model.weight.detach().clone())
        return {"loss": self.loss(model, batch), "it": self._values[len(self.weights) - 1]}


def trainer_of(alone, callbacks=(), task=None, seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return hvdtrain.Trainer(alone, model, optimizer, task=task or Task(), callbacks=callbacks, **options)


def fit(trainer, epochs=2, **options):
    return trainer.fit(data(), data(6), epochs=epochs, global_batch_size=BATCH, eval_batch_size=6, **options)


class Diary:
    def __init__(self, said=None):
        self.said = [] if said is None else said

    def on_start(self, trainer):
        self.said.append("start")

    def on_step(self, trainer, event):
        self.said.append(f"step {event.step} of {event.samples}{' skipped' * event.skipped}")

    def on_epoch(self, trainer, event):
        self.said.append(f"epoch {event.epoch}{' without a loss' * math.isnan(event.train_loss)}")

    def on_evaluation(self, trainer, event):
        self.said.append(f"evaluation {event.step} {sorted(event.metrics)}{' at the end' * (not event.regular)}")

    def on_save(self, trainer, event):
        self.said.append(f"save {event.path[-2:]}")

    @contextmanager
    def inference(self, trainer):
        self.said.append("in")
        yield
        self.said.append("out")


def test_events_come_in_the_order_of_what_happens(alone, tmp_path):
    diary = Diary()
    trainer = trainer_of(alone, [diary], checkpoints=hvdtrain.Checkpoints(tmp_path), checkpoint_every=2)
    fit(trainer, max_steps=4)
    assert diary.said == [
        "start", "step 1 of 4", "step 2 of 4", "save 02", "step 3 of 4", "epoch 1", "in", "out",
        "evaluation 3 ['it', 'loss']", "save 03", "step 4 of 4", "save 04", "in", "out",
        "evaluation 4 ['it', 'loss'] at the end", "save 04",
    ]  # fmt: skip
    trainer.evaluate(data())
    trainer.predict(data())
    assert diary.said[-4:] == ["in", "out", "in", "out"]


def test_a_skipped_step_is_told_as_one(alone):
    class Infinite(Task):
        def loss(self, model, batch):
            return super().loss(model, batch) * math.inf

    diary = Diary()
    trainer_of(alone, [diary], Infinite(), on_nan="skip").fit(data(), epochs=1, global_batch_size=12)
    assert diary.said == ["start", "step 1 of 12 skipped", "epoch 1 without a loss"]


class Typo:
    def on_evalution(self, trainer, event):
        pass


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([object()], "the callback object has no method that is ever called; a callback has one or more of on_start"),
        ([Typo()], "the callback Typo has on_evalution, which is never called"),
        ([Diary], r"holds the class Diary; give an object of it, Diary\(...\)"),
        (Diary(), "callbacks must be a list of objects, got a Diary"),
        ([(twice := Diary()), twice], "the same Diary twice, which would be told everything twice"),
    ],
    ids=["none", "typo", "class", "no list", "twice"],
)
def test_what_is_no_callback_is_refused(alone, callbacks, message):
    with pytest.raises(ConfigError, match=message):
        trainer_of(alone, callbacks)


class Counting:
    def __init__(self, start=0, more=None):
        self.steps, self._more = start, more or {}

    def on_step(self, trainer, event):
        self.steps += 1

    def state_dict(self):
        return {"steps": self.steps, **self._more}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def test_states_are_saved_and_go_on_each_with_its_own(alone, tmp_path):
    checkpoints = hvdtrain.Checkpoints(tmp_path)
    fit(trainer_of(alone, [Counting(), Counting(100)], checkpoints=checkpoints), epochs=1)
    again = [Counting(), Counting()]
    fit(trainer_of(alone, again), resume_from=checkpoints.find(alone))
    assert [one.steps for one in again] == [2 * STEPS, 100 + 2 * STEPS]


def test_a_callback_that_is_new_begins_anew_and_one_that_is_gone_is_left_out(alone, tmp_path, caplog):
    checkpoints = hvdtrain.Checkpoints(tmp_path)
    fit(trainer_of(alone, checkpoints=checkpoints), epochs=1)
    new = Counting()
    fit(trainer_of(alone, [new], checkpoints=checkpoints), resume_from=checkpoints.find(alone))
    assert new.steps == STEPS
    assert "holds nothing of the callback Counting, which begins anew" in caplog.text
    fit(trainer_of(alone), epochs=3, resume_from=checkpoints.find(alone))
    assert "what the checkpoint holds of a callback Counting is left out" in caplog.text


@dataclass
class Content:
    """Of a state: what comes back is of the running object's class."""

    steps: int = 0


class Elaborate(Counting):
    def state_dict(self):
        return {"steps": Content(self.steps)}

    def load_state_dict(self, state):
        self.steps = state["steps"].steps


def test_a_callback_with_an_elaborate_state_can_be_left_out_too(alone, tmp_path, caplog):
    checkpoints = hvdtrain.Checkpoints(tmp_path)
    fit(trainer_of(alone, [Elaborate()], checkpoints=checkpoints), epochs=1)
    fit(trainer_of(alone), resume_from=checkpoints.find(alone))
    assert "what the checkpoint holds of a callback Elaborate is left out" in caplog.text
    again = Elaborate()
    fit(trainer_of(alone, [again]), resume_from=checkpoints.find(alone))
    assert again.steps == 2 * STEPS


def test_what_is_no_context_manager_is_refused(alone):
    class Forgetful:
        def inference(self, trainer):
            pass

    with pytest.raises(
        ConfigError, match=r"Forgetful.inference must return a context manager, and returned a NoneType"
    ):
        fit(trainer_of(alone, [Forgetful()]))


def test_a_state_that_cannot_be_saved_is_refused_at_once(alone, tmp_path):
    odd = Counting(more={"odd": object()})
    with pytest.raises(
        ConfigError, match=r"the callback Counting\['odd'\] cannot be saved.*; or train without checkpoints"
    ):
        trainer_of(alone, [odd], checkpoints=hvdtrain.Checkpoints(tmp_path))
    trainer_of(alone, [odd])


class StopAt:
    def __init__(self, step):
        self._step = step

    def on_step(self, trainer, event):
        if event.step == self._step:
            trainer.stop("enough")


def test_a_run_is_ended_within_an_epoch_as_at_its_last_step(alone, tmp_path):
    checkpoints = hvdtrain.Checkpoints(tmp_path)
    result = fit(trainer_of(alone, [StopAt(2)], checkpoints=checkpoints, log_every=1))
    assert (result.steps, result.stopped, result.epochs) == (2, "enough", 0)
    assert result.eval_metrics
    assert checkpoints.find(alone).step == 2
    result = fit(trainer_of(alone), resume_from=checkpoints.find(alone))
    assert (result.steps, result.stopped) == (2 * STEPS, "")


def test_the_next_fit_of_a_trainer_that_was_stopped_goes_on(alone):
    trainer = trainer_of(alone, [StopAt(2)], log_every=1)
    assert fit(trainer).stopped == "enough"
    assert fit(trainer).steps == 2 * STEPS


# -- ready ones -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "values", "epochs"),
    [
        ({"patience": 2}, [3, 2, 2, 2, 1], 4),
        ({"patience": 1}, [3, 2, 1, 0, 0], 5),
        ({"patience": 1, "mode": "max"}, [3, 4, 4], 3),
        ({"patience": 2, "min_delta": 0.5}, [3, 2.8, 2.6, 1], 3),
        ({"patience": 2}, [math.nan, math.nan], 2),
        ({"patience": 9}, [1] * 7, 7),
    ],
    ids=range(6),
)
def test_early_stopping_ends_the_run_when_nothing_gets_better(alone, options, values, epochs):
    early = hvdtrain.EarlyStopping("it", **options)
    result = fit(trainer_of(alone, [early], Task(values)), epochs=7)
    assert result.epochs == epochs
    assert (result.stopped == "") == (epochs == 7)
    if epochs < 7:
        assert f"it has not been better than {early.best:g} in {early.waited} evaluations" == result.stopped


def test_a_run_that_was_stopped_early_does_not_go_on_unless_it_gets_more_patience(alone, tmp_path):
    checkpoints = hvdtrain.Checkpoints(tmp_path)
    first = fit(trainer_of(alone, [hvdtrain.EarlyStopping("it", patience=2)], checkpoints=checkpoints), epochs=9)
    assert first.epochs == 3
    saved = checkpoints.find(alone)
    again = fit(trainer_of(alone, [hvdtrain.EarlyStopping("it", patience=2)]), epochs=9, resume_from=saved)
    assert (again.epochs, again.samples, again.stopped) == (3, 0, first.stopped)
    assert again.eval_metrics == first.eval_metrics
    more = fit(trainer_of(alone, [hvdtrain.EarlyStopping("it", patience=4)]), epochs=9, resume_from=saved)
    assert more.epochs == 5


def test_an_evaluation_only_because_the_run_ended_does_not_use_up_patience(alone, tmp_path):
    checkpoints = hvdtrain.Checkpoints(tmp_path)
    early = hvdtrain.EarlyStopping("it", patience=2)
    fit(trainer_of(alone, [early], checkpoints=checkpoints), epochs=2, max_steps=STEPS + 1)
    assert early.waited == 0


def test_a_metric_that_is_not_there_is_named(alone):
    with pytest.raises(ConfigError, match="there is no metric 'f1'; the evaluation reports it, loss"):
        fit(trainer_of(alone, [hvdtrain.EarlyStopping("f1")]))


def test_values_of_another_metric_are_not_gone_on_with(alone, tmp_path, caplog):
    checkpoints = hvdtrain.Checkpoints(tmp_path / "all")

    def callbacks(metric, mode, folder):
        return hvdtrain.EarlyStopping(metric, mode=mode), hvdtrain.BestCheckpoint(tmp_path / folder, metric, mode=mode)

    fit(trainer_of(alone, callbacks("loss", "min", "a"), Task([0.1]), checkpoints=checkpoints), epochs=1)
    early, best = callbacks("it", "max", "b")
    fit(trainer_of(alone, [early, best], Task([0.25, 0.5])), epochs=3, resume_from=checkpoints.find(alone))
    assert (early.best, best.best, best.checkpoints.find(alone).step) == (0.5, 0.5, 3 * STEPS)
    assert "holds nothing of the callback EarlyStopping of it (max), which begins anew" in caplog.text


def test_in_another_order_each_goes_on_with_its_own(alone, tmp_path):
    checkpoints = hvdtrain.Checkpoints(tmp_path)
    first = [hvdtrain.EarlyStopping("loss"), hvdtrain.EarlyStopping("it", mode="max")]
    fit(trainer_of(alone, first, Task([0.1]), checkpoints=checkpoints), epochs=1)
    again = [hvdtrain.EarlyStopping("it", mode="max"), hvdtrain.EarlyStopping("loss")]
    fit(trainer_of(alone, again, Task([0.1])), epochs=1, resume_from=checkpoints.find(alone))
    assert [one.best for one in again] == [one.best for one in reversed(first)]


@pytest.mark.parametrize("folders", ["ab", "bb"], ids=["the run's", "another one's"])
def test_a_folder_of_other_checkpoints_is_refused_before_they_are_thinned_out(alone, tmp_path, folders):
    best = [hvdtrain.BestCheckpoint(tmp_path / name, "it") for name in folders]
    with pytest.raises(ConfigError, match="is the folder of other checkpoints of this run"):
        fit(trainer_of(alone, best, checkpoints=hvdtrain.Checkpoints(tmp_path / "a")))
    assert list(tmp_path.glob("*/step-*")) == []


def test_the_best_checkpoint_stays_in_its_folder_when_the_working_directory_changes(alone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    class Changing:
        def on_epoch(self, trainer, event):
            os.chdir(tmp_path / "elsewhere")

    best = hvdtrain.BestCheckpoint("best", "it")
    fit(trainer_of(alone, [Changing(), best], Task([2, 1])))
    assert best.checkpoints.find(alone).step == 2 * STEPS
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("arguments", [{"mode": "best"}, {"min_delta": -1}, {"min_delta": math.nan}])
def test_a_goal_that_cannot_be_is_refused(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        Goal("loss", **{"mode": "min", **arguments})


def test_the_best_checkpoint_stays_while_others_are_thinned_out(alone, tmp_path):
    best = hvdtrain.BestCheckpoint(tmp_path / "best", "it", mode="max")
    counting = Counting()
    checkpoints = hvdtrain.Checkpoints(tmp_path / "all", keep=2)
    trainer = trainer_of(alone, [best, counting], Task([1, 3, 2, 2, 2]), checkpoints=checkpoints)
    fit(trainer, epochs=5)
    assert (best.best, best.checkpoints.find(alone).step) == (3, 2 * STEPS)
    assert sorted(path.name[-2:] for path in (tmp_path / "all").glob("step-*")) == ["12", "15"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "best"]  # nothing was set aside


def test_a_run_that_goes_on_from_the_best_is_as_if_it_had_never_gone_further(alone, tmp_path):
    def callbacks():
        return [
            hvdtrain.BestCheckpoint(tmp_path / "best", "it", mode="max"),
            Counting(),
            hvdtrain.ExponentialMovingAverage(0.5),
        ]

    values = [1, 3, 2, 2]
    fit(trainer_of(alone, callbacks(), Task(values)), epochs=3)
    whole = trainer_of(alone, callbacks()[1:], Task(values))
    fit(whole, epochs=4)
    again = trainer_of(alone, mine := callbacks(), Task(values[2:]), seed=9)
    result = fit(again, epochs=4, resume_from=mine[0].checkpoints.find(alone))
    assert (result.epochs, mine[0].best, mine[1].steps) == (4, 3, 4 * STEPS)
    assert all(torch.equal(a, b) for a, b in zip(*(t.replica.module.parameters() for t in (whole, again)), strict=True))


def test_the_best_of_a_line_that_is_left_is_not_taken_for_this_ones(alone, tmp_path):
    def run(values, **options):
        best = hvdtrain.BestCheckpoint(tmp_path / "best", "it")
        checkpoints = hvdtrain.Checkpoints(tmp_path / "all")
        fit(trainer_of(alone, [best], Task(values), checkpoints=checkpoints), epochs=3, **options)
        return best

    run([3, 4, 1])
    best = run([7], resume_from=tmp_path / "all" / "step-00000006")
    assert (best.best, best.checkpoints.find(alone).step) == (7, 3 * STEPS)
    assert (tmp_path / "best.1" / "step-00000009").is_dir()


def test_a_new_run_sets_the_best_of_an_older_one_aside(alone, tmp_path):
    for _ in range(2):
        fit(trainer_of(alone, [hvdtrain.BestCheckpoint(tmp_path / "best")]), epochs=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "best.1"]


def averages(alone, decay, steps):
    """What the average should be after each step, computed by hand."""
    torch.manual_seed(0)
    seen = [nn.Linear(2, 3).weight.detach().double()]  # as `trainer_of` makes it

    class Watching:
        def on_step(self, trainer, event):
            seen.append(decay * seen[-1] + (1 - decay) * trainer.replica.module.weight.detach().double())

    trainer = trainer_of(alone, [Watching()])
    fit(trainer, max_steps=steps)
    return seen


def test_the_average_of_the_weights_is_evaluated_and_the_weights_come_back(alone):
    expected = averages(alone, 0.9, 2 * STEPS)
    plain = trainer_of(alone)
    fit(plain)
    task = Task()
    trainer = trainer_of(alone, [average := hvdtrain.ExponentialMovingAverage(0.9)], task)
    fit(trainer)
    assert all(
        torch.equal(a, b) for a, b in zip(*(t.replica.module.parameters() for t in (plain, trainer)), strict=True)
    )
    assert torch.allclose(task.weights[-1].double(), expected[-1], atol=1e-6)
    assert torch.allclose(task.weights[0].double(), expected[STEPS], atol=1e-6)
    with average.applied(trainer):
        assert torch.equal(trainer.replica.module.weight, task.weights[-1])
    assert torch.equal(trainer.replica.module.weight, plain.replica.module.weight)


def test_the_average_can_be_kept_out_of_evaluations(alone):
    task = Task()
    trainer = trainer_of(alone, [hvdtrain.ExponentialMovingAverage(0.9, evaluate=False)], task)
    fit(trainer)
    assert torch.equal(task.weights[-1], trainer.replica.module.weight)


def test_the_average_goes_on_exactly(alone, tmp_path):
    checkpoints = hvdtrain.Checkpoints(tmp_path)
    whole, parts = Task(), Task()
    fit(trainer_of(alone, [hvdtrain.ExponentialMovingAverage(0.9)], whole))
    fit(trainer_of(alone, [hvdtrain.ExponentialMovingAverage(0.9)], checkpoints=checkpoints), max_steps=4)
    again = trainer_of(alone, [hvdtrain.ExponentialMovingAverage(0.9)], parts, seed=5)
    fit(again, resume_from=checkpoints.find(alone))
    assert torch.equal(whole.weights[-1], parts.weights[-1])


class Tied(nn.Module):
    """Uses one parameter under two names, and has running statistics."""

    def __init__(self, width=2):
        super().__init__()
        self.norm, self.first = nn.BatchNorm1d(2), nn.Linear(2, width)
        self.second = nn.Linear(width, width)
        self.third = nn.Linear(width, width)
        self.third.weight = self.second.weight

    def forward(self, x):
        return self.third(self.second(self.first(self.norm(x))))

    @property
    def weight(self):
        return torch.cat([self.norm.running_mean, self.second.weight.flatten()])


def tied(alone, task, width=3, **options):
    torch.manual_seed(0)
    model = Tied(width)
    return hvdtrain.Trainer(alone, model, torch.optim.SGD(model.parameters(), lr=0.1), task=task, **options)


def test_buffers_are_averaged_and_shared_parameters_once(alone):
    plain, task = Task(), Task()
    fit(trainer := tied(alone, plain))
    fit(averaged := tied(alone, task, callbacks=[hvdtrain.ExponentialMovingAverage(0.5)]))
    a, b = trainer.replica.module.state_dict(), averaged.replica.module.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(plain.weights[-1], task.weights[-1])
    assert not torch.equal(plain.weights[-1][:2], task.weights[-1][:2])


def test_an_average_of_another_model_is_refused(alone):
    average = hvdtrain.ExponentialMovingAverage()
    fit(tied(alone, Task(), callbacks=[average]))
    other = hvdtrain.ExponentialMovingAverage()
    other.load_state_dict(average.state_dict())
    with pytest.raises(CheckpointError, match="the average of the weights is of another model"):
        fit(trainer_of(alone, [other]))


def test_a_model_whose_parameters_were_replaced_is_refused(alone):
    trainer = trainer_of(alone, [hvdtrain.ExponentialMovingAverage()])
    fit(trainer)
    trainer.replica.module.weight = nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(ConfigError, match="not those that are averaged"):
        trainer.evaluate(data())


def test_an_evaluation_while_the_average_is_applied_is_of_the_average(alone):
    task = Task()
    trainer = trainer_of(alone, [average := hvdtrain.ExponentialMovingAverage(0.9)], task)
    fit(trainer)
    own = trainer.replica.module.weight.detach().clone()
    with average.applied(trainer):
        trainer.evaluate(data(6))
        trainer.evaluate(data(6))
    assert torch.equal(task.weights[-1], task.weights[-3])
    assert torch.equal(task.weights[-2], task.weights[-3])
    assert torch.equal(trainer.replica.module.weight, own)
    assert not torch.equal(own, task.weights[-1])


def test_before_there_is_an_average_it_cannot_be_applied(alone):
    trainer = trainer_of(alone, [average := hvdtrain.ExponentialMovingAverage()])
    trainer.evaluate(data(6))
    with pytest.raises(ConfigError, match="no average of the weights yet"), average.applied(trainer):
        pass


class Odd(nn.Module):
    """Complex numbers, numbers of 16 bits, an integer, a state that is no tensor, and buffers that are replaced."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        self.register_buffer("turn", torch.full((3,), 1j))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        outputs = self.first(x) * self.phase * self.turn
        if self.training:
            self.calls += 1
            self.mean = 0.5 * self.mean + outputs.detach().abs().mean(0)
        return outputs.abs()

    def get_extra_state(self):
        return {"odd": True}

    def set_extra_state(self, state):
        pass

    @property
    def weight(self):
        return torch.cat([torch.view_as_real(self.phase).flatten(), torch.view_as_real(self.turn).flatten(), self.mean])


def test_complex_numbers_are_averaged_and_replaced_buffers_followed(alone):
    def trained(*callbacks):
        torch.manual_seed(0)
        model, task = Odd(), Task()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fit(hvdtrain.Trainer(alone, model, optimizer, task=task, callbacks=callbacks))
        return model, task.weights[-1].double()

    seen = []

    class Watching:
        def on_start(self, trainer):
            seen.append(trainer.replica.module.weight.detach().double())

        def on_step(self, trainer, event):
            seen.append(0.9 * seen[-1] + 0.1 * trainer.replica.module.weight.detach().double())

    plain, _ = trained(Watching())
    model, found = trained(hvdtrain.ExponentialMovingAverage(0.9))
    assert torch.allclose(found, seen[-1], atol=1e-6)
    assert torch.equal(model.weight, plain.weight)
    assert model.calls == plain.calls


def test_weights_of_16_bits_are_averaged_in_32(alone):
    trainer = trainer_of(alone)
    trainer.replica.module.bfloat16()
    average = hvdtrain.ExponentialMovingAverage(0.999)
    average.on_start(trainer)
    with torch.no_grad():
        trainer.replica.module.weight.add_(1)
    before = average.state_dict()["average"]["weight"].clone()
    for _ in range(300):
        average.on_step(trainer, SimpleNamespace(skipped=False))
    moved = average.state_dict()["average"]["weight"] - before
    assert torch.allclose(moved, torch.full_like(moved, 1 - 0.999**300), atol=0.01)
    with average.applied(trainer):
        assert torch.equal(trainer.replica.module.weight, (before + moved).bfloat16())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_names_are_those_without_compilation():
    model = nn.Sequential(torch.compile(nn.Linear(2, 2)), Tied())
    assert sorted(weights_of(model)) == sorted(
        ["0.weight", "0.bias", *(f"1.{name}" for name in weights_of(Tied()))]
    )  # fmt: skip
    assert "third.weight" not in weights_of(Tied())


def test_an_average_shares_nothing_with_the_one_it_was_loaded_from(alone):
    average, other = hvdtrain.ExponentialMovingAverage(0.5), hvdtrain.ExponentialMovingAverage(0.5)
    fit(trainer_of(alone, [average]))
    other.load_state_dict(average.state_dict())
    before = average.state_dict()["average"]["weight"].clone()
    fit(trainer_of(alone, [other], seed=1))
    assert torch.equal(average.state_dict()["average"]["weight"], before)


@pytest.mark.parametrize("decay", [1, -0.1, math.nan])
def test_a_decay_out_of_bounds_is_refused(decay):
    with pytest.raises(ConfigError, match="decay must be 0 or more and less than 1"):
        hvdtrain.ExponentialMovingAverage(decay)


def plateau(alone, values, **options):
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=0)
    trainer = hvdtrain.Trainer(alone, model, optimizer, task=Task(values), schedule=schedule, **options)
    fit(trainer, epochs=len(values))
    return optimizer.param_groups[0]["lr"]


def test_a_schedule_is_stepped_with_the_metric_that_is_named(alone):
    assert plateau(alone, [1, 2, 3, 4], schedule_metric="it") == 1.0
    assert plateau(alone, [4, 3, 2, 5], schedule_metric="it") == 0.25
    with pytest.raises(ConfigError, match="schedule_metric is 'f1', and the evaluation reports it, loss"):
        plateau(alone, [1], schedule_metric="f1")

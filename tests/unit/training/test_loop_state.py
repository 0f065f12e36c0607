"""A loop of one's own goes on exactly where it was saved, or is told why it cannot."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.swa_utils import AveragedModel

from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import CheckpointError, ConfigError
from hvdtrain.training.checkpoint import Checkpoints, load
from hvdtrain.training.loop_state import LoopState
from hvdtrain.training.precision import Precision

EPOCHS = 3


class Loop:
    """A loop with everything that a loop may have, over 11 samples in batches of 4."""

    def __init__(self, backend, folder, *, compiled=False):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.model = torch.compile(module, backend="eager") if compiled else module
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [1, 4, 6])
        self.replica = backend.replicate(self.model, self.optimizer)
        self.critic = nn.Linear(4, 1)
        self.other = backend.replicate(self.critic, torch.optim.SGD(self.critic.parameters(), lr=0.1, momentum=0.9))
        self.average = AveragedModel(self.model)
        self.loader = backend.loader(
            ArrayDataset(torch.linspace(-1, 1, 44).reshape(11, 4), torch.arange(11) % 3), batch_size=4, shuffle=True
        )
        self.checkpoints = Checkpoints(folder, keep=99)
        self.state = LoopState(
            backend,
            self.replica,
            schedule=self.schedule,
            loader=self.loader,
            average=self.average,
            critic=self.other,
        )
        self.trace = []

    def run(self, steps, *, until=10**6):
        while self.loader.epoch < EPOCHS:
            self.model.train()
            for x, y in self.loader:
                x = x + 0.01 * random.random() + 0.01 * np.random.rand()  # noqa: PLW2901
                loss = nn.functional.cross_entropy(self.replica.model(x), y)
                self.replica.backward(loss, samples=len(x))
                self.replica.step()
                self.other.backward(self.other.model(x).square().mean(), samples=len(x))
                self.other.step()
                self.schedule.step()
                self.average.update_parameters(self.model)
                steps += 1
                self.trace.append((steps, loss.item(), self.optimizer.param_groups[0]["lr"]))
                self.state.save(self.checkpoints, steps)
                if steps == until:
                    return
            self.trace.append(("epoch", self.loader.epoch))

    def tensors(self):
        states = [self.average.state_dict(), self.critic.state_dict(), *self.optimizer.state_dict()["state"].values()]
        return [value for state in states for value in state.values()]


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 6, 8])
def test_a_loop_with_everything_goes_on_bit_for_bit(tmp_path, alone, stop):
    whole = Loop(alone, tmp_path / "whole")
    whole.run(0)
    first = Loop(alone, tmp_path / "parts")
    first.run(0, until=stop)
    second = Loop(alone, tmp_path / "parts")
    x = torch.ones(2, 4)
    steps = second.state.load(second.checkpoints, lambda model: model(x).sum())
    assert steps == stop
    second.run(steps)
    assert first.trace + second.trace == whole.trace
    assert all(torch.equal(a, b) for a, b in zip(second.tensors(), whole.tensors(), strict=True))


def test_a_compiled_model_goes_on_from_a_plain_ones_checkpoint_and_back(tmp_path, alone):
    Loop(alone, tmp_path).run(0, until=2)
    compiled = Loop(alone, tmp_path, compiled=True)
    assert compiled.state.load(compiled.checkpoints) == 2
    compiled.run(2, until=3)
    plain = Loop(alone, tmp_path)
    assert plain.state.load(plain.checkpoints) == 3
    assert all(torch.equal(a, b) for a, b in zip(plain.tensors(), compiled.tensors(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), compiled.model.parameters(), strict=True))


def test_without_a_checkpoint_nothing_changes(tmp_path, alone):
    loop = Loop(alone, tmp_path / "none")
    before = torch.get_rng_state()
    assert loop.state.load(loop.checkpoints) == 0
    assert loop.state.load(None) == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_rehearsal_leaves_everything_as_it_was(tmp_path, alone):
    loop = Loop(alone, tmp_path)
    loop.run(0, until=2)
    loop.model.eval()
    loop.state.load(loop.checkpoints)
    before = [t.clone() for t in [*loop.model.state_dict().values(), torch.get_rng_state()]]
    called = []
    loop.state.load(loop.checkpoints, lambda model: called.append(model.training) or model(torch.rand(3, 4)).sum())
    after = [*loop.model.state_dict().values(), torch.get_rng_state()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not loop.model.training
    assert all(p.grad is None for p in loop.model.parameters())


def test_a_position_that_no_batch_begins_at_is_refused(tmp_path, alone):
    loop = Loop(alone, tmp_path)
    loop.run(0, until=1)
    other = alone.loader(ArrayDataset(torch.zeros(11, 4), torch.zeros(11)), batch_size=3)
    with pytest.raises(CheckpointError, match="cannot continue after 4 of 11 samples"):
        LoopState(alone, loop.replica, schedule=loop.schedule, loader=other).load(loop.checkpoints)


def test_a_part_that_the_checkpoint_lacks_is_named(tmp_path, alone):
    loop = Loop(alone, tmp_path)
    loop.run(0, until=1)
    with pytest.raises(CheckpointError, match="written by another loop: it has no 'ema', but average, critic, loader"):
        LoopState(alone, loop.replica, ema=loop.average).load(loop.checkpoints)


@pytest.mark.parametrize("name", ["optimizer", "kinds", "precision"])
def test_a_name_that_is_taken_or_an_object_without_a_state_is_refused(tmp_path, alone, name):
    loop = Loop(alone, tmp_path)
    if name != "optimizer":  # else Python itself takes it for the argument of that name
        with pytest.raises(ConfigError, match=f"{name!r} is the name of a part"):
            LoopState(alone, loop.replica, **{name: loop.average})
    with pytest.raises(ConfigError, match="epoch=int has no state_dict"):
        LoopState(alone, loop.replica, epoch=3)


def test_each_ranks_own_comes_back(tmp_path, alone):
    loop = Loop(alone, tmp_path)
    path = loop.state.save(loop.checkpoints, 4, of_this_rank={"tally": (1.5, 3)})
    assert loop.state.read(path).rank_states[0]["tally"] == (1.5, 3)


def test_what_is_numpys_in_an_optimizer_is_saved_and_comes_back(tmp_path, alone):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=np.float64(0.25))
    state = LoopState(alone, alone.replicate(model, optimizer))
    path = state.save(Checkpoints(tmp_path), 1)
    optimizer.param_groups[0]["lr"] = 9.0
    assert state.load(path) == 1
    assert optimizer.param_groups[0]["lr"] == 0.25


class SGD(torch.optim.Optimizer):
    """Of torch's name, and another one."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1, "mine": 3})


def grouped(parameters):
    weight, bias = parameters
    return torch.optim.SGD([{"params": [weight]}, {"params": [bias]}], lr=0.1)


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    "another SGD": SGD,
    "SGD in two groups": grouped,
    "Adam of one": lambda parameters: torch.optim.Adam(list(parameters)[:1], lr=0.1),
}


@pytest.mark.parametrize("now", OPTIMIZERS)
@pytest.mark.parametrize("then", OPTIMIZERS)
def test_another_optimizer_of_any_kind_is_a_checkpoint_error(tmp_path, alone, then, now):
    models = nn.Linear(2, 2), nn.Linear(2, 2)
    one, other = (
        alone.replicate(model, OPTIMIZERS[name](model.parameters()))
        for model, name in zip(models, (then, now), strict=True)
    )
    path = LoopState(alone, one).save(Checkpoints(tmp_path), 1)
    if then == now:
        assert LoopState(alone, other).load(path) == 1
        return
    with pytest.raises(CheckpointError, match=r"was written with (another )?optimizer.* or --resume never"):
        LoopState(alone, other).load(path)


def test_other_options_of_an_optimizer_are_the_checkpoints_and_that_is_said(tmp_path, alone, caplog):
    models = nn.Linear(2, 2), nn.Linear(2, 2)
    before, now = (
        torch.optim.SGD(m.parameters(), lr=lr, momentum=lr) for m, lr in zip(models, (0.1, 0.2), strict=True)
    )
    one, other = (alone.replicate(*pair) for pair in zip(models, (before, now), strict=True))
    path = LoopState(alone, one).save(Checkpoints(tmp_path), 1)
    LoopState(alone, one).load(path)
    assert caplog.text == ""
    LoopState(alone, other).load(path)
    assert now.param_groups[0]["momentum"] == now.param_groups[0]["lr"] == 0.1
    assert "goes on with lr=0.1 (and not 0.2), momentum=0.1 (and not 0.2), as it was saved" in caplog.text


def test_a_new_schedule_over_a_saved_optimizer_keeps_what_it_needs_there(tmp_path, alone):
    models = nn.Linear(2, 2), nn.Linear(2, 2)
    one, other = (alone.replicate(m, torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)) for m in models)
    path = LoopState(alone, one).save(Checkpoints(tmp_path), 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(other.optimizer, 1.0, total_steps=5)
    LoopState(alone, other, schedule=schedule).load(path)
    other.backward(other.model(torch.ones(1, 2)).sum(), samples=1)
    other.step()
    schedule.step()
    assert other.optimizer.param_groups[0]["lr"] > 0.1


def test_a_scaler_goes_on_and_its_state_is_dropped_where_there_is_none(tmp_path, alone):
    loop = Loop(alone, tmp_path)
    scaler = GradScaler("cpu", init_scale=256.0)
    scaler.scale(torch.ones(()))
    LoopState(alone, loop.replica, scaler=scaler).save(loop.checkpoints, 1)
    other = Precision("fp16", alone.device).scaler
    LoopState(alone, loop.replica, scaler=other).load(loop.checkpoints)
    assert other.get_scale() == 256.0
    LoopState(alone, loop.replica).load(loop.checkpoints)


def test_a_replica_without_an_optimizer_is_saved_and_loaded(tmp_path, alone):
    models = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    one, other, again, other_again = (alone.replicate(model) for model in models)
    path = LoopState(alone, one, other=other).save(Checkpoints(tmp_path), 1)
    assert LoopState(alone, again, other=other_again).load(path) == 1
    assert torch.equal(models[0].weight, models[2].weight)
    assert torch.equal(models[1].weight, models[3].weight)


def test_nothing_in_a_checkpoint_needs_unpickling(tmp_path, alone):
    loop = Loop(alone, tmp_path)
    loop.run(0, until=1)
    loaded = load(alone, loop.checkpoints.latest(), loop.model)

    def kinds(value):
        if isinstance(value, dict):
            assert all(type(key) is str for key in value)
            return {dict}.union(*map(kinds, value.values()))
        if isinstance(value, list):
            return {list}.union(*map(kinds, value))
        return {type(value)}

    plain = {dict, list, str, int, float, bool, type(None), torch.Tensor}
    assert kinds(loaded.training) | kinds(loaded.rank_states) <= plain

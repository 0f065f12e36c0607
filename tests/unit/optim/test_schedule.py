"""Learning rates by step, against the formulas written out here."""

from __future__ import annotations

import math

import pytest
import torch

from hvdtrain.errors import ConfigError
from hvdtrain.optim.schedule import make_schedule, scaled_lr


def rates(name, args=None, *, steps=10, per_epoch=5, **more):
    parameters = [torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD([{"params": parameters[:1], "lr": 1.0}, {"params": parameters[1:], "lr": 0.1}])
    schedule = make_schedule(optimizer, name, args or {}, total_steps=steps, steps_per_epoch=per_epoch, **more)
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert all(second == pytest.approx(first / 10) for first, second in found)  # each group keeps its own peak
    return [first for first, _ in found]


def test_constant_stays():
    assert rates("constant") == [1.0] * 10


def test_cosine_falls_along_half_a_wave_to_its_end():
    assert rates("cosine") == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)])
    assert rates("cosine", {"final": 0.2})[5] == pytest.approx(0.6)


def test_linear_falls_evenly():
    assert rates("linear", {"final": 0.5}) == pytest.approx([1 - 0.05 * step for step in range(10)])


def test_step_multiplies_every_so_many_epochs():
    assert rates("step", {"every": 1, "gamma": 0.5}, steps=15) == pytest.approx([1.0] * 5 + [0.5] * 5 + [0.25] * 5)


def test_warm_up_rises_to_the_peak_and_the_rest_follows_it():
    found = rates("cosine", warmup_steps=4, warmup_start=0.2)
    assert found[:4] == pytest.approx([0.4, 0.6, 0.8, 1.0])
    assert found[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)])


def test_a_rate_grows_with_the_world():
    assert scaled_lr(0.1, 8) == pytest.approx(0.8)


def test_an_unknown_schedule_or_argument_is_refused():
    with pytest.raises(ConfigError, match="use one of constant, cosine"):
        rates("cosinus")
    with pytest.raises(ConfigError, match=r"--schedule step: .*'evry'"):
        rates("step", {"evry": 3})


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "step"])
def test_a_schedule_goes_on_at_its_step_with_the_rates_of_the_running_program(name, tensor):
    def made(lr):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=torch.tensor(lr) if tensor else lr)
        return optimizer, make_schedule(optimizer, name, {}, total_steps=9, steps_per_epoch=3, warmup_steps=2)

    (_, before), (optimizer, now), (whole, uninterrupted) = made(0.1), made(0.3), made(0.3)
    for schedule in (before, uninterrupted):
        for _ in range(4):
            schedule.optimizer.step()
            schedule.step()
    now.load_state_dict(before.state_dict())
    for _ in range(4):
        assert optimizer.param_groups[0]["lr"] == whole.param_groups[0]["lr"]
        for schedule in (now, uninterrupted):
            schedule.optimizer.step()
            schedule.step()

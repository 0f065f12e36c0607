"""What MasterWeights takes over, shows, keeps and refuses, in one process; training with it is the conformance suite's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hvdtrain.errors import ConfigError
from hvdtrain.optim.master_weights import MasterWeights


def parameter(dtype=torch.bfloat16):
    return nn.Parameter(torch.linspace(0.1, 1, 7).to(dtype))


def stepped(optimizer, p, gradient=1.0):
    p.grad = torch.full_like(p, gradient)
    optimizer.step()


def test_a_state_that_was_there_before_goes_on():
    p, q = parameter(torch.float32), parameter(torch.float32)
    plain, taken = torch.optim.Adam([p], lr=0.01), torch.optim.Adam([q], lr=0.01)
    stepped(plain, p)
    stepped(taken, q)
    masters = MasterWeights(taken)
    stepped(plain, p, 3.0)
    stepped(masters, q, 3.0)
    assert torch.equal(p, q)
    assert masters.state[q]["step"] == 2


def test_a_schedule_and_settings_reach_the_masters():
    p = parameter()
    masters = MasterWeights(torch.optim.SGD([p], lr=1.0))
    schedule = torch.optim.lr_scheduler.StepLR(masters, 1, gamma=0.5)
    stepped(masters, p)
    schedule.step()
    stepped(masters, p)
    expected = torch.linspace(0.1, 1, 7).bfloat16().float() - 1 - 0.5
    assert torch.equal(masters.state[p]["master_weight"], expected)


def test_masters_begin_with_what_parameters_held_before_they_were_rounded():
    p = parameter(torch.float32)
    exact = p.detach().clone()
    masters = MasterWeights(torch.optim.SGD([p], lr=0.1))
    p.data = p.data.bfloat16()
    assert torch.equal(masters.state_dict()["state"][0]["master_weight"], exact)


def test_a_parameter_that_is_widened_is_no_more_rounded_to_its_master():
    p = parameter(torch.float32)
    masters = MasterWeights(torch.optim.SGD([p], lr=0.1))
    p.data = p.data.double() + 1e-12
    before = p.detach().clone()
    stepped(masters, p, 1e-9)
    torch.testing.assert_close(p.detach(), before - 1e-10, rtol=0, atol=1e-15)


def test_a_state_of_a_plain_optimizer_loads_and_is_what_comes_out_again():
    p, q = parameter(torch.float32), parameter()
    plain = torch.optim.Adam([p], lr=0.01)
    stepped(plain, p)
    masters = MasterWeights(torch.optim.Adam([q], lr=0.5))
    masters.load_state_dict(copy.deepcopy(plain.state_dict()))
    saved = masters.state_dict()
    assert saved["param_groups"][0]["lr"] == masters.param_groups[0]["lr"] == 0.01
    assert torch.equal(saved["state"][0]["exp_avg"], plain.state[p]["exp_avg"])
    assert saved["state"][0]["exp_avg"].dtype == torch.float32


def test_a_state_can_be_forgotten_and_masters_stay():
    p = parameter()
    masters = MasterWeights(torch.optim.SGD([p], lr=2.0**-12, momentum=0.9))
    stepped(masters, p)
    before = masters.state[p]["master_weight"].clone()
    masters.state.clear()
    assert set(masters.state[p]) == {"master_weight"}
    assert torch.equal(masters.state[p]["master_weight"], before)
    with pytest.raises(ConfigError, match="load_state_dict"):
        masters.state = {p: {}}


def test_what_would_go_wrong_is_refused():
    p = parameter()
    masters = MasterWeights(torch.optim.SGD([p], lr=0.1))
    with pytest.raises(ConfigError, match="takes no closure"):
        masters.step(lambda: 1.0)
    with pytest.raises(ConfigError, match="copied nor pickled"):
        copy.deepcopy(masters)
    with pytest.raises(ConfigError, match="takes a plain optimizer"):
        MasterWeights(masters)
    masters.param_groups[0]["params"].append(parameter())
    with pytest.raises(ConfigError, match=r"use add_param_group\(\)"):
        masters.step()

"""Rows of memory and states lie as their parameters do, whatever the format; numbers stay where they belong."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.backends.layout import bytes_of, laid_out_like, lay_out_states, lying_like

SHAPE = (2, 3, 4, 5)
PARAMETERS = {
    "contiguous": torch.zeros(SHAPE),
    "channels last": torch.zeros(SHAPE).to(memory_format=torch.channels_last),
    "transposed": torch.zeros(7, 5).t(),
    "of one pixel": torch.zeros(6, 4, 1, 1).to(memory_format=torch.channels_last),
    "with gaps": torch.zeros(4, 6)[:, ::2],
    "a number": torch.zeros(()),
    "empty": torch.zeros(0, 3),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_row_is_seen_as_the_parameter_lies(name):
    parameter = PARAMETERS[name]
    memory = torch.arange(3.0 + parameter.numel())
    seen = lying_like(memory[3:], parameter)
    assert seen.shape == parameter.shape
    assert sorted(seen.flatten().tolist()) == memory[3:].tolist()  # each number of the row once
    if name != "with gaps" and not parameter.is_contiguous():
        assert seen.stride() == parameter.stride()


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_state_keeps_its_numbers(name):
    parameter = nn.Parameter(PARAMETERS[name])
    state = torch.randn(parameter.shape, dtype=torch.float64)
    laid = laid_out_like(state, parameter)
    assert torch.equal(laid, state)
    assert laid.dtype == torch.float64
    assert not laid.requires_grad
    if name in ("channels last", "transposed"):
        assert laid.stride() == parameter.stride()


def test_the_memory_of_a_tensor_is_its_bytes():
    tensor = torch.tensor([[1, 2], [3, 256]], dtype=torch.int16)
    seen = bytes_of(tensor)
    assert seen.tolist() == [1, 0, 2, 0, 3, 0, 0, 1]
    seen[0] = 9
    assert tensor[0, 0] == 9  # the same memory
    assert bytes_of(torch.tensor(1.0)[None].expand(1)[0]).tolist() == [0, 0, 128, 63]


def test_what_has_another_shape_stays_the_same_object():
    count = torch.tensor(3.0)
    assert laid_out_like(count, PARAMETERS["channels last"]) is count


def test_a_fused_step_is_right_after_states_were_laid_out():
    weight = torch.randn(SHAPE)
    parameters, optimizers = [], []
    for fused in (False, True):
        parameter = nn.Parameter(weight.clone().to(memory_format=torch.channels_last))
        optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, fused=fused)
        optimizer.state[parameter] = {"momentum_buffer": weight.clone()}  # contiguous, as out of a file
        lay_out_states(optimizer)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        parameters.append(parameter)
        optimizers.append(optimizer)
    torch.testing.assert_close(*parameters)


class Renewed(torch.optim.AdamW):
    """Loads in a way of its own, in which torch runs no hooks."""

    def load_state_dict(self, state_dict):
        for parameter, state in zip(self.param_groups[0]["params"], state_dict["state"].values(), strict=True):
            self.state[parameter] = dict(state)


class Wrapped:
    """No torch optimizer, but offers what one does."""

    def __init__(self, parameters, **options):
        self._inner = torch.optim.AdamW(parameters, **options)
        self.state, self.param_groups = self._inner.state, self._inner.param_groups

    def step(self):
        self._inner.step()

    def state_dict(self):
        return self._inner.state_dict()

    def load_state_dict(self, state_dict):
        self._inner.load_state_dict(state_dict)
        self.state, self.param_groups = self._inner.state, self._inner.param_groups


LOADS = {
    "by the user": lambda replica, state: replica.optimizer.load_state_dict(state["optimizer"]),
    "as a whole": lambda replica, state: replica.load_whole_state(state),
}


@pytest.mark.parametrize("how", LOADS)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, Renewed, Wrapped])
def test_contiguous_states_that_are_loaded_are_those_of_a_plain_optimizer(kind, how):
    torch.manual_seed(0)
    whole = {"model": nn.Conv2d(3, 4, 3).state_dict()}
    moments = {name: torch.rand(4, 3, 3, 3) for name in ("exp_avg", "exp_avg_sq")}  # contiguous, as out of a file
    rest = {name: torch.rand(4) for name in moments}
    states = {0: {"step": torch.tensor(3.0), **moments}, 1: {"step": torch.tensor(3.0), **rest}}
    found = []
    with hvdtrain.init("local", device="cpu") as backend:
        for make, fused in ((torch.optim.AdamW, False), (kind, True)):
            model = nn.Conv2d(3, 4, 3)
            model.load_state_dict(whole["model"])
            replica = backend.replicate(
                model.to(memory_format=torch.channels_last), make(model.parameters(), lr=0.1, fused=fused)
            )
            groups = replica.optimizer.state_dict()["param_groups"]
            LOADS[how](replica, copy.deepcopy({**whole, "optimizer": {"state": states, "param_groups": groups}}))
            replica.backward(model(torch.ones(2, 3, 5, 5)).square().mean(), samples=2)
            replica.step()
            found.append(model)
    torch.testing.assert_close(found[1].weight, found[0].weight)


def test_a_whole_state_that_lies_otherwise_is_laid_out_when_it_is_loaded():
    with hvdtrain.init("local", device="cpu") as backend:
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        replica = backend.replicate(model, optimizer)
        replica.backward(model(torch.randn(2, 3, 5, 5)).sum(), samples=2)
        replica.step()
        state = replica.whole_state()
        moments = state["optimizer"]["state"][0]
        moments["exp_avg"] = moments["exp_avg"].contiguous()
        replica.load_whole_state(state)
        assert optimizer.state[model.weight]["exp_avg"].stride() == model.weight.stride()

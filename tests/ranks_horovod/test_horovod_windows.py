"""A DistributedOptimizer's window between backward and step: what happens in it must not depend on when gradients leave."""

from __future__ import annotations

import os
import time

import pytest
import torch
from torch import nn

import hvdtrain.horovod as hvd


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def loss_of(model, step, rank):
    data = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * step + rank))
    return model(data).square().mean()


def sgd(model, **more):
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return hvd.DistributedOptimizer(inner, model.named_parameters(), **more)


def train(optimizer, model, steps, rank, set_to_none=True):
    for step in steps:
        optimizer.zero_grad(set_to_none)
        loss_of(model, step, rank).backward()
        optimizer.step()


def expected(steps, size):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        sum(loss_of(model, step, rank) / size for rank in range(size)).backward()
        optimizer.step()
    return model


def assert_equal(model, other):
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


warmed = pytest.mark.parametrize("warm", [0, 2], ids=["by name", "in order"])
paused = pytest.mark.parametrize("pause", [0, 0.05], ids=["at once", "when they have left"])


@warmed
@pytest.mark.parametrize("differ", ["frozen", "shape", "order"])
def test_packs_of_one_length_that_hold_other_gradients_are_refused(rank, size, differ, warm):
    if size == 1:
        pytest.skip("needs two ranks")
    torch.manual_seed(0)
    first = nn.Parameter(torch.ones(1, 12) if differ != "shape" or rank else torch.ones(3, 4))
    model = nn.ParameterDict({"a": first, "b": nn.Parameter(torch.ones(4)), "c": nn.Parameter(torch.ones(4))})
    named = list(model.items())
    if differ == "order" and rank:
        named = [named[0], named[2], named[1]]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([one for _, one in named], lr=0.1), named)
    if differ == "frozen":
        for _ in range(warm):
            optimizer.zero_grad()
            sum(one.sum() for _, one in named).backward()
            optimizer.step()
        model["b" if rank else "c"].requires_grad_(False)
    sum(one.sum() for _, one in named).backward()
    with pytest.raises(hvd.HorovodInternalError, match=r"the ranks do not say the same.*rank 0:"):
        optimizer.step()


@warmed
@paused
def test_gradients_that_are_clipped_before_the_step_are_refused(rank, size, warm, pause):
    if size == 1:
        pytest.skip("needs two ranks")
    model, optimizer = (made := make()), sgd(made)
    train(optimizer, model, range(warm), rank)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.zero_grad()
    loss_of(model, warm, rank).backward()
    time.sleep(pause)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(RuntimeError, match="was changed while it was on its way"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


@warmed
@paused
def test_gradients_that_the_model_drops_before_the_step_arrive(rank, size, warm, pause):
    if size == 1:
        pytest.skip("needs two ranks")
    model, optimizer = (made := make()), sgd(made)
    train(optimizer, model, range(warm), rank)
    optimizer.zero_grad()
    loss_of(model, warm, rank).backward()
    time.sleep(pause)
    model.zero_grad()
    optimizer.step()
    assert_equal(model, expected(warm + 1, size))


@warmed
@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("set_to_none", [True, False], ids=["dropped", "zeroed"])
@pytest.mark.parametrize("late", ["first", "last", "partial"])
def test_a_state_that_is_loaded_between_backward_and_step(rank, size, warm, groups, set_to_none, late):
    model, optimizer = (made := make()), sgd(made, groups=groups)
    train(optimizer, model, range(warm), rank)
    for _ in range(3):
        optimizer.zero_grad(set_to_none)
        if late == "partial" and rank == 0:
            model[2](torch.ones(1, 4, dtype=torch.float64)).sum().backward()
        else:
            loss_of(model, 9, rank).backward()
        time.sleep(0.03 if rank == (size - 1 if late == "last" else 0) else 0)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})
        model.load_state_dict(make().state_dict())
        train(optimizer, model, range(2), rank, set_to_none)
        assert_equal(model, expected(2, size))


@warmed
@pytest.mark.parametrize("only", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("through", ["all ranks", "a process set", "a compressor of one's own"])
def test_a_state_that_one_rank_alone_loads_in_a_window_is_told_in_the_next(rank, size, warm, only, through):
    if size == 1:
        pytest.skip("needs two ranks")
    more, members = {}, None
    if through == "a process set":
        if size == 2:
            pytest.skip("all ranks are no process set of their own")
        members = more["process_set"] = hvd.add_process_set(range(2))
    elif through == "a compressor of one's own":
        more["compression"] = type("Own", (hvd.Compression.none,), {})
    model, optimizer = (made := make()), sgd(made, **more)
    train(optimizer, model, range(warm), rank)
    if members is None or rank < 2:
        optimizer.zero_grad()
        loss_of(model, 5, rank).backward()
        if rank == range(size if members is None else 2)[only]:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})
        else:
            optimizer.step()
        with pytest.raises(hvd.HorovodInternalError, match=r"optimizer\.load_state_dict between backward and step"):
            train(optimizer, model, [6], rank)
    if members is not None:
        hvd.remove_process_set(members)
    hvd.join()  # which has nothing to do with what was told


@warmed
@pytest.mark.parametrize("begun", [False, True], ids=["between steps", "in a window"])
def test_a_forked_process_sends_nothing(rank, size, warm, begun):
    if size == 1:
        pytest.skip("needs two ranks")
    model, optimizer = (made := make()), sgd(made)
    train(optimizer, model, range(warm), rank)
    if begun:
        loss_of(model, 9, rank).backward()
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            if not begun:
                loss_of(model, 9, rank).backward()
            optimizer.step()
            os.write(write, b"went on")
        except BaseException as error:
            os.write(write, str(error).encode()[:1000])
        finally:
            os._exit(0)
    os.close(write)
    optimizer.step()
    said = os.read(read, 1000)
    os.close(read)
    os.waitpid(child, 0)
    assert b"forked from a rank" in said
    model.load_state_dict(make().state_dict())
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})
    train(optimizer, model, range(3), rank)
    assert_equal(model, expected(3, size))


@warmed
def test_after_ranks_that_differed_a_loaded_state_begins_anew(rank, size, warm):
    if size == 1:
        pytest.skip("needs two ranks")
    model, optimizer = (made := make()), sgd(made, groups=3)
    train(optimizer, model, range(warm), rank)
    model[2].bias.requires_grad_(rank != 0)
    with pytest.raises(hvd.HorovodInternalError, match="the ranks do not say the same"):
        train(optimizer, model, [0], rank)
    model[2].bias.requires_grad_(True)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})
    model.load_state_dict(make().state_dict())
    train(optimizer, model, range(3), rank)
    assert_equal(model, expected(3, size))

"""Gradients of a DistributedOptimizer go in order once the ranks have agreed on a layout; what must not differ from going by name."""

from __future__ import annotations

import gc
import threading
import time

import pytest
import torch
from torch import nn

import hvdtrain.horovod as hvd
from hvdtrain.horovod import state


def make(width=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 1)).double()


def data_of(step, rank):
    return torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * step + rank))


def loss_of(model, step, rank):
    return model(data_of(step, rank)).square().mean()


def sgd(model, lr=0.1, **more):
    inner = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return hvd.DistributedOptimizer(inner, model.named_parameters(), **more)


def step_of(optimizer, model, step, rank):
    """One step; whether its gradients went in order, None where nothing is exchanged."""
    optimizer.zero_grad()
    loss_of(model, step, rank).backward()
    window = optimizer._exchange._window
    optimizer.step()
    return None if window is None else not window.by_name


def expected(model, steps, size, divisor=None, lr=0.1):
    """One process's weights after steps of which rank r takes the first ``steps[r]``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for step in range(max(steps)):
        optimizer.zero_grad()
        sum(loss_of(model, step, rank) / (divisor or size) for rank in range(size) if step < steps[rank]).backward()
        optimizer.step()
    return model


def assert_equal(model, other, tolerance=1e-12):
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=tolerance)


def test_the_first_window_goes_by_name_and_the_others_in_order(rank, size):
    model = make()
    optimizer = sgd(model)
    ways = [step_of(optimizer, model, step, rank) for step in range(4)]
    assert ways == ([False, True, True, True] if size > 1 else [None] * 4)
    assert_equal(model, expected(make(), [4] * size, size))


JOINS = {
    "all at once": lambda rank, size: 3,
    "each later than the one before": lambda rank, size: 1 + 2 * rank,
    "each earlier": lambda rank, size: 1 + 2 * (size - rank),
    "the first before its first step": lambda rank, size: 0 if rank == 0 else 4,
    "the last has no data": lambda rank, size: 0 if rank == size - 1 else 3,
    "only the first has data": lambda rank, size: 3 if rank == 0 else 0,
    "nobody has data": lambda rank, size: 0,
}
MANNERS = {
    "average": ({}, None),
    "sum": ({"op": hvd.Sum}, 1),
    "groups": ({"groups": 2}, None),
    "each by itself": ({"groups": 0}, None),
    "predivided": ({"gradient_predivide_factor": 2.0}, None),
    "float16": ({"compression": hvd.Compression.fp16}, None),
}


@pytest.mark.parametrize("warm", [0, 2], ids=["new", "used"])
@pytest.mark.parametrize("moment", JOINS)
def test_joining(rank, size, moment, warm):
    model = make()
    optimizer = sgd(model)
    for turn in range(2):
        optimizer.state.clear()
        steps = [JOINS[moment](each, size) for each in range(size)]
        for step in range(warm):
            step_of(optimizer, model, step, rank)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        begun = make()
        with torch.no_grad():
            for parameter, value in zip(begun.parameters(), before, strict=True):
                parameter.copy_(value)
        optimizer.state.clear()
        for step in range(steps[rank]):
            step_of(optimizer, model, step, rank)
        last = hvd.join()
        if steps[rank] == max(steps):
            assert_equal(model, expected(begun, steps, size))
        assert steps[last] == max(steps)
        hvd.broadcast_parameters(model.state_dict(), root_rank=last)
        assert turn < 2


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("width", [4, 3000], ids=["small", "of several kinds of exchange"])
def test_joining_in_every_manner(rank, size, manner, width):
    arguments, divisor = MANNERS[manner]
    model = make(width)
    optimizer = sgd(model, lr=1e-4, **arguments)
    steps = [3 + 2 * each for each in range(size)]
    for step in range(steps[rank]):
        step_of(optimizer, model, step, rank)
    hvd.join()
    if rank == size - 1:
        assert_equal(model, expected(make(width), steps, size, divisor, 1e-4), 1e-5 if manner == "float16" else 1e-12)


@pytest.mark.parametrize("later", [0, 1], ids=["the first", "the last"])
def test_two_optimizers_of_ranks_that_join_at_different_moments(rank, size, later):
    models = make(seed=1), make(seed=2)
    optimizers = [sgd(model) for model in models]
    steps = [3 + 3 * (each if later else size - each) for each in range(size)]
    for step in range(steps[rank]):
        step_of(optimizers[0], models[0], step, rank)
        if step % 3 == 0:
            step_of(optimizers[1], models[1], step // 3, rank)
    assert hvd.join() == (size - 1 if later else 0)
    if steps[rank] == max(steps):
        assert_equal(models[0], expected(make(seed=1), steps, size))
        assert_equal(models[1], expected(make(seed=2), [count // 3 for count in steps], size))


def test_an_optimizer_that_is_garbage_on_a_joined_rank_still_takes_part(rank, size):
    model = make()
    optimizer = sgd(model)
    steps = [3 + 3 * (each == size - 1) for each in range(size)]
    for step in range(steps[rank]):
        step_of(optimizer, model, step, rank)
    if rank != size - 1:
        del optimizer
        gc.collect()
    hvd.join()
    if rank == size - 1:
        assert_equal(model, expected(make(), steps, size))


def test_a_rank_that_joins_between_backward_and_step(rank, size):
    model = make()
    optimizer = sgd(model)
    for step in range(2):
        step_of(optimizer, model, step, rank)
    optimizer.zero_grad()
    loss_of(model, 2, rank).backward()
    if rank == size - 1:
        optimizer.step()
        assert_equal(model, expected(make(), [3] * size, size))
        step_of(optimizer, model, 3, rank)
    hvd.join()


def test_a_layout_that_is_new_while_a_rank_has_joined_goes_by_name(rank, size):
    model = make()
    optimizer = sgd(model)
    ways = [step_of(optimizer, model, step, rank) for step in range(2)]
    if rank > 0 or size == 1:
        model[0].bias.requires_grad_(False)
        before = model[0].bias.detach().clone()
        ways += [step_of(optimizer, model, step, rank) for step in (2, 3)]
        model[0].bias.requires_grad_(True)
        ways.append(step_of(optimizer, model, 4, rank))
        assert not torch.equal(before, model[0].bias)
    assert hvd.join() in range(size)
    if size > 1:
        assert ways == ([False, True] if rank == 0 else [False, True, False, False, True])


def test_parameters_that_are_frozen_and_unfrozen_on_all_ranks(rank, size):
    model, alone = make(), make()
    optimizer = sgd(model)
    reference = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    ways = []
    for step, frozen in enumerate([False, False, True, True, False, True, False]):
        for each in (model, alone):
            each[0].weight.requires_grad_(not frozen)
        ways.append(step_of(optimizer, model, step, rank))
        reference.zero_grad()
        sum(loss_of(alone, step, each) / size for each in range(size)).backward()
        reference.step()
    assert_equal(model, alone)
    if size > 1:
        assert ways == [False, True, False, True, True, True, True]


@pytest.mark.parametrize("warm", [0, 2])
def test_ranks_whose_layouts_differ_are_told(rank, size, warm):
    if size == 1:
        pytest.skip("needs two ranks")
    model = make()
    optimizer = sgd(model)
    for step in range(warm):
        step_of(optimizer, model, step, rank)
    model[2].bias.requires_grad_(rank != 0)
    with pytest.raises(hvd.HorovodInternalError, match=r"the ranks do not say the same.*rank 0:"):
        step_of(optimizer, model, warm, rank)


def test_two_optimizers_that_step_in_different_orders(rank, size):
    models = make(seed=1), make(seed=2)
    optimizers = [sgd(model) for model in models]
    order = [0, 1] if rank % 2 else [1, 0]
    for step in range(4):
        for at in order:
            optimizers[at].zero_grad()
            loss_of(models[at], step, rank).backward()
        for at in order if step % 2 else order[::-1]:
            optimizers[at].step()
    for seed, model in zip((1, 2), models, strict=True):
        assert_equal(model, expected(make(seed=seed), [4] * size, size))


def test_ranks_that_wait_for_something_else_between_backward_and_step(rank, size):
    model = make()
    optimizer = sgd(model)
    for step in range(6):
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()
        for what in "ab" if rank else "ba":
            if what == "a":
                optimizer.step()
            else:
                hvd.allreduce(torch.ones(1), name="else")
    assert_equal(model, expected(make(), [6] * size, size))


def test_optimizers_in_two_threads(rank, size):
    models = make(seed=1), make(seed=2)
    optimizers = [sgd(model) for model in models]

    def train(at):
        for step in range(5):
            time.sleep(0.002 * ((rank + at + step) % 3))
            step_of(optimizers[at], models[at], step, rank)

    threads = [threading.Thread(target=train, args=(at,)) for at in ((0, 1) if rank else (1, 0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, model in zip((1, 2), models, strict=True):
        assert_equal(model, expected(make(seed=seed), [5] * size, size))


def test_groups_of_ranks_can_be_made_between_steps(rank, size):
    if size == 1:
        pytest.skip("the only group there is holds everybody already")
    model = make()
    optimizer = sgd(model)
    for step in range(3):
        step_of(optimizer, model, step, rank)
        part = hvd.add_process_set([size - 1])
        hvd.remove_process_set(part)
    assert_equal(model, expected(make(), [3] * size, size))


def test_a_window_that_loading_a_state_ends(rank, size):
    model = make()
    optimizer = sgd(model)
    begun = {name: value.clone() for name, value in model.state_dict().items()}
    for turn in range(4):
        model.load_state_dict(begun)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})
        for step in range(2):
            step_of(optimizer, model, step, rank)
        assert_equal(model, expected(make(), [2] * size, size))
        if turn:
            model[0](data_of(0, rank)).sum().backward()  # some of the gradients only


def test_sparse_gradients_that_turn_up_later(rank, size):
    torch.manual_seed(0)
    table, head = nn.Embedding(10, 3, sparse=True), nn.Linear(3, 1)
    module = nn.ModuleList([table, head])
    start = table.weight.detach().clone()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(module.parameters(), lr=1.0), module.named_parameters())
    for step in range(6):
        optimizer.zero_grad()
        if step >= 3:
            table(torch.tensor([rank, 5])).sum().backward()
        else:
            head(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        if step < 3:
            table.weight.grad = None
    wanted = start.clone()
    for each in range(size):
        wanted[each] -= 3.0 / size
    wanted[5] -= 3.0
    torch.testing.assert_close(table.weight.detach(), wanted)


def test_a_discarded_optimizer_sends_nothing_more(rank, size):
    model = make()
    for turn in range(3):
        optimizer = sgd(model)
        begun = make()
        begun.load_state_dict(model.state_dict())
        for step in range(3):
            step_of(optimizer, model, step, rank)
        assert_equal(model, expected(begun, [3] * size, size))
        if turn == 1:
            del optimizer
            gc.collect()
            loss_of(model, 0, rank).backward()  # of which nobody is told
    if size > 1:
        gc.collect()
        sgd(make())
        live = sum(held.sender() is not None for held in state.job().channels._held.values())
        assert live == 1


def test_a_parameter_belongs_to_the_newest_of_two_living_optimizers(rank, size):
    model = make()
    older = sgd(model)
    step_of(older, model, 0, rank)
    if size > 1:
        loss_of(model, 1, rank).backward()
        with pytest.raises(ValueError, match="on their way for an older DistributedOptimizer"):
            sgd(model)
        older.step()
    newer = sgd(model)
    model.load_state_dict(make().state_dict())
    newer.state.clear()
    for step in range(3):
        step_of(newer, model, step, rank)
    assert_equal(model, expected(make(), [3] * size, size))
    if size > 1:
        with pytest.raises(RuntimeError, match="given to a newer one"):
            older.step()


def test_an_optimizer_that_was_wrapped_is_not_stepped_itself(rank, size):
    model = make()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = hvd.DistributedOptimizer(inner)
    loss_of(model, 0, rank).backward()
    if size == 1:
        inner.step()
        return
    with pytest.raises(RuntimeError, match="is stepped itself"):
        inner.step()
    optimizer.synchronize()
    inner.step()  # as scripts with an own scaler do
    optimizer.zero_grad()
    del optimizer
    gc.collect()
    loss_of(model, 1, rank).backward()
    with pytest.raises(RuntimeError, match="is stepped itself"):
        inner.step()


def test_what_is_steady_asks_the_controller_nothing(rank, size):
    if size == 1:
        pytest.skip("needs two ranks")
    model = make()
    optimizer = sgd(model)
    for step in range(3):
        step_of(optimizer, model, step, rank)
    controller = state.job().controllers[0]
    asked = []
    submit, controller.submit = controller.submit, lambda request, **more: asked.append(request)
    try:
        for step in range(3, 6):
            step_of(optimizer, model, step, rank)
    finally:
        controller.submit = submit
    assert not asked
    assert_equal(model, expected(make(), [6] * size, size))

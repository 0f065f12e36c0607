"""A number of each rank that is summed on the way: with the gradients where there are any, and else by itself."""

import pytest
import torch
from torch import nn


def replicas(backend, count=1):
    torch.manual_seed(0)
    models = [nn.Linear(3, 2) for _ in range(count)]
    return [backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1)) for model in models]


def backward(replica, samples=2):
    replica.backward(replica.model(torch.ones(samples, 3)).square().mean(), samples=samples)


def counted(backend, monkeypatch):
    """The all-reduces that are not of gradients."""
    calls = []
    all_reduce = backend.all_reduce
    monkeypatch.setattr(backend, "all_reduce", lambda *a, **k: calls.append(1) or all_reduce(*a, **k))
    return calls


def test_it_travels_with_the_gradients_also_of_a_rank_without_samples(backend, monkeypatch):
    (replica,) = replicas(backend)
    n, rank = backend.world_size, backend.rank
    backward(replica)
    replica.step()  # in which the ranks settle the unit of their weights
    calls = counted(backend, monkeypatch)
    for step in range(3):
        ahead = backend.ahead(10 * step + rank)
        if rank == 0 or step != 1:
            backward(replica)
        replica.step()
        assert ahead.total() == ahead.total() == 10 * step * n + n * (n - 1) // 2
    assert not calls


def test_without_an_exchange_it_is_summed_when_it_is_asked_for(backend):
    n, rank = backend.world_size, backend.rank
    assert backend.ahead(rank + 1).total() == n * (n + 1) // 2
    ahead, later = backend.ahead(1), backend.ahead(2)  # only the newest travels
    (replica,) = replicas(backend)
    backward(replica)
    replica.step()
    assert (ahead.total(), later.total()) == (n, 2 * n)


@pytest.mark.parametrize("then_step", [False, True])
def test_a_step_that_is_given_up_leaves_it_behind(backend, then_step):
    (replica,) = replicas(backend)
    ahead = backend.ahead(3)
    backward(replica)
    replica.clear()
    if then_step:
        backward(replica)
        replica.step()
    assert ahead.total() == 3 * backend.world_size


def test_of_several_replicas_the_first_takes_it(backend):
    first, second = replicas(backend, 2)
    for _ in range(2):
        ahead = backend.ahead(backend.rank)
        backward(first)
        backward(second)
        second.step()
        first.step()
        assert ahead.total() == sum(range(backend.world_size))

"""However the model is called, the gradients are those of one process with the whole batch (float64, 1e-12)."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hvdtrain.errors import TrainingError

# torch 2.4 to 2.5, of their own checkpointing
pytestmark = [
    pytest.mark.feature("forward"),
    pytest.mark.filterwarnings("ignore:`torch.cpu.amp.autocast:FutureWarning"),
]
CLOSE = {"rtol": 1e-12, "atol": 1e-14}


class Coder(nn.Module):
    """A body, a head, and methods beside forward."""

    classes = 2

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.body(x))

    def encode(self, x):
        return self.body(x)

    def decode(self, code):
        return self.head(code)

    def both(self, x):
        code = self.encode(x)
        return {"code": code, "out": (self.decode(code),)}

    def loss(self, x):
        return self(x).square().mean()


class Outputs:
    """What no library looks into."""

    def __init__(self, value):
        self.value = value


def hidden(model, x):
    kept = []
    handle = model.head.register_forward_hook(lambda *event: kept.append(event[2]))
    model(x)
    handle.remove()
    return kept[0].square().mean()


def penalised(model, x):
    x = x.clone().requires_grad_()
    out = model(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return out.square().mean() + slope.square().mean()


WAYS = {
    "the model": lambda model, x: model(x).square().mean(),
    "forward itself": lambda model, x: model.forward(x).square().mean(),
    "its parts": lambda model, x: model.head(model.body(x)).square().mean(),
    "methods": lambda model, x: model.decode(model.encode(x)).square().mean(),
    "a method that returns a structure": lambda model, x: model.both(x)["out"][0].square().mean(),
    "a method that returns the loss": lambda model, x: model.loss(x),
    "an object around the output": lambda model, x: Outputs(model(x)).value.square().mean(),
    "twice": lambda model, x: model(x[:1]).square().sum() / 2 / len(x) + model(x[1:]).square().sum() / 2 / len(x),
    "once in vain": lambda model, x: (model(x + 1), model(x))[1].square().mean(),
    "under no_grad before": lambda model, x: (no_grad(model, x), model(x))[1].square().mean(),
    "functional_call": lambda model, x: (
        torch.func.functional_call(model, dict(model.named_parameters()), (x,)).square().mean()
    ),
    "parameters alone": lambda model, x: (
        nn.functional.linear(
            nn.functional.linear(x, model.body[0].weight, model.body[0].bias).tanh(), model.head.weight, model.head.bias
        )
        .square()
        .mean()
    ),
    "a hook's output": hidden,
    "a gradient penalty": penalised,
    "activation checkpointing": lambda model, x: (
        model.head(checkpoint(model.body, x, use_reentrant=False)).square().mean()
    ),
    "partial": lambda model, x: functools.partial(model, x)().square().mean(),
}


@torch.no_grad()
def no_grad(model, x):
    return model(x)


def samples(count, start=0):
    return torch.sin(torch.arange(start * 4, (start + count) * 4, dtype=torch.float64)).reshape(count, 4)


def made():
    torch.manual_seed(0)
    return Coder().double()


def reference(model, way, n, per_rank=3):
    alone = copy.deepcopy(model)
    for rank in range(n):
        (WAYS[way](alone, samples(per_rank, per_rank * rank)) / n).backward()
    return [p.grad for p in alone.parameters()]


def assert_equal(model, expected):
    for (name, parameter), wanted in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)


@pytest.mark.costly(24)
@pytest.mark.parametrize("unused", [False, True], ids=["", "find-unused"])
@pytest.mark.parametrize("total", [True, False], ids=["total", "counted"])
@pytest.mark.parametrize("way", WAYS)
def test_any_forward_pass_gives_averaged_gradients(backend, way, total, unused):
    n = backend.world_size
    model = made()
    replica = backend.replicate(
        model, torch.optim.SGD(model.parameters(), lr=0.1), bucket_bytes=128, find_unused_parameters=unused
    )
    for _ in range(3):  # the first step lays out what the later ones use
        expected = reference(model, way, n)
        x = samples(3, 3 * backend.rank)
        replica.backward(WAYS[way](replica.model, x), samples=3, total=3 * n if total else None)
        replica.reduce_gradients()
        assert_equal(model, expected)
        replica.step()


PLACES = ["inside", "before", "mixed", "never last", "not overlapped"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", ["the model", "methods", "its parts", "a gradient penalty"])
def test_micro_batches_may_be_computed_anywhere(backend, way, place):
    n = backend.world_size
    model = made()
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), bucket_bytes=128)
    alone = copy.deepcopy(model)
    for _ in range(3):
        alone.load_state_dict(model.state_dict())
        alone.zero_grad()
        for start in range(2 * n):
            (WAYS[way](alone, samples(2, 2 * start)) / (2 * n)).backward()
        first, second = samples(2, 4 * backend.rank), samples(2, 4 * backend.rank + 2)
        losses = [WAYS[way](replica.model, x) for x in (first, second)] if place in ("before", "mixed") else []
        with replica.accumulate(last=False):
            loss = losses[0] if place == "before" else WAYS[way](replica.model, first)
            replica.backward(loss, samples=2, total=4 * n)
        with replica.accumulate(last=place != "never last", overlap=place != "not overlapped"):
            loss = losses[1] if losses else WAYS[way](replica.model, second)
            replica.backward(loss, samples=2, total=4 * n)
        replica.reduce_gradients()
        assert_equal(model, [p.grad for p in alone.parameters()])
        replica.step()


@pytest.mark.parametrize("total", [True, False], ids=["total", "counted"])
def test_two_losses_of_one_forward_pass_add(backend, total):
    n = backend.world_size
    model = made()
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        alone = copy.deepcopy(model)
        for rank in range(n):
            out = alone(samples(3, 3 * rank))
            ((out[:, 0].square().mean() + out[:, 1].exp().mean()) / n).backward()
        known = 3 * n if total else None
        out = replica.model(samples(3, 3 * backend.rank))
        with replica.accumulate(last=False):
            replica.backward(out[:, 0].square().mean(), samples=3, total=known, retain_graph=True)
        replica.backward(out[:, 1].exp().mean(), samples=3, total=known)
        replica.reduce_gradients()
        assert_equal(model, [p.grad for p in alone.parameters()])
        replica.step()


def test_a_second_pass_through_a_freed_graph_is_explained(backend):
    model = made()
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
    out = replica.model(samples(3))
    with replica.accumulate(last=False):
        replica.backward(out[:, 0].square().mean(), samples=3)
    with pytest.raises(TrainingError, match=r"loss_1 \+ loss_2.*retain_graph=True"):
        replica.backward(out[:, 1].square().mean(), samples=3)


def test_the_replicas_model_is_the_users_own(backend):
    model = made()
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert replica.model is replica.module is model
    assert replica.model.classes == 2
    assert isinstance(replica.model, Coder)
    with replica.accumulate(last=False):
        assert replica.model is model


def test_gradients_that_only_an_early_micro_batch_made_are_averaged_without_being_looked_for(backend):
    n = backend.world_size
    model = made()
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), bucket_bytes=128)
    for _ in range(2):
        alone = copy.deepcopy(model)
        for rank in range(n):
            x = samples(3, 3 * rank)
            ((alone(x).square().mean() + alone.encode(x).square().mean()) / (2 * n)).backward()
        x = samples(3, 3 * backend.rank)
        with replica.accumulate(last=False):
            replica.backward(replica.model(x).square().mean(), samples=3, total=6 * n)
        replica.backward(replica.model.encode(x).square().mean(), samples=3, total=6 * n)
        replica.reduce_gradients()
        assert_equal(model, [p.grad for p in alone.parameters()])
        replica.step()

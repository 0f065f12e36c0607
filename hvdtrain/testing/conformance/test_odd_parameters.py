"""Parameters and buffers out of the ordinary train as they do in one process."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

pytestmark = pytest.mark.feature("odd parameters")

SAMPLES = 13


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex128))

    def forward(self, x):
        return torch.view_as_real(x.to(torch.complex128) @ self.weight).flatten(1)


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.none = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.ones(0, 4))

    def forward(self, x):
        return x * self.scale + self.none.sum()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.other(self.one(x).tanh())


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4).t())

    def forward(self, x):
        return x @ self.weight


class Counting(nn.Module):
    """Whole and boolean buffers, one of which it changes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("levels", torch.arange(3, dtype=torch.uint8), persistent=False)

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * self.mask * self.levels


class LowRank(nn.Module):
    """A frozen base and a small trained addition to it."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 3).requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Whole(nn.Module):
    """A frozen base as integers with scales, below what is trained."""

    def __init__(self):
        super().__init__()
        base = torch.randn(4, 4)
        self.register_buffer("scale", base.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("whole", (base / self.scale).round().to(torch.int8))
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x @ (self.whole.double() * self.scale))


class Eight(nn.Module):
    """The same in float8, not contiguous, and with one number of 16 bits without a sign: dtypes that collectives do not take."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(4, 4).to(torch.float8_e4m3fn).t())
        self.register_buffer("shift", torch.tensor(3, dtype=torch.uint16))
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x @ self.table.double() + self.shift.double())


KINDS = {
    "complex": Complex,
    "0-dimensional and empty": Scalar,
    "tied": Tied,
    "transposed": Transposed,
    "whole and boolean buffers": Counting,
    "frozen base": LowRank,
    "buffers of integers with scales": Whole,
    "buffers of float8": Eight,
    "weight normalisation": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "spectral normalisation": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "channels last": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 6, 2).to(memory_format=torch.channels_last), nn.Flatten()
    ),
    "real and complex": lambda: nn.Sequential(nn.Linear(4, 4), Complex()),
}


def made(kind):
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # Module.double() would make complex parameters real
    try:
        return KINDS[kind]()
    finally:
        torch.set_default_dtype(default)


def samples(step):
    return torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def optimizer_of(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


@pytest.mark.filterwarnings("ignore:Grad strides do not match")  # DDP copies them
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_one_process_does(backend, kind, clip_norm):
    model = made(kind)
    alone = copy.deepcopy(model)
    replica = backend.replicate(model, optimizer_of(model))
    optimizer = optimizer_of(alone)
    for step in range(4):
        x = samples(step)
        mine = x[backend.rank :: backend.world_size]
        replica.backward((model(mine).square().sum(1) + 1).log().mean(), samples=len(mine))
        replica.step(clip_norm=clip_norm)
        (alone(x).square().sum(1) + 1).log().mean().backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(alone.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    for (name, a), b in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert a.dtype == b.dtype
        assert a.numel() == 0 or float((a - b).detach().abs().max()) < 1e-12, name


TRAVEL = {
    "topk": {"compression": "topk:1"},
    "randomk between groups": {"compression": "randomk:1", "sync_group": "node"},
    "sync": {"sync": "local-sgd:1"},
    "sync and topk": {"sync": "local-sgd:1", "compression": "topk:1"},
}
NOTHING_TO_COMPRESS = ("complex", "0-dimensional and empty")


@pytest.mark.costly(8)
@pytest.mark.parametrize("way", TRAVEL)
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_one_process_does_where_less_is_sent_and_nothing_left_out(backend, kind, way):
    if "compression" in TRAVEL[way] and kind in NOTHING_TO_COMPRESS:
        return
    model = made(kind)
    alone = copy.deepcopy(model)
    replica, optimizer = backend.replicate(model, optimizer_of(model), **TRAVEL[way]), optimizer_of(alone)
    for step in range(4):
        x = samples(step)
        mine = x[backend.rank :: backend.world_size]
        replica.backward((model(mine).square().sum(1) + 1).log().mean(), samples=len(mine))
        replica.step()
        (alone(x).square().sum(1) + 1).log().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    replica.settle()
    for (name, a), b in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert a.dtype == b.dtype
        assert a.numel() == 0 or float((a - b).detach().abs().max()) < 1e-12, name


@pytest.mark.parametrize("kind", ["buffers of float8", "buffers of integers with scales", "whole and boolean buffers"])
def test_every_rank_has_rank_zeros_buffers_of_any_dtype(backend, kind):
    model, wanted = made(kind), made(kind)
    for at, buffer in enumerate([*wanted.buffers()]):
        buffer.copy_((torch.arange(buffer.numel()).view(buffer.shape) % 5 + at).to(buffer.dtype))
    replica = backend.replicate(model, optimizer_of(model))
    for share in (replica.copy_from_rank_zero, replica.sync_buffers):
        for buffer, other in zip(model.buffers(), wanted.buffers(), strict=True):
            buffer.copy_(other if backend.rank == 0 else torch.ones_like(other))
        share()
        for buffer, other in zip(model.buffers(), wanted.buffers(), strict=True):
            assert torch.equal(buffer.double(), other.double())
            assert buffer.stride() == other.stride()

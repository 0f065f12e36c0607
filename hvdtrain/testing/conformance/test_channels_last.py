"""Weights and images that lie channels last: the same results on every engine, whatever the optimizer makes of memory."""

import warnings

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import ConfigError

pytestmark = pytest.mark.feature("precision")

FORMS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
CLOSE = {"rtol": 1e-8, "atol": 1e-10}  # in float64; convolutions sum in another order


def made():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3), nn.Conv2d(6, 4, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def data(n):
    torch.manual_seed(2)
    return ArrayDataset(torch.randn(n, 3, 7, 7), torch.arange(n) % 3)


class Seen(nn.Module):
    """Notes how its input lies."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.formats = inner, set()

    def forward(self, x):
        self.formats.add(x.is_contiguous(memory_format=torch.channels_last))
        return self.inner(x)


def trained(backend, channels_last, form="loop", folder=None, wrap=lambda optimizer: optimizer, **fit):
    model = Seen(made())
    optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=0.01, **FORMS[form]))
    checkpoints = None if folder is None else hvdtrain.Checkpoints(folder)
    trainer = hvdtrain.Trainer(
        backend, model, optimizer, loss=nn.functional.cross_entropy, channels_last=channels_last, clip_norm=0.5,
        precision="fp64", checkpoints=checkpoints,
    )  # fmt: skip
    n = backend.world_size
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as DDP's, of gradients that lie otherwise than its buckets
        trainer.fit(data(6 * n), data(4), epochs=2, global_batch_size=2 * n, **fit)
    assert model.formats == {channels_last}
    lies = {p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.dim() == 4}
    assert lies == {True} or not channels_last
    return model, None if checkpoints is None else checkpoints.find(backend)


def assert_alike(one, other, **close):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("form", FORMS)
def test_results_are_those_of_contiguous_tensors(backend, form):
    contiguous, _ = trained(backend, False, "loop")
    last, _ = trained(backend, True, form)
    assert_alike(last, contiguous, **CLOSE)


@pytest.mark.costly(1)
@pytest.mark.parametrize("wrap", ["masters", "sharded", "both"])
def test_wrapped_fused_optimizers_compute_the_same(backend, wrap):
    def wrapped(optimizer):
        if wrap != "sharded":
            optimizer = hvdtrain.MasterWeights(optimizer)
        return optimizer if wrap == "masters" else hvdtrain.ShardedOptimizer(optimizer, backend)

    plain, _ = trained(backend, True, "loop")
    other, _ = trained(backend, True, "fused", wrap=wrapped)
    assert_alike(other, plain, **CLOSE)


@pytest.mark.costly(1)
@pytest.mark.parametrize(("before", "after"), [(True, True), (False, True), (True, False)])
def test_a_run_goes_on_from_either_format_with_a_fused_optimizer(backend, tmp_path_factory, before, after):
    folder = backend.broadcast_object(str(tmp_path_factory.mktemp("run")) if backend.rank == 0 else None)
    whole, _ = trained(backend, after, "fused")
    _, found = trained(backend, before, "fused", folder, max_steps=4)
    resumed, _ = trained(backend, after, "fused", resume_from=found)
    assert_alike(resumed, whole, **({"rtol": 0, "atol": 0} if before == after else CLOSE))


def test_a_state_that_comes_from_rank_zero_lies_as_the_parameters_do(backend):
    """A state is there before replicate() on rank 0 alone."""
    torch.manual_seed(3)
    model = made()[:1].double().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)

    def stepped_alone():
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    if backend.rank == 0:
        stepped_alone()
    replica = backend.replicate(model, optimizer)
    for _ in range(2):
        replica.backward(model(x).square().mean(), samples=2)
        replica.step()
    for parameter in model.parameters():
        assert torch.equal(parameter, backend.broadcast(parameter.detach()))
    expected = made()[:1].double()
    alone = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        expected(x).square().mean().backward()
        alone.step()
        alone.zero_grad()
    assert_alike(model, expected, **CLOSE)


def test_a_state_that_a_user_loads_lies_as_the_parameters_do(backend):
    ends = []
    for last in (False, True):
        model = made().double()
        if last:
            model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        replica = backend.replicate(model, optimizer)
        torch.manual_seed(5)
        states = {
            index: {
                "step": torch.tensor(3.0),
                **{name: torch.rand(p.shape, dtype=p.dtype) for name in ("exp_avg", "exp_avg_sq")},
            }
            for index, p in enumerate(model.parameters())
        }
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})  # contiguous ones
        torch.manual_seed(6)
        x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
        replica.backward(
            model(x.contiguous(memory_format=torch.channels_last) if last else x).square().mean(), samples=2
        )
        replica.step()
        ends.append(model)
    assert_alike(*ends, **CLOSE)


def test_gradients_lie_as_their_parameters_do_and_nobody_else_holds_them(backend, logged):
    model = made().to(memory_format=torch.channels_last)
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(4):
        x = torch.randn(2, 3, 7, 7).to(memory_format=torch.channels_last)
        replica.backward(model(x).square().mean(), samples=2)
        replica.reduce_gradients()
        for parameter in model.parameters():
            lies = parameter.grad.is_contiguous(memory_format=torch.channels_last) if parameter.dim() == 4 else True
            assert lies
        replica.clear()
    assert not any("still referenced" in message for message in logged)


def test_a_model_without_convolutions_is_refused(backend):
    model = nn.Linear(3, 2)
    with pytest.raises(ConfigError, match="of which the model has none"):
        hvdtrain.Trainer(
            backend, model, torch.optim.SGD(model.parameters()), loss=nn.functional.mse_loss, channels_last=True
        )

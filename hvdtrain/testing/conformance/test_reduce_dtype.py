"""Gradients travel in the type that was asked for, are the mean to its rounding, and are of the parameter's type again."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from hvdtrain.backends.reduce_dtype import REDUCE_DTYPES
from hvdtrain.errors import ConfigError, ModelMismatch, TrainingError

pytestmark = pytest.mark.feature("precision")

NARROW = ["bf16", "fp16"]


def made(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 700), nn.Tanh(), nn.Linear(700, 3)).to(dtype)


def batch(backend, rank=None):
    rank = backend.rank if rank is None else rank
    x = torch.sin(torch.arange(12.0).reshape(2, 6) * (rank + 1))
    return x, x[:, :3].square()


def loss_of(model, x, y):
    kind = next(model.parameters()).dtype
    return nn.functional.mse_loss(model(x.to(kind)).float(), y)


def averaged(backend, model, reduce_dtype, **options):
    """The gradients of one step; some small buckets, so that there are several."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replica = backend.replicate(model, optimizer, reduce_dtype=reduce_dtype, bucket_bytes=4096, **options)
    for number in range(2):  # the first step may differ: engines lay out their buckets in it
        with replica.accumulate(last=False):
            replica.backward(loss_of(model, *batch(backend)), samples=1, total=2 * backend.world_size)
        replica.backward(loss_of(model, *batch(backend)), samples=1, total=2 * backend.world_size)
        replica.reduce_gradients()
        if number == 0:
            replica.clear()
    return [p.grad for p in model.parameters()]


def by_hand(backend, dtype, scale=1.0):
    """Each rank's part, rounded as it leaves, summed in float64."""
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in made().parameters()]
    for rank in range(backend.world_size):
        model = made()
        loss_of(model, *batch(backend, rank)).backward()
        for total, parameter in zip(sums, model.parameters(), strict=True):
            total.add_((parameter.grad / backend.world_size).to(dtype).double())
    return sums


@pytest.mark.parametrize("unused", [False, True], ids=["", "find-unused"])
@pytest.mark.parametrize("name", NARROW)
def test_a_gradient_is_the_mean_rounded_to_the_type_and_of_the_parameters_type(backend, name, unused):
    model, dtype = made(), REDUCE_DTYPES[name]
    gradients = averaged(backend, model, name, find_unused_parameters=unused)
    for gradient, exact in zip(gradients, by_hand(backend, dtype), strict=True):
        assert gradient.dtype == torch.float32
        eps = torch.finfo(dtype).eps * backend.world_size
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * backend.world_size
        torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=eps * float(exact.abs().max()) + tiny)
        if backend.world_size > 1:  # nothing else than that type has arrived
            assert torch.equal(gradient.to(dtype).float(), gradient)


def test_float32_is_exact_for_gradients_of_float32_and_gentler_than_their_own_for_16_bits(backend):
    exact = by_hand(backend, torch.float64)
    for gradient, expected in zip(averaged(backend, made(), "fp32"), exact, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)
    for gradient, expected in zip(averaged(backend, made(torch.bfloat16), "fp32"), exact, strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.double(), expected, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("name", NARROW)
def test_what_is_counted_with_the_gradients_stays_exact(backend, name):
    model = made()
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), reduce_dtype=name)
    for samples in (4097, 70_003):  # float16 ends at 65504, and bfloat16 counts no further than 256
        replica.backward(loss_of(model, *batch(backend)), samples=samples + backend.rank)
        n = backend.world_size
        assert replica.step().samples == n * samples + n * (n - 1) // 2


@pytest.mark.parametrize("name", NARROW)
def test_unequal_weights_are_followed(backend, name):
    model = made()
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), reduce_dtype=name)
    weights = [1000.0 * (rank + 1) for rank in range(backend.world_size)]
    replica.backward(loss_of(model, *batch(backend)), samples=2, weight=weights[backend.rank])
    replica.reduce_gradients()
    whole = made()
    for rank, weight in enumerate(weights):
        (loss_of(whole, *batch(backend, rank)) * (weight / sum(weights))).backward()
    for parameter, expected in zip(model.parameters(), whole.parameters(), strict=True):
        atol = 2e-2 * float(expected.grad.abs().max())
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=0, atol=atol)


def test_an_overflow_of_float16_ends_or_skips_the_step_on_all_ranks(backend):
    def stepped(reduce_dtype, **how):
        model = made()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        replica = backend.replicate(model, optimizer, reduce_dtype=reduce_dtype)
        large = 3e7 if backend.rank == backend.world_size - 1 else 1.0
        replica.backward(loss_of(model, *batch(backend)) * large, samples=2)
        before = [p.detach().clone() for p in model.parameters()]
        try:
            skipped = replica.step(**how).skipped
        except TrainingError as error:
            skipped = str(error)
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        return skipped, same

    if backend.world_size == 1:  # nothing travels
        assert stepped("fp16") == (False, False)
        return
    said, same = stepped("fp16")
    assert same
    assert "float16" in said
    assert "--reduce-dtype bf16" in said
    assert stepped("fp16", clip_norm=1.0) == (said, True)
    assert stepped("fp16", skip_nonfinite=True) == (True, True)
    assert stepped("fp16", scaler=torch.amp.GradScaler("cpu", init_scale=1.0)) == (True, True)
    assert stepped("bf16") == (False, False)


def test_an_own_optimizer_step_is_refused_after_an_overflow(backend):
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replica = backend.replicate(model, optimizer, reduce_dtype="fp16")
    replica.backward(loss_of(model, *batch(backend)) * 3e7, samples=2)
    replica.reduce_gradients()
    travels = backend.world_size > 1
    with pytest.raises(TrainingError, match="too large for float16") if travels else nullcontext():
        optimizer.step()
    replica.clear()


def test_sparse_gradients_travel_as_they_are(backend):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(50, 8, sparse=True), nn.Flatten(), nn.Linear(16, 2))
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), reduce_dtype="bf16")
    words = torch.tensor([[backend.rank, 7]])
    replica.backward(model(words).square().mean(), samples=1)
    replica.reduce_gradients()
    gradient = model[0].weight.grad.to_dense()
    assert set(gradient.abs().sum(1).nonzero().flatten().tolist()) == {7, *range(backend.world_size)}
    own = torch.autograd.grad(model(words).square().mean(), model[0].weight)[0].to_dense()
    torch.testing.assert_close(gradient, backend.all_reduce(own, "mean"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_wide_gradients_are_refused(backend, dtype):
    model = made()
    model[0].weight = nn.Parameter(model[0].weight.to(dtype))
    with pytest.raises(
        ConfigError, match=r"'0\.weight' is of .*: reduce_dtype= .* is for gradients of float32 and less"
    ):
        backend.replicate(model, reduce_dtype="bf16")


def test_ranks_that_ask_for_different_types_are_told(backend):
    wanted = "bf16" if backend.rank == 0 else "fp16"
    several = backend.world_size > 1
    with (
        pytest.raises(ModelMismatch, match=r"setting reduce_dtype torch\.bfloat16, ranks? 1")
        if several
        else nullcontext()
    ):
        backend.replicate(made(), reduce_dtype=wanted)


def test_an_unknown_type_is_refused(backend):
    with pytest.raises(ConfigError, match="must be one of auto, fp32, bf16, fp16, got 'int8'"):
        backend.replicate(made(), reduce_dtype="int8")

"""Weights where ranks take part in each other's backward passes: what one sends another is weighted alike, and 0 stays 0."""

import pytest
import torch
from torch import nn

from hvdtrain.sync_batch_norm import convert_sync_batch_norm

pytestmark = pytest.mark.feature("weights")


def model_of():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()


def loss_of(model, x, counts):
    """The mean over the rows that count; of none it is 0 / 0, and so are its gradients."""
    return (model(x).square().sum(1) * counts).sum() / counts.sum()


def parts(backend):
    torch.manual_seed(4)
    x = torch.randn(backend.world_size, 2, 5, 3, dtype=torch.float64)
    counts = torch.ones(backend.world_size, 2, 5, dtype=torch.float64)
    counts[:, 0, 2:] = 0
    if backend.world_size > 1:
        counts[-1] = 0
    return x, counts


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_rank_where_nothing_counts_takes_part_in_batch_normalisation_and_adds_nothing(backend, micro_batches):
    x, counts = parts(backend)
    counts[:, 0, 1:] = 0
    counts[0, 0] = 0 if micro_batches == 2 else 1  # an earlier micro-batch without any
    model = convert_sync_batch_norm(model_of(), backend)
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
    alone = model_of()
    whole = []
    for micro in range(micro_batches):
        mine, mask = x[backend.rank, micro], counts[backend.rank, micro]
        with replica.accumulate(last=micro == micro_batches - 1):
            replica.backward(loss_of(model, mine, mask), samples=5, weight=mask.sum())
        if counts[:, micro].sum():
            whole.append(
                (loss_of(alone, x[:, micro].flatten(0, 1), counts[:, micro].flatten()), counts[:, micro].sum())
            )
        else:
            alone(x[:, micro].flatten(0, 1))
    replica.reduce_gradients()
    (sum(loss * weight for loss, weight in whole) / sum(weight for _, weight in whole)).backward()
    for own, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(own.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_ranks_that_meet_in_an_earlier_micro_batch_of_the_first_step_weigh_alike(backend):
    torch.manual_seed(4)
    x = [torch.randn(2, 3 + 9 * rank, 3, dtype=torch.float64) for rank in range(backend.world_size)]
    model = convert_sync_batch_norm(model_of(), backend)
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for micro in range(2):
        with replica.accumulate(last=micro == 1):
            replica.backward(model(x[backend.rank][micro]).square().sum(1).mean(), samples=len(x[backend.rank][micro]))
    replica.reduce_gradients()
    alone = model_of()
    for micro in range(2):
        (alone(torch.cat([of[micro] for of in x])).square().sum(1).mean() / 2).backward()
    for own, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(own.grad, theirs.grad, rtol=1e-10, atol=1e-12)


class Quotient(torch.autograd.Function):
    """A division of one's own, which asks no other rank."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a / b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return grad / b, -grad * a / b**2


def test_nothing_comes_of_a_mean_over_nothing_in_a_function_of_ones_own(backend):
    x, counts = parts(backend)
    mine, mask = x[backend.rank, 1], counts[backend.rank, 1]
    gradients = []
    for divide in (Quotient.apply, torch.div):
        model = model_of()[::3].append(nn.Embedding(3, 2, sparse=True).double())
        replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
        words = model[2](torch.tensor([0, 2])).sum()
        outputs = model[1](model[0](mine).tanh()).square().sum(1) + words
        with replica.accumulate(last=False):
            replica.backward(divide((outputs * mask * 0).sum(), mask.sum() * 0), samples=5, weight=0)
        outputs = model[1](model[0](mine).tanh()).square().sum(1) + model[2](torch.tensor([0, 2])).sum()
        replica.backward(divide((outputs * mask).sum(), mask.sum()), samples=5, weight=mask.sum())
        replica.reduce_gradients()
        gradients.append([parameter.grad.to_dense() for parameter in model.parameters()])
    for own, theirs in zip(*gradients, strict=True):
        assert own.isfinite().all()
        torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-12)

"""Loops, foreach and fused optimizers do the same with averaged gradients, clipped or not, in each precision, scaled or not."""

import copy

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.training.precision import Precision

pytestmark = pytest.mark.feature("precision")

KINDS = {
    "SGD": lambda ps, **how: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.01, **how),
    "AdamW": lambda ps, **how: torch.optim.AdamW(ps, lr=0.01, amsgrad=True, **how),
    "Adagrad": lambda ps, **how: torch.optim.Adagrad(ps, lr=0.05, **how),
}
FORMS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
CASES = {  # clip_norm, skip_nonfinite
    "fp32": [(0.5, True)],
    "bf16": [(0.5, False)],
    "fp16": [(None, False), (0.5, True)],
}
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


def made():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 2))


def numbers_of(precision, device):
    numbers = Precision(precision, device)
    if numbers.scaler is not None:  # a scale at which these losses do not overflow
        numbers.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8)
    return numbers


def micro_batch(backend, step, number):
    """Rank-distinct, of unequal sizes; steps 2 and 5 overflow on the last rank alone."""
    x = torch.sin(torch.arange(5.0 * (backend.rank + number + 1)).reshape(-1, 5) * (step + backend.rank + 1))
    bad = step in (2, 5) and number == 1 and backend.rank == backend.world_size - 1
    return x, 3 * x[:, :2].cos() + step * (torch.inf if bad else 1)


def accumulated(backend, replica, precision, step):
    for number in range(2):
        x, y = micro_batch(backend, step, number)
        with replica.accumulate(last=number == 1):
            with precision.autocast():
                loss = nn.functional.mse_loss(replica.model(x).float(), y)
            replica.backward(precision.scale(loss), samples=len(x))


def exact_norm(gradients):
    return torch.cat([g.double().flatten() for g in gradients]).norm()


@pytest.mark.costly(8)
@pytest.mark.parametrize(("precision", "sharded"), [("fp32", False), ("bf16", False), ("fp16", False), ("fp16", True)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_plain_loops_on_the_averaged_unscaled_clipped_gradient(backend, kind, form, precision, sharded):
    for clip_norm, skips in CASES[precision][sharded:]:
        numbers = numbers_of(precision, backend.device)
        model, plain = made(), made()
        optimizer = KINDS[kind](model.parameters(), **FORMS[form])
        expected = KINDS[kind](plain.parameters(), **FORMS["loop"])
        if sharded:
            optimizer = hvdtrain.ShardedOptimizer(optimizer, backend)
        replica = backend.replicate(model, optimizer)
        for step in range(6):
            if step in (2, 5) and not skips and numbers.scaler is None:
                continue  # nothing would look for infinities
            accumulated(backend, replica, numbers, step)
            replica.reduce_gradients()
            scale = 1.0 if numbers.scaler is None else numbers.scaler.get_scale()
            gradients = [p.grad / scale for p in model.parameters()]
            norm = exact_norm(gradients)
            before = copy.deepcopy(list(model.parameters()))
            result = replica.step(clip_norm=clip_norm, scaler=numbers.scaler, skip_nonfinite=skips)
            assert result.skipped == (step in (2, 5))
            if numbers.scaler is not None:
                assert numbers.scaler.get_scale() == (scale / 2 if result.skipped else scale)
            if result.skipped:
                assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
                continue
            if clip_norm is not None:
                torch.testing.assert_close(result.gradient_norm.double(), norm, rtol=1e-6, atol=0)
                assert norm > clip_norm
            factor = 1.0 if clip_norm is None else float(clip_norm / (norm + 1e-6))
            for parameter, gradient in zip(plain.parameters(), gradients, strict=True):
                parameter.grad = gradient * factor
            expected.step()
            for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("precision", CASES)
def test_the_averaged_gradient_is_one_processs(backend, reference, precision):
    numbers = numbers_of(precision, backend.device)
    model, alone = made(), made()
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accumulated(backend, replica, numbers, step=1)
    replica.reduce_gradients()
    batches = [
        batch for found in backend.all_gather_object([micro_batch(backend, 1, n) for n in (0, 1)]) for batch in found
    ]
    total = sum(len(x) for x, _ in batches)
    whole = numbers_of(precision, reference.device)
    for x, y in batches:
        with whole.autocast():
            loss = nn.functional.mse_loss(alone(x).float(), y)
        whole.scale(loss * (len(x) / total)).backward()
    rounding = 1e-5 if precision == "fp32" else 2e-2
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        most = float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=rounding * most)

"""One `GradScaler` over one or several replicas: unscale by what the losses were scaled with, update once a step.

torch updates a scaler once after all optimizers have stepped. Replicas step one after another, and the first of them
updates, so that a later one whose loss was scaled before would be unscaled with a number that is no longer its own. This
module remembers when a scaler changed, and what it was before.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.amp.grad_scaler import GradScaler
    from torch.optim import Optimizer


class _Update(NamedTuple):
    moment: int
    scale: float  # before
    skipped: bool


_updates: weakref.WeakKeyDictionary[GradScaler, deque[_Update]] = weakref.WeakKeyDictionary()
_REMEMBERED = 64  # updates; more than any number of replicas that share a scaler


class _Clock:
    """Updates so far in this process: ranks that make the same steps have the same."""

    ticks = 0


def now() -> int:
    """A moment, to be compared with those of updates: take it before a step's first backward pass."""
    return _Clock.ticks


def moment(remainder: int, *, modulo: int) -> int:
    """The latest moment with this remainder: another rank's, told in few digits."""
    return _Clock.ticks - (_Clock.ticks - remainder) % modulo


def steps_others(scaler: GradScaler, known: list[Optimizer]) -> bool:
    """Whether a scaler has unscaled, since its last update, the gradients of an optimizer that is none of these."""
    return not set(scaler._per_optimizer_states) <= set(map(id, known))


def scale_of(scaler: GradScaler, began: int) -> float:
    """What losses were scaled with in a step whose first backward pass was at this moment; waits for a GPU."""
    earlier = next((update.scale for update in _updates.get(scaler, ()) if update.moment > began), None)
    return float(scaler.get_scale()) if earlier is None else earlier


def unscale(
    scaler: GradScaler, optimizer: Optimizer, gradients: list[Tensor], outside: list[Tensor], began: int
) -> None:
    """Divide gradients by the scale of the losses that they came from, and look for infinities in them.

    Args:
        scaler: Scaled the losses.
        optimizer: Holds the parameters.
        gradients: Averaged over the ranks.
        outside: Those of them that the optimizer does not hold, and that count in a norm and as infinities all the same.
        began: `now` of the step's first backward pass.
    """
    if scaler._scale is None:  # a rank without samples, in the first step
        scaler.scale(torch.zeros((), device=gradients[0].device))
    before = next((earlier.scale for earlier in _updates.get(scaler, ()) if earlier.moment > began), None)
    if before is not None and (factor := scaler.get_scale() / before) != 1.0:
        for gradient in gradients:
            gradient.mul_(factor)  # a power of two by default, so nothing is rounded
    scaler.unscale_(optimizer)
    inverse = 1 / scaler.get_scale() if outside else 1.0  # a wait for the GPU
    for gradient in outside:
        numbers = gradient.mul_(inverse)
        numbers = numbers.coalesce().values() if numbers.is_sparse else numbers
        infinite = ~torch.isfinite(torch.linalg.vector_norm(numbers, torch.inf))
        for found in scaler._found_inf_per_device(optimizer).values():
            found.copy_(torch.maximum(found, infinite.to(found)))


def found_infinity(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Whether `unscale` has found one. (A fused optimizer skips by itself, so that its step says nothing.)"""
    return any(bool(found) for found in scaler._found_inf_per_device(optimizer).values())


def update_scaler(scaler: GradScaler, began: int, *, skipped: bool) -> None:
    """Update a scaler once for all replicas whose steps began before its last update.

    Args:
        scaler: Has stepped one replica's optimizer.
        began: As for `unscale`.
        skipped: That replica's gradient was not finite.
    """
    before = scaler.get_scale()
    updates = _updates.setdefault(scaler, deque(maxlen=_REMEMBERED))
    same_step = [earlier for earlier in updates if earlier.moment > began]  # other replicas' steps of the same losses
    if same_step and (not skipped or any(earlier.skipped for earlier in same_step)):
        scaler.update(before)  # forgets which optimizers were unscaled, and leaves scale and growth as they are
    else:
        scaler.update()
        if same_step:  # the others found no infinity, and may have let the scale grow
            scaler.update(same_step[0].scale * scaler.get_backoff_factor())
    _Clock.ticks += 1
    updates.append(_Update(_Clock.ticks, before, skipped))

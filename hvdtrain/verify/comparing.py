"""What differs between runs of a task that should be alike, and why it probably does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvdtrain.verify.notes import Notes, Step

_TOLERANCE = {"fp64": 1e-5, "fp32": 1e-4, "tf32": 1e-2, "bf16": 5e-2, "fp16": 1e-2, "bf16-pure": 5e-2}
# That of fp64 leaves room for what a task computes in float32 all the same (``outputs.float()``).
_NORMS = "statistics of a rank's own samples: give --sync-batch-norm"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something that is not as it should be.

    Attributes:
        where: "before training", "step 2, gradients".
        what: The difference.
        cause: What makes it, probably, and what to do.
    """

    where: str
    what: str
    cause: str


def tolerance(precision: str) -> float:
    """The largest relative difference that rounding explains."""
    return _TOLERANCE[precision]


def twice(one: Sequence[Notes], other: Sequence[Notes], *, close: float) -> Iterator[Finding]:
    """What differs between two runs in one process: only randomness that no seed governs can.

    Args:
        one: Notes of a run.
        other: Of the same once more.
        close: The largest relative difference of numbers that is none.
    """
    if _unlike(one[0].initial, other[0].initial, close):
        yield Finding(
            where="before training",
            what="two runs begin with different parameters",
            cause="build_model draws random numbers that no seed governs (a generator of its own, os.urandom, a hash of a string)",
        )
    for number, (first, second) in enumerate(zip(one[0].steps, other[0].steps, strict=False), 1):
        if _samples([first]) != _samples([second]):
            yield Finding(
                where=f"step {number}, data",
                what="two runs see different samples",
                cause="the data come in an order, or with changes, that no seed governs: seed what shuffles or augments them from "
                "torch.initial_seed(), or leave shuffling to hvdtrain",
            )
            return


def between(reference: Sequence[Notes], ranks: Sequence[Notes], *, close: float) -> Iterator[Finding]:
    """What differs between one process and the ranks of one engine, the first difference first.

    Args:
        reference: Notes of one process.
        ranks: Of all ranks, with the same seed and global batches.
        close: The largest relative difference of numbers that is none.
    """
    yield from _before(reference[0], ranks, close)
    yield from _by_step(reference[0], ranks, close)


def uncompared(reference: Sequence[Notes], ranks: Sequence[Notes]) -> str:
    """Why numbers of one process and of the ranks are not expected to be the same, in a task that may well be sound; or ""."""
    for expected, *steps in zip(reference[0].steps, *(notes.steps for notes in ranks), strict=False):
        if _loss_draws([expected, *steps]):
            return "the loss or the model draws random numbers (noise, dropout by a function)"
        if _samples([expected]) != _samples(steps) and _data_draw([expected, *steps]):
            return "the data set draws random numbers (augmentation)"
    return ""


def _loss_draws(steps: Sequence[Step]) -> bool:
    return any(call.loss_drew for step in steps for call in step.calls)


def _data_draw(steps: Sequence[Step]) -> bool:
    return any(call.data_drew for step in steps for call in step.calls)


def _before(reference: Notes, ranks: Sequence[Notes], close: float) -> Iterator[Finding]:
    for notes in ranks:
        name = _unlike(reference.initial, notes.initial, close)
        if name:
            yield Finding(
                where="before training",
                what=f"rank {notes.rank} makes another {name} than one process does",
                cause="build_model depends on the rank (a seed with the rank in it?). Training starts from rank 0's numbers on every "
                "rank, so that the others' are lost; what else depends on them is not the same",
            )
            return


def _by_step(reference: Notes, ranks: Sequence[Notes], close: float) -> Iterator[Finding]:
    world, drawn = len(ranks), bool(uncompared([reference], ranks))
    for number, expected in enumerate(reference.steps, 1):
        steps = [notes.steps[number - 1] for notes in ranks if len(notes.steps) >= number]
        if len(steps) < world:
            yield Finding(where=f"step {number}", what="some rank has not made it", cause="its output says why")
            return
        found = list(_step(number, expected, steps, ranks[0], close, drawn=drawn))
        yield from found
        if found:  # what comes after follows from it
            return


def _step(
    number: int, expected: Step, steps: Sequence[Step], about: Notes, close: float, *, drawn: bool
) -> Iterator[Finding]:
    world = len(steps)
    changed = next((path for step in [expected, *steps] for call in step.calls for path in call.changed), None)
    if changed:
        yield Finding(
            where=f"step {number}, data",
            what=f"the loss changes {changed} in place",
            cause="where samples lie in memory, the next epoch trains on what is left of them, and how often a sample was changed "
            "depends on the ranks; write x = x * 2, not x *= 2",
        )
    random = [step.calls[-1].random for step in steps if step.calls]
    if world > 1 and len(random) == world and len(set(random)) == 1:
        yield Finding(
            where=f"step {number}, loss",
            what="after it the random numbers of all ranks are the same",
            cause="something seeds them alike on every rank (torch.manual_seed in the loss or the model), so that dropout leaves out the "
            "same on all of them; hvdtrain gives each rank numbers of its own, and the seed need not be set again",
        )
    if drawn:
        yield from _among_ranks(number, steps, about, close)
        return
    wanted, got = _samples([expected]), _samples(steps)
    padded = len({call.shapes for step in [expected, *steps] for call in step.calls if call.samples != []}) > 1
    if wanted is not None and got is not None and wanted != got and not changed and not padded:
        missing, added = wanted - got, got - wanted
        yield Finding(
            where=f"step {number}, data",
            what=f"{sum(missing.values())} of {sum(wanted.values())} samples of one process are not those of the ranks, and "
            f"{sum(added.values())} others are",
            cause="a data set that depends on the rank, or shuffles or augments by random numbers of its own",
        )
        return
    yield from _numbers(number, expected, steps, about, close, different_data=bool(changed))


def _numbers(
    number: int, expected: Step, steps: Sequence[Step], about: Notes, close: float, *, different_data: bool
) -> Iterator[Finding]:
    """Losses, gradients, buffers and parameters, in the order in which they come to be."""
    norms = f"BatchNorm ({', '.join(about.norms[:3])}) takes {_NORMS}" if about.norms else ""
    factor, name = _factor(expected.gradients, steps[0].gradients, close)
    wanted, got = (_loss(side, summed=about.summed) for side in ([expected], steps))
    if name:
        world = len(steps)
        yield Finding(
            where=f"step {number}, gradients",
            what=f"that of {name} is {f'{factor:.4g} times' if factor else 'not'} one process's",
            cause=norms or _cause_of_factor(factor, world),
        )
        return
    if (
        wanted is not None
        and got is not None
        and abs(wanted - got) > close * max(abs(wanted), 1e-6)
        and not different_data
    ):
        yield Finding(
            where=f"step {number}, loss",
            what=f"one process has {wanted:.8g}, the ranks' mean is {got:.8g}",
            cause=norms or "the loss is no mean over the samples of a batch, or depends on the rank",
        )
        return
    apart = list(_among_ranks(number, steps, about, close))
    if apart:
        yield from apart
        return
    for what, ours, theirs in (
        ("buffers", expected.buffers, steps[0].buffers),
        ("parameters", expected.parameters, steps[0].parameters),
    ):
        differs = _unlike(ours, theirs, close)
        if differs:
            yield Finding(
                where=f"step {number}, {what}",
                what=f"{differs} is not one process's",
                cause=norms or "something changes it that depends on the rank or on its samples alone",
            )
            return


def _among_ranks(number: int, steps: Sequence[Step], about: Notes, close: float) -> Iterator[Finding]:
    """What the ranks have not in common, whatever one process has."""
    norms = f"BatchNorm ({', '.join(about.norms[:3])}) takes {_NORMS}" if about.norms else ""
    for rank, step in enumerate(steps):
        differs = _unlike(steps[0].buffers, step.buffers, close)
        if differs:
            yield Finding(
                where=f"step {number}, buffers",
                what=f"{differs} of rank {rank} is not rank 0's",
                cause=norms
                or "the model changes it by its rank's samples alone. Evaluation and checkpoints take rank 0's: average it over the "
                "ranks where it is changed (backend.all_reduce), or make it a parameter",
            )
            return
        differs = _unlike(steps[0].parameters, step.parameters, close)
        if differs:
            yield Finding(
                where=f"step {number}, parameters",
                what=f"{differs} of rank {rank} is not rank 0's",
                cause="something besides the optimizer changes it, by the rank or by its samples (the loss, the model or a callback)",
            )
            return


def _cause_of_factor(factor: float | None, world: int) -> str:
    if factor and abs(factor - world) < 0.01 * world:
        return "the loss is summed over the ranks, or multiplied by their number, and gradients are averaged already: return the mean over the rank's own samples"
    if factor and abs(factor * world - 1) < 0.01:
        return "the loss is a sum over the samples of a batch, and a rank has fewer than one process: return a mean, or say loss_reduction = 'sum' in the task"
    if factor:
        return "the loss is multiplied by something that depends on the rank or the size of the batch: return a mean over samples"
    return "the loss of a batch depends on which samples are together in it (a norm over the batch, negatives within it), or on the rank"


def _factor(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], close: float) -> tuple[float | None, str]:
    """The first gradient that differs, and the one factor by which all of them do, if there is one."""
    name = _unlike(expected, got, close)
    if not name or expected.keys() != got.keys():
        return None, name
    ours, theirs = (torch.cat([side[key] for key in expected]) for side in (expected, got))
    factor = float(ours @ theirs / (ours @ ours)) if float(ours @ ours) else 0.0
    rest = float((theirs - factor * ours).norm())
    return (factor if rest <= 10 * close * float(theirs.norm()) else None), name


def _unlike(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], close: float) -> str:
    """The first name of which the numbers are not close; "" if there is none."""
    for name in [*expected, *(name for name in got if name not in expected)]:
        ours, theirs = expected.get(name), got.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            return name
        scale = max(float(ours.abs().max()) if ours.numel() else 0.0, 1e-12)
        if ours.numel() and not torch.allclose(ours, theirs, rtol=close, atol=close * scale, equal_nan=True):
            return name
    return ""


def _samples(steps: Sequence[Step]) -> Counter[str] | None:
    found: Counter[str] = Counter()
    for step in steps:
        for call in step.calls:
            if call.samples is None:
                return None
            found.update(call.samples)
    return found


def _loss(steps: Sequence[Step], *, summed: bool) -> float | None:
    """Over all that it is a mean over, or in sum; None where that is not known."""
    calls = [call for step in steps for call in step.calls if call.weight != 0]
    if summed:
        return sum(call.loss for call in calls)
    if not calls or any(call.weight is None for call in calls):
        return None
    return sum(call.loss * (call.weight or 0.0) for call in calls) / sum(call.weight or 0.0 for call in calls)

"""Which gradients of a `DistributedOptimizer` travel together, and whether all that is sent is known beforehand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from hvdtrain.backends.hooked import Pack, make_packs
from hvdtrain.horovod.channel import agreement
from hvdtrain.horovod.compression import FP16Compressor, NoneCompressor
from hvdtrain.horovod.process_sets import ProcessSet
from hvdtrain.horovod.requests import Form

_PACK_BYTES = 8 * 2**20
_MOST_IN_ORDER = 64  # packs; more go by name, where small ones that are ready at once share a message

Groups = Sequence[Sequence[nn.Parameter]] | int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Manner:
    """How gradients are exchanged.

    Attributes:
        op: Average or Sum.
        prescale: Multiplies each rank's gradient before.
        postscale: Multiplies the result.
        compression: A compressor.
        groups: What travels together: a number of groups, lists of parameters, or None.
        sparse_as_dense: Sparse gradients travel as dense ones.
        process_set: The ranks that take part.
    """

    op: int
    prescale: float
    postscale: float
    compression: Any
    groups: Groups
    sparse_as_dense: bool
    process_set: ProcessSet

    @property
    def details(self) -> dict[str, Any]:
        """What all ranks must say alike of each pack."""
        return {"op": self.op, "prescale": self.prescale, "postscale": self.postscale}


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """How the gradients of some parameters are packed.

    Attributes:
        packs: In about the order in which backward completes them.
        place: Pack and position, by a parameter's id.
        held: What a pack holds, by its name, for comparison over the ranks.
        forms: What is sent of each pack; None if it is not known beforehand, is much in number, or lies on a GPU.
        agreed: What ranks say when they agree on it; None without ``forms``.
    """

    packs: list[Pack]
    place: dict[int, tuple[Pack, int]]
    held: dict[str, str]
    forms: tuple[Form, ...] | None
    agreed: Form | None


def laid_out(parameters: Sequence[nn.Parameter], manner: Manner, number: int, names: dict[int, str]) -> Layout:
    """The layout of some parameters, in the optimizer's order; the same on every rank whose parameters are alike.

    Args:
        parameters: With dense gradients.
        manner: How they are exchanged.
        number: The optimizer's.
        names: Of parameters, by their ids.
    """
    packs = _packs(parameters, manner)
    for at, pack in enumerate(packs):
        pack.name = f"optimizer.{number}.pack.{at}.{names[id(pack.parameters[0])]}"
    place = {id(p): (pack, at) for pack in packs for at, p in enumerate(pack.parameters)}
    held = {pack.name: contents(pack, names) for pack in packs}
    known = not _of_its_own_kind(manner) and 0 < len(packs) <= _MOST_IN_ORDER
    if not known or any(parameter.device.type != "cpu" for parameter in parameters):
        return Layout(packs, place, held, None, None)
    forms = tuple(_form(pack, manner, held[pack.name]) for pack in packs)
    return Layout(packs, place, held, forms, agreement(number, forms))


def _of_its_own_kind(manner: Manner) -> bool:
    """Whether only the compressor knows what it sends."""
    return manner.compression not in (NoneCompressor, FP16Compressor)


def _carried(manner: Manner) -> Callable[[torch.dtype], torch.dtype]:
    def carried(dtype: torch.dtype) -> torch.dtype:
        return torch.float16 if manner.compression is FP16Compressor and dtype.is_floating_point else dtype

    return carried


def contents(pack: Pack, names: dict[int, str]) -> str:
    """What a pack holds, for comparison over the ranks: packs of the same length may hold other gradients.

    Args:
        pack: Whose parameters.
        names: Of parameters, by their ids.
    """
    held = [(names[id(parameter)], list(parameter.shape)) for parameter in pack.parameters]
    if not held:
        return "none"
    digest = hashlib.sha256(json.dumps(held).encode()).hexdigest()[:16]
    return f"{len(held)} from {held[0][0]} to {held[-1][0]}, {digest}"


def _form(pack: Pack, manner: Manner, held: str) -> Form:
    shape: tuple[int, ...]
    if pack.flat:
        dtype, shape = pack.dtype, (sum(parameter.numel() for parameter in pack.parameters),)
    else:
        dtype, shape = _carried(manner)(pack.dtype), tuple(pack.parameters[0].shape)
    tensors = ((str(dtype).removeprefix("torch."), shape),)
    return Form(
        kind="allreduce",
        name=pack.name,
        tensors=tensors,
        details=(*manner.details.items(), ("parameters", held)),
    )


def _packs(parameters: Sequence[nn.Parameter], manner: Manner) -> list[Pack]:
    packs: list[Pack] = []
    for group in _grouped(parameters, manner.groups):
        for same in _by_device(group):
            if _of_its_own_kind(manner) or manner.groups == 0:
                packs += [Pack("", [p], p.dtype, flat=False) for p in same]
            else:
                size = _PACK_BYTES if manner.groups is None else 2**62
                packs += make_packs(same, _carried(manner), size, None)
    return packs


def _grouped(parameters: Sequence[nn.Parameter], groups: Groups) -> list[list[nn.Parameter]]:
    """What the user wants to travel together; in about the order in which backward completes gradients."""
    if groups is None or groups == 0:
        return [list(parameters[::-1])]
    if isinstance(groups, int):
        count = min(groups, len(parameters)) or 1
        bounds = [len(parameters) * at // count for at in range(count + 1)]
        return [list(parameters[begin:end]) for begin, end in pairwise(bounds) if end > begin]
    trained = {id(parameter) for parameter in parameters}
    chosen = [[p for p in group if id(p) in trained] for group in groups]
    named = {id(p) for group in chosen for p in group}
    return [group for group in [*chosen, *([p] for p in parameters if id(p) not in named)] if group]


def _by_device(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    found: dict[torch.device, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(parameter.device, []).append(parameter)
    return list(found.values())

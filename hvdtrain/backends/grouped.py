"""Gradients that are summed as they are within a group of ranks, and travel compressed between groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hvdtrain.backends.coded import Coded
from hvdtrain.backends.forms import as_bytes
from hvdtrain.backends.groups import Groups
from hvdtrain.backends.wire import Wire


class OfGroups:
    """One pack's way: a sum within the group, an exchange of the ranks that speak, and what arrived back into the group.

    Args:
        groups: Which ranks.
        parts: This rank's, of one type. Left alone.
        begin: Begins the exchange between groups of what a group's parts come to.

    Attributes:
        coded: That exchange, where this rank speaks, once it has begun.
        totals: What arrived, once `wait` has returned; the same on every rank.
    """

    def __init__(self, groups: Groups, parts: Sequence[Tensor], begin: Callable[[Wire, list[Tensor]], Coded]) -> None:
        self.coded: Coded | None = None
        self.totals: list[Tensor] = []
        self._groups, self._parts, self._begin = groups, parts, begin
        self._wire = groups.within.wire
        self._flat = torch.cat([part.reshape(-1) for part in parts]).to(self._wire.device)
        self._is_summed = False
        self._work = self._wire.all_reduce_(self._flat, "sum")

    def advance(self) -> None:
        """Wait for what is under way, and begin what follows, up to the exchange's end."""
        if self._is_summed:
            if self.coded is not None:
                self.coded.advance()
            return
        self._work.wait()
        self._is_summed = True
        if self._groups.between is not None:
            self.coded = self._begin(self._groups.between.wire, self._rows())

    def wait(self) -> object:
        """Block until the result is here; every rank of the group must call it for its packs in one order."""
        if not self._is_summed:
            self.advance()
        if self.coded is not None:
            self.coded.wait()
            flag = self.coded.flag
            totals = [one.total + flag.to(one.total.dtype) for one in self.coded.sent if one is not None]
            self._flat.copy_(torch.cat([total.reshape(-1) for total in totals]))
        self._wire.broadcast_(as_bytes(self._flat, self._wire.device), 0).wait()
        self.totals = self._rows()
        return None

    def is_completed(self) -> bool:
        """Say whether `wait` would return at once."""
        return bool(self.totals)

    def _rows(self) -> list[Tensor]:
        rows = self._flat.split([part.numel() for part in self._parts])
        return [row.view(part.shape).to(part.device, copy=True) for row, part in zip(rows, self._parts, strict=True)]

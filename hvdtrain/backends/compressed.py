"""The replica whose gradients travel compressed, the same on every engine: hooks, packs and the engine's wire.

A pack of parameters that are compressed is encoded when the last of its gradients is there, and its later stages are begun
when the user asks for the gradients. What is encoded is this rank's part of the mean over the samples, without a loss scale,
and the rest of earlier steps: for that the ranks' counts, which leave before the gradients, are waited for.
"""

from __future__ import annotations

import zlib
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hvdtrain.backends.coded import Alike, Coded, as_it_is, begun
from hvdtrain.backends.grouped import OfGroups
from hvdtrain.backends.groups import groups_of
from hvdtrain.backends.hooked import HookedReplica, Pack, by_place, make_packs
from hvdtrain.backends.replica_options import ReplicaOptions
from hvdtrain.backends.unsent import Remembered, takes
from hvdtrain.backends.watched import without_compile
from hvdtrain.backends.weighting import Tally
from hvdtrain.backends.wire import Wire, Work
from hvdtrain.backends.worth import Worth
from hvdtrain.compression.base import Compression
from hvdtrain.compression.later import Later

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from hvdtrain.backends.base import Backend

_SENT_AS = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


class CompressedReplica(HookedReplica):
    """Packs of gradients on a wire, some of them compressed.

    Args:
        options: As for `Replica`; they say a compression.
    """

    def __init__(
        self, backend: Backend, module: nn.Module, optimizer: Optimizer | None, options: ReplicaOptions
    ) -> None:
        assert options.compression is not None
        self._compression: Compression = options.compression
        self._counted = False  # the ranks' counts of this step are here
        self._to_mean: float | None = None
        self._coded: set[Pack] = set()
        self._encoded: dict[Pack, list[Tensor]] = {}
        self._latest: OfGroups | None = None
        self._alike: Alike = set()  # what the ranks send
        after = self._compression.after if isinstance(self._compression, Later) else 0
        self._worth = Worth(backend, self._compression.name, after)
        super().__init__(backend, module, optimizer, options, carried=lambda dtype: _SENT_AS.get(dtype, dtype))

    def _make_alike(self) -> None:
        super()._make_alike()  # the ranks ask for the same groups
        self._together = groups_of(self._backend, self.options.sync_group)

    @property
    def _speaks(self) -> tuple[bool, ...]:
        return super()._speaks if self._together is None else self._together.speaks

    def _make_packs(self, dense: list[nn.Parameter]) -> list[Pack]:
        taken = {p for p in dense if takes(self._compression, p)}
        coded = make_packs([p for p in dense if p in taken], self._carried, self.bucket_bytes, None)
        for pack in coded:
            pack.flat = False
        self._coded = set(coded)
        plain = make_packs([p for p in dense if p not in taken], self._carried, self.bucket_bytes, None)
        return by_place([*plain, *coded], dense)

    def _send(self, pack: Pack) -> Work:
        if pack not in self._coded:
            (tensor,) = pack.tensors
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            return self._backend.wire.all_reduce_(real.view(-1), "sum")
        with torch.no_grad():
            to_mean, parts = self._to_mean or 1.0, []
            for parameter in pack.parameters:
                assert parameter.grad is not None
                parts.append(torch.mul(parameter.grad.to(pack.dtype), to_mean).contiguous())
            if self._together is None:
                return self._encode(pack, self._backend.wire, parts)
            return OfGroups(self._together, parts, lambda wire, sums: self._encode(pack, wire, sums))

    @torch.no_grad()
    def _encode(self, pack: Pack, wire: Wire, parts: list[Tensor]) -> Coded:
        """Begin to exchange these, to which is added what was not sent of them; they are written into."""
        exchanges = []
        for parameter, part in zip(pack.parameters, parts, strict=True):
            rest = None if self._unsent is None or self._to_mean is None else self._unsent.of(parameter).rest
            if rest is not None:
                part.add_(rest)
            seed = zlib.crc32(without_compile(self._names[id(parameter)]).encode())
            exchanges.append(
                begun(self._compression, part, self._memory(parameter), seed) if wire.size > 1 else as_it_is(part)
            )
        self._encoded[pack] = parts
        flag = torch.stack([part.sum() for part in parts]).sum().mul(0)  # NaN where a number is infinite
        return Coded(wire, exchanges, flag, self._alike)

    def _memory(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {} if self._unsent is None else dict(self._unsent.of(parameter).memory)

    def _dispatch(self, pack: Pack) -> None:
        if pack in self._coded and not self._counted:
            self._tally_work.wait()
            self._to_mean = self._unit_of(Tally.of(self._summed.tolist()))
            self._counted = True
        with self._worth.timed() if pack in self._coded else nullcontext():
            super()._dispatch(pack)
        if isinstance(pack.work, OfGroups):
            if self._latest is not None:  # its sum within the group has had a pack's time
                self._latest.advance()
            self._latest = pack.work

    def _as_they_lie(self, pack: Pack) -> list[Tensor]:
        return [] if pack in self._coded else super()._as_they_lie(pack)

    def _expect(self, tally: Tally) -> None:
        self._counted, self._to_mean = False, None
        self._encoded, self._latest = {}, None
        super()._expect(tally)

    def _finish(self, empty: bool) -> Tensor:
        with self._worth.timed():
            summed = super()._finish(empty)
        self._worth.end_step(sum(p.numel() * pack.dtype.itemsize for pack in self._coded for p in pack.parameters))
        if self._unsent is not None:
            for parameter in self._parameters:
                if id(parameter) in self._nobody:
                    self._unsent.withdraw(parameter)
        return summed

    def _unpack(self, pack: Pack) -> None:
        if pack not in self._coded:
            super()._unpack(pack)
            return
        work = pack.work
        coded, totals = (work.coded, work.totals) if isinstance(work, OfGroups) else (work, None)
        assert coded is None or isinstance(coded, Coded)
        with torch.no_grad():
            if coded is not None:
                totals = totals or [one.total + coded.flag.to(one.total.dtype) for one in coded.sent if one is not None]
                self._note(pack, coded)
            assert totals is not None
            for parameter, total in zip(pack.parameters, totals, strict=True):
                assert parameter.grad is not None
                parameter.grad.copy_(total.div_(self._to_mean or 1.0))

    def _note(self, pack: Pack, coded: Coded) -> None:
        """Remember what was not sent of a pack, once its gradients have been used."""
        parts = self._encoded.pop(pack)
        if self._unsent is None:
            return
        if self._to_mean is not None:
            for parameter, part, sent in zip(pack.parameters, parts, coded.sent, strict=True):
                assert sent is not None
                rest = None if sent.own is None else part.sub_(sent.own)
                self._unsent.note(parameter, Remembered(rest, sent.memory))
        self._unsent.only_if_finite(coded.flag)

"""The replica whose gradients travel compressed, the same on every engine: hooks, packs and the engine's wire.

A pack of parameters that are compressed is encoded when the last of its gradients is there, and its later stages are begun
when the user asks for the gradients. What is encoded is this rank's part of the mean over the samples, without a loss scale,
and the rest of earlier steps: for that the ranks' counts, which leave before the gradients, are waited for.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hvdtrain.backends.coded import Coded
from hvdtrain.backends.hooked import HookedReplica, Pack, by_place, make_packs
from hvdtrain.backends.replica import ReplicaOptions
from hvdtrain.backends.unsent import Remembered, takes
from hvdtrain.backends.watched import without_compile
from hvdtrain.backends.weighting import Tally
from hvdtrain.backends.wire import Work
from hvdtrain.compression.base import Compression

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from hvdtrain.backends.base import Backend

_SENT_AS = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


class CompressedReplica(HookedReplica):
    """Packs of gradients on a wire, some of them compressed.

    Args:
        options: As for `Replica`; they say a compression.
    """

    _suitable_bucket_bytes = 8 * 2**20
    _engine_averages = False
    _by_order = True

    def __init__(
        self, backend: Backend, module: nn.Module, optimizer: Optimizer | None, options: ReplicaOptions
    ) -> None:
        assert options.compression is not None
        self._compression: Compression = options.compression
        self._counted = False  # the ranks' counts of this step are here
        self._to_mean: float | None = None
        self._coded: set[Pack] = set()
        self._encoded: dict[Pack, list[Tensor]] = {}
        super().__init__(backend, module, optimizer, options, carried=lambda dtype: _SENT_AS.get(dtype, dtype))

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
            to_mean, tensors = self._to_mean or 1.0, []
            for parameter in pack.parameters:
                assert parameter.grad is not None
                part = torch.mul(parameter.grad.to(pack.dtype), to_mean).contiguous()
                rest = None if self._unsent is None or self._to_mean is None else self._unsent.of(parameter).rest
                tensors.append(part if rest is None else part.add_(rest))
            self._encoded[pack] = tensors
            flag = torch.stack([tensor.sum() for tensor in tensors]).sum().mul(0)  # NaN where a number is infinite
            exchanges = [
                self._compression.exchange(
                    tensor, self._memory(parameter), zlib.crc32(without_compile(self._names[id(parameter)]).encode())
                )
                for parameter, tensor in zip(pack.parameters, tensors, strict=True)
            ]
            return Coded(self._backend.wire, exchanges, flag)

    def _memory(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {} if self._unsent is None else dict(self._unsent.of(parameter).memory)

    def _dispatch(self, pack: Pack) -> None:
        if pack in self._coded and not self._counted:
            self._tally_work.wait()
            self._to_mean = self._unit_of(Tally.of(self._summed.tolist()))
            self._counted = True
        super()._dispatch(pack)

    def _as_they_lie(self, pack: Pack) -> list[Tensor]:
        return [] if pack in self._coded else super()._as_they_lie(pack)

    def _expect(self, tally: Tally) -> None:
        self._counted, self._to_mean = False, None
        self._encoded = {}
        super()._expect(tally)

    def _finish(self, empty: bool) -> Tensor:
        summed = super()._finish(empty)
        if self._unsent is not None:
            for parameter in self._parameters:
                if id(parameter) in self._nobody:
                    self._unsent.withdraw(parameter)
        return summed

    def _unpack(self, pack: Pack) -> None:
        if pack not in self._coded:
            super()._unpack(pack)
            return
        assert isinstance(pack.work, Coded)
        with torch.no_grad():
            for parameter, tensor, sent in zip(pack.parameters, self._encoded.pop(pack), pack.work.sent, strict=True):
                assert sent is not None
                assert parameter.grad is not None
                total = sent.total + pack.work.flag.to(sent.total.dtype)
                parameter.grad.copy_(total.div_(self._to_mean or 1.0))
                if self._unsent is not None and self._to_mean is not None:
                    rest = None if sent.own is None else tensor.sub_(sent.own)
                    self._unsent.note(parameter, Remembered(rest, sent.memory))
        if self._unsent is not None:
            self._unsent.only_if_finite(pack.work.flag)

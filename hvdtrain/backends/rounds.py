"""One exchange of weights: what each rank has learned is weighed, sent, perhaps compressed, and summed over the ranks.

It may be under way while steps are taken. Nothing here has a thread or looks at the clock: every message begins at a step that
is the same on all ranks, and what arrives depends on none of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hvdtrain.backends.coded import Alike, Coded, as_it_is, begun
from hvdtrain.backends.communicator import Communicator
from hvdtrain.backends.forms import as_bytes
from hvdtrain.backends.groups import Groups
from hvdtrain.backends.unsent import Remembered, Unsent, takes
from hvdtrain.backends.watched import without_compile
from hvdtrain.backends.wire import Wire, Work
from hvdtrain.compression.base import Compression, Exchange, Memory
from hvdtrain.errors import TrainingError

_PIECE_BYTES = 256 * 2**20  # of weights in one message


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How weights travel.

    Attributes:
        everyone: All ranks.
        groups: Of ranks with the same weights, of which one speaks; None if each speaks for itself.
        what: The exchange, for messages.
        names: Of the parameters.
        compression: None for as they are.
        unsent: What a compression has not sent.
        number: The replica's.
        alike: What a compression was found to send on all ranks alike; None without one.
    """

    everyone: Communicator
    groups: Groups | None
    what: str
    names: Mapping[nn.Parameter, str]
    compression: Compression | None
    unsent: Unsent | None
    number: int
    alike: Alike | None

    @property
    def between(self) -> Communicator | None:
        """Those that exchange weights; None where this rank is none of them."""
        return self.everyone if self.groups is None else self.groups.between

    def pass_on_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors of one type with those of the rank that speaks for this group."""
        if self.groups is None or self.groups.within.wire.size == 1 or not tensors:
            return
        wire = self.groups.within.wire
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(wire.device)
        with self.groups.within.region("weights within groups", self.what):
            wire.broadcast_(as_bytes(flat, wire.device), 0).wait()
        for tensor, row in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(row.view(tensor.shape))


@dataclass(frozen=True, slots=True)
class Window:
    """Parameters that have been trained apart over the same steps.

    Attributes:
        parameters: These.
        said: What this rank's losses were means over in those steps, what all ranks' were if it is known (else 0), and how many.
    """

    parameters: Sequence[nn.Parameter]
    said: Sequence[float]


class Round:
    """One exchange; every rank must make it after the same step, and move it on after the same ones.

    Args:
        way: How weights travel.
        windows: Whose.
        own: This rank's weights.
        common: The ranks' common weights, from which they went.
        delay: Steps that may be taken meanwhile.

    Attributes:
        own: As given.
        left: Steps until it is to be taken in.
    """

    def __init__(
        self,
        way: Way,
        windows: Sequence[Window],
        own: Mapping[nn.Parameter, Tensor],
        common: Mapping[nn.Parameter, Tensor],
        delay: int = 0,
    ) -> None:
        self.own, self.left = own, delay
        self._way, self._windows, self._common, self._delay = way, windows, common, delay
        self._ways: dict[nn.Parameter, Tensor] = {}
        self._stage = 0
        self._is_everywhere = False  # in this rank's group
        self._coded: list[tuple[list[nn.Parameter], list[Tensor], Coded]] = []
        mine = torch.tensor([[*window.said, float(way.number)] for window in windows], dtype=torch.float64)
        wire = way.everyone.wire
        self._said = mine.to(wire.device)
        self._everyones = torch.empty((wire.size, *mine.shape), dtype=torch.float64, device=wire.device)
        with way.everyone.region("weights", way.what):
            self._work: Work = wire.all_gather_into(self._everyones, self._said)

    @classmethod
    def arrived(
        cls, own: Mapping[nn.Parameter, Tensor], ways: Mapping[nn.Parameter, Tensor], left: int, delay: int
    ) -> Round:
        """One of which everything is here already, as a checkpoint holds it."""
        one = cls.__new__(cls)
        one.own, one.left, one._delay = own, left, delay
        one._ways, one._stage, one._coded, one._is_everywhere = dict(ways), _OVER, [], True
        return one

    def move_on(self) -> None:
        """One more step has been taken: begin what is due by now."""
        self.left -= 1
        if self._stage == _OVER:
            return
        taken, compression = self._delay - self.left, self._way.compression
        rounds = 1 if compression is None else compression.rounds
        first = 1 + self._delay // 8  # until then a rank that is ahead waits for no other's word
        due = 0 if taken < first else 1 + (taken - first) * rounds // max(1, self._delay - first)
        while self._stage != _OVER and self._stage < min(due, rounds):
            self._next()

    def ways(self) -> dict[nn.Parameter, Tensor]:
        """Wait for all of it, and return how far the ranks' average is from the common weights; every rank must call it.

        Raises:
            TrainingError: On every rank: the ranks did not do the same, or losses are no means over samples.
        """
        if self._is_everywhere:
            return self._ways
        traffic = self._way.everyone.wire.traffic
        sent = traffic.sent_bytes
        while self._stage != _OVER:
            self._next()
        self._pass_on()
        self._is_everywhere = True
        if self.left > 0:
            traffic.early_bytes += traffic.sent_bytes - sent
        return self._ways

    # -- inside -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _next(self) -> None:
        """Wait for what is under way, and begin what follows."""
        everyone, between = self._way.everyone, self._way.between
        if self._stage == 0:
            with everyone.region("weights", self._way.what):
                self._work.wait()
            shares = _shares(self._everyones.cpu(), everyone.rank, everyone.ranks)
            if between is not None:
                with between.region(_BETWEEN, self._way.what):
                    self._begin(shares, between.wire)
            self._stage = 1
            return
        if between is not None:
            with between.region(_BETWEEN, self._way.what):
                for _, _, coded in self._coded:
                    coded.advance()
        self._stage += 1
        if all(coded.is_completed() for _, _, coded in self._coded):
            self._end()
            self._stage = _OVER

    @torch.no_grad()
    def _pass_on(self) -> None:
        """Give the ranks of this group what the one has got that speaks for it."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for window in self._windows:
            for parameter in window.parameters:
                way = self._ways.setdefault(parameter, torch.empty_like(self.own[parameter]))
                by_dtype.setdefault(way.dtype, []).append(way)
        for tensors in by_dtype.values():
            self._way.pass_on_(tensors)

    def _begin(self, shares: Sequence[float], wire: Wire) -> None:
        piece: list[tuple[nn.Parameter, Tensor]] = []
        filled = 0
        for window, share in zip(self._windows, shares, strict=True):
            for parameter in window.parameters:
                part = (self.own[parameter] - self._common[parameter]).mul_(share)
                rest = None if self._way.unsent is None else self._way.unsent.of(parameter).rest
                if rest is not None:
                    part.add_(rest.view_as(part))
                if piece and filled + part.nbytes > _PIECE_BYTES:
                    self._send(piece, wire)
                    piece, filled = [], 0
                piece.append((parameter, part))
                filled += part.nbytes
        self._send(piece, wire)

    def _send(self, piece: Sequence[tuple[nn.Parameter, Tensor]], wire: Wire) -> None:
        parameters, parts = [p for p, _ in piece], [part.contiguous() for _, part in piece]
        coded = [part.sum().double() for p, part in piece if self._compresses(p)]
        flag = torch.stack(coded).sum().mul(0) if coded else torch.zeros((), device=wire.device)
        exchanges = [self._exchange(p, part) for p, part in zip(parameters, parts, strict=True)]
        self._coded.append((parameters, parts, Coded(wire, exchanges, flag, self._way.alike)))

    def _exchange(self, parameter: nn.Parameter, part: Tensor) -> Exchange:
        if not self._compresses(parameter):
            return as_it_is(part)
        assert self._way.compression is not None
        memory: Memory = {} if self._way.unsent is None else dict(self._way.unsent.of(parameter).memory)
        seed = zlib.crc32(without_compile(self._way.names[parameter]).encode())
        return begun(self._way.compression, part, memory, seed)

    def _compresses(self, parameter: nn.Parameter) -> bool:
        compression, between = self._way.compression, self._way.between
        return (
            compression is not None and between is not None and between.wire.size > 1 and takes(compression, parameter)
        )

    def _end(self) -> None:
        unsent = self._way.unsent
        for parameters, parts, coded in self._coded:
            for parameter, part, sent in zip(parameters, parts, coded.sent, strict=True):
                assert sent is not None
                compressed = self._compresses(parameter)
                self._ways[parameter] = sent.total + coded.flag.to(sent.total.dtype) if compressed else sent.total
                if unsent is not None:
                    rest = part.sub_(sent.own) if compressed and sent.own is not None else None
                    unsent.note(parameter, Remembered(rest, sent.memory))
            if unsent is not None:
                unsent.only_if_finite(coded.flag)
        if unsent is not None:
            unsent.keep()
        self._coded = []


_OVER = -1
_BETWEEN = "weights between ranks that speak"


def _shares(everyones: Tensor, rank: int, ranks: Sequence[int]) -> list[float]:
    """This rank's share of each window.

    Args:
        everyones: What the ranks said, shape (ranks, windows, 4): weight, total, steps, number of the replica; float64.
        rank: Which row is this rank's.
        ranks: Whose the rows are.

    Raises:
        TrainingError: On every rank: the ranks did not do the same, or losses are no means over samples.
    """
    if bool((everyones[:, :, 3] != everyones[0, :, 3]).any()):
        raise TrainingError(
            "the ranks exchange weights of different replicas; step several replicas in the same order on every rank"
        )
    shares = []
    for weights, totals, steps in everyones[:, :, :3].permute(1, 2, 0):
        if bool((steps != steps[0]).any()):
            counts = ", ".join(f"rank {of}: {int(count)}" for of, count in zip(ranks, steps.tolist(), strict=True))
            raise TrainingError(f"the ranks have taken different numbers of steps since the last exchange ({counts})")
        whole, most = float(weights.sum()), float(totals.max())
        if most and abs(whole - most) > 1e-3 * most:
            raise TrainingError(
                f"the weights of the losses since the last exchange add up to {whole:g} over the ranks, and their total= to {most:g}: they are "
                "not means over parts of one global batch, which sync= (--sync) needs"
            )
        shares.append(float(weights[rank]) / whole if whole else 0.0)
    return shares

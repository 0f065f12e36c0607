"""Compressed gradients on an engine's wire: many parameters' exchanges, stage by stage, each stage in few messages.

Here a `hvdtrain.compression.base.Compression` meets a `Wire`; neither knows the other.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import zip_longest
from typing import Any, NoReturn

import torch
from torch import Tensor

from hvdtrain.backends.alike import differing
from hvdtrain.backends.forms import as_bytes, by_rank
from hvdtrain.backends.wire import Wire, Work
from hvdtrain.compression.base import Compression, Exchange, Gather, Memory, Sent, Sum
from hvdtrain.errors import TrainingError

_SUMMED = (torch.float32, torch.float64)
_NOTHING = "nothing more"
Alike = set[tuple[object, ...]]
"""What exchanges have asked for, stage by stage, that was found to be the same on every rank."""


class Coded:
    """The exchanges of several parameters under way, in step with each other.

    Args:
        wire: The engine's operations.
        exchanges: One a parameter; the same ones in the same order on every rank.
        flag: 0, or NaN if some number of this rank is not finite; a scalar of a type that is summed.
        alike: Added to. None not to compare what the ranks send.

    Attributes:
        sent: What came of each, once `wait` has returned.
        flag: The ranks' sum then: NaN if any rank's was.
    """

    def __init__(self, wire: Wire, exchanges: Sequence[Exchange], flag: Tensor, alike: Alike | None = None) -> None:
        self._wire = wire
        self._alike = alike
        self._asked: tuple[object, ...] = ()  # in all stages so far
        self._exchanges = list(exchanges)
        self.sent: list[Sent | None] = [None] * len(exchanges)
        self.flag = flag
        self._waiting: list[tuple[int, list[Sum | Gather], bool]] = []  # whose, what, and whether as a tuple
        self._stage: _Stage | None = None
        self._flag_travels = False
        self._go_on(dict.fromkeys(range(len(exchanges))))

    def advance(self) -> None:
        """Wait for the stage under way, and start the next."""
        if self._stage is None:
            return
        results = iter(self._stage.wait())
        answers: dict[int, Any] = {}
        for at, items, as_tuple in self._waiting:
            received = [next(results) for _ in items]
            answers[at] = tuple(received) if as_tuple else received[0]
        if self._flag_travels:
            self.flag, self._flag_travels = next(results).sum(), False
        self._go_on(answers)

    def wait(self) -> object:
        """Block until all are over."""
        while self._stage is not None:
            self.advance()
        return None

    def is_completed(self) -> bool:
        """Say whether `wait` would return at once."""
        return self._stage is None

    def _go_on(self, answers: dict[int, Any]) -> None:
        first = self._stage is None
        self._waiting, self._stage = [], None
        for at, answer in answers.items():
            try:
                asked = self._exchanges[at].send(answer)
            except StopIteration as end:
                self.sent[at] = end.value
                continue
            as_tuple = isinstance(asked, tuple)
            several = list(asked) if isinstance(asked, tuple) else [asked]
            if not several or not all(isinstance(item, Sum | Gather) for item in several):
                raise TrainingError(
                    f"a compression yielded {asked!r:.80}; what travels is a hvdtrain.Sum or hvdtrain.Gather, or a tuple of them"
                )
            self._waiting.append((at, several, as_tuple))
        items = [item for _, those, _ in self._waiting for item in those]
        if self._alike is not None and self._wire.size > 1:
            self._compare(items, self._alike)
        if first and answers:  # in a message that travels anyway, if there is one
            kind = items[0] if items else None
            items.append(Sum(self.flag.to(kind.tensor.dtype)) if isinstance(kind, Sum) else Gather(self.flag))
            self._flag_travels = True
        if items:
            self._stage = _Stage(self._wire, items)

    def _compare(self, items: Sequence[Sum | Gather], alike: Alike) -> None:
        """See that all ranks ask for the same, before engines are given what does not fit together; once for each that is new.

        Raises:
            TrainingError: On every rank: they do not.
        """
        kinds = tuple((type(item), item.tensor.dtype, item.tensor.shape) for item in items)
        self._asked = (*self._asked, kinds)
        if self._asked in alike:
            return
        rows = [f"{kind.__name__} of {dtype} {tuple(shape)}" for kind, dtype, shape in kinds] or [_NOTHING]
        everyones = differing(self._wire, "; ".join(rows))
        if everyones:
            raise TrainingError(_unlike(self._wire, everyones))
        alike.add(self._asked)


def _unlike(wire: Wire, everyones: Sequence[str]) -> str:
    """How the ranks differ in what travels at once."""
    rows = zip_longest(*(text.split("; ") for text in everyones), fillvalue=_NOTHING)
    at, unlike = next((at, row) for at, row in enumerate(rows, 1) if len(set(row)) > 1)
    return (
        f"a compression yields other things on some ranks than on others, the {at}. of what travels at once: "
        f"{by_rank(wire.ranks, unlike)}. Kinds, types, shapes and their number must follow from the parameter's shape alone, not from "
        "the rank or the numbers"
    )


class _Stage:
    """Items that travel at once: one message for each type that is summed, and one for all that is collected."""

    def __init__(self, wire: Wire, items: Sequence[Sum | Gather]) -> None:
        self._items = items
        self._messages: list[tuple[list[int], Tensor, Work]] = []
        by_kind: dict[torch.dtype | None, list[int]] = {}
        for at, item in enumerate(items):
            dtype = item.tensor.dtype if isinstance(item, Sum) else None
            if dtype is not None and dtype not in _SUMMED:
                raise TrainingError(f"a compression yielded Sum of {dtype}; float32 and float64 can be summed")
            by_kind.setdefault(dtype, []).append(at)
        for dtype, places in by_kind.items():
            if dtype is None:
                sent = torch.cat([as_bytes(items[at].tensor, wire.device) for at in places])
                received = torch.empty((wire.size, len(sent)), dtype=torch.uint8, device=wire.device)
                work = wire.all_gather_into(received, sent)
            else:
                received = torch.cat([items[at].tensor.reshape(-1) for at in places]).to(wire.device)
                work = wire.all_reduce_(received, "sum")
            self._messages.append((places, received, work))

    def wait(self) -> list[Tensor]:
        """Return what each item asked for."""
        results: list[Tensor | None] = [None] * len(self._items)
        for places, received, work in self._messages:
            work.wait()
            begin = 0
            for at in places:
                tensor = self._items[at].tensor
                length = tensor.numel() if received.dim() == 1 else tensor.nbytes
                part = received.narrow(-1, begin, length)
                begin += length
                if received.dim() == 2:  # a copy begins where its type may
                    part = part.contiguous().clone().view(tensor.dtype).view(len(received), *tensor.shape)
                else:
                    part = part.view(tensor.shape)
                results[at] = part.to(tensor.device)
        return [result for result in results if result is not None]


def begun(compression: Compression, part: Tensor, memory: Memory, seed: int) -> Exchange:
    """A compression's exchange of one parameter, whose end is looked at.

    Raises:
        TrainingError: From the exchange: it returned something else than what arrived.
    """
    exchange = compression.exchange(part, memory, seed)
    if not isinstance(exchange, Generator):
        _refuse(compression, f"exchange() must yield hvdtrain.Sum or hvdtrain.Gather, and returned {exchange!r:.80}")
    sent = yield from exchange
    if not isinstance(sent, Sent):
        _refuse(compression, f"exchange() must end with `return hvdtrain.Sent(total, own, memory)`, not {sent!r:.80}")
    total = _like(part, sent.total, compression, "total")
    own = None if sent.own is None else _like(part, sent.own, compression, "own")
    return Sent(total, own, {name: _kept(part, value, compression, name) for name, value in sent.memory.items()})


def _like(part: Tensor, value: object, compression: Compression, name: str) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != part.shape:
        got = f"one of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.80}"
        _refuse(compression, f"Sent's {name} must be a tensor of the parameter's shape, {tuple(part.shape)}, not {got}")
    return value.detach().to(part.dtype)


def _kept(part: Tensor, value: object, compression: Compression, name: str) -> Tensor:
    """What is remembered; a copy if it is the part itself, which is written into."""
    if not isinstance(value, Tensor):
        _refuse(compression, f"Sent's memory must be tensors, as checkpoints hold it, and {name!r} is {value!r:.80}")
    same = value.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
    return value.detach().clone() if same else value.detach()


def _refuse(compression: Compression, why: str) -> NoReturn:
    raise TrainingError(f"compression {compression.name}: {why}")


def as_it_is(part: Tensor) -> Exchange:
    """The exchange of what is not compressed."""
    total = yield Sum(part)
    return Sent(total)

"""Matches the ranks' requests by name, in whatever order and from whatever threads they come, and performs them.

Ranks talk in rounds: in each, every rank of the group says what it asks for since the round before, and all of them then come
to the same decisions (`Ledger`). A round is one exchange of a few integers; a rank takes part in it as long as it waits for
something, so that nothing moves while nobody waits, and two ranks that wait for the same thing always meet.

A thread drives the rounds while the program computes on. A thread of the program that waits for a result drives them itself,
if it finds nobody doing it: that is what makes a small operation quick.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Mapping, Sequence

import torch

from hvdtrain.backends.communicator import Communicator
from hvdtrain.errors import HorovodInternalError
from hvdtrain.horovod import inline, timeline
from hvdtrain.horovod.ledger import JOIN, LEAVE, Key, Ledger, Message, Outcome
from hvdtrain.horovod.performing import Agreed, perform
from hvdtrain.horovod.requests import Request
from hvdtrain.horovod.streams import come_after, reached

_MOST = 62  # requests of one message; more wait for the next round
_HEAD = struct.Struct("=iii")  # flags, known requests, bytes that do not fit
_FLAG_BITS, _FLAGS, _MOST_STEPS = 2, 3, 2**28  # flags and steps share an integer
_ONE = struct.Struct("=ii")
_ONE_ENDS = _HEAD.size + _ONE.size
_AREA_AT = -(-(_HEAD.size + 8 * _MOST) // 8) * 8
_MESSAGE_BYTES = _AREA_AT + inline.AREA_BYTES
_LONGEST_PAUSE_S = 0.02  # between rounds in which nobody says anything new


class Controller:
    """One rank's part in the operations of one group of ranks.

    Args:
        communicator: Of the group; used by nothing else.
        timeout_s: How long a request may wait for other ranks, in seconds.
        name: Of the group, for messages.
    """

    def __init__(self, communicator: Communicator, timeout_s: float, name: str) -> None:
        self._communicator, self._timeout_s, self._name = communicator, timeout_s, name
        self._label = f"Horovod's operations over {name}"  # a group's own: a rank in another's round is not in this one
        self._ledger = Ledger(communicator.ranks)
        self._news: list[Request] = []  # what the others have not been told
        self._mine: dict[Key, Request] = {}  # what this rank waits for
        self._names: set[Key] = set()  # until their requests have been waited for
        self._joining: Request | None = None
        self._leaving: Request | None = None
        self._broken: str = ""
        self._cause: BaseException | None = None
        self._closed = False
        self._pause_s = 0.0
        self._state = threading.Condition()
        self._driving = threading.Lock()
        self._thread: threading.Thread | None = None
        self._places = inline.Places()
        self._lone: dict[int, inline.Alone] = {}  # by the number of a form that all ranks know
        size = communicator.wire.size
        self._sent, self._heard = bytearray(_MESSAGE_BYTES), bytearray(_MESSAGE_BYTES * size)
        self._out = torch.frombuffer(self._sent, dtype=torch.uint8)
        self._in = torch.frombuffer(self._heard, dtype=torch.uint8).view(size, _MESSAGE_BYTES)

    # -- what the program calls ---------------------------------------------------------------------------------------

    def submit(self, request: Request, *, waited_for: bool = False) -> None:
        """Ask for an operation.

        Args:
            request: Ended when the operation is over.
            waited_for: The caller calls `wait` next.

        Raises:
            ValueError: A request of that name has not been waited for.
            HorovodInternalError: An operation failed before, or the work has ended.
        """
        request.began = time.monotonic()
        request.ready = reached(request.tensors)
        with self._state:
            self._refuse_if_over(request.called)
            if request.form.name is not None:
                if request.key in self._names:
                    raise ValueError(
                        f"{request.called} was asked for before, and has not been synchronized; use another name, or call "
                        "hvd.synchronize(handle) first"
                    )
                self._names.add(request.key)
            self._mine[request.key] = request
            self._news.append(request)
            if not waited_for:
                self._wake()
        if self._communicator.wire.size == 1:
            self._drive()

    def wait(self, request: Request) -> None:
        """Block until a request is over.

        Raises:
            HorovodInternalError: It failed.
        """
        if torch.is_inference_mode_enabled():  # what is made here may be another thread's, and differentiated there
            with torch.inference_mode(False), torch.no_grad():
                self.wait(request)
            return
        while not request.over:
            if self._driving.acquire(blocking=False):
                try:
                    if not request.over:
                        self._round()
                finally:
                    self._driving.release()
                if self._pause_s and not request.over:
                    request.wait(self._pause_s)
            else:
                request.wait(1.0)
        with self._state:
            self._names.discard(request.key)
            if self._outstanding():
                self._wake()
        if request.error is not None:
            raise request.error
        come_after(request.done)

    def join(self, request: Request) -> int:
        """Take part with nothing in what the other ranks still do; the rank that joined last, once all have.

        Args:
            request: Its number is that of the steps that were taken without rounds here.
        """
        with self._state:
            self._refuse_if_over("hvd.join")
            if self._joining is not None:
                raise HorovodInternalError("hvd.join: another thread of this rank has joined already")
            self._joining = request
        self.wait(request)
        return int(request.result)

    def leave(self, request: Request) -> None:
        """End together with the other ranks; what is waited for by then fails."""
        with self._state:
            if self._closed or self._broken:
                self._closed = True
                self._state.notify_all()
                return
            self._leaving = request
            self._wake()
        try:
            self.wait(request)
        finally:
            self.close("hvd.shutdown() was called")

    def close(self, reason: str) -> None:
        """Take no more requests, and fail those there are; without the other ranks."""
        with self._state:
            self._closed = True
        self._fail_all(reason)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5.0)

    # -- rounds -------------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if self._thread is None and self._communicator.wire.size > 1:
            self._thread = threading.Thread(target=self._run, name=f"hvdtrain-horovod {self._name}", daemon=True)
            self._thread.start()
        self._state.notify_all()

    def _run(self) -> None:
        device = self._communicator.wire.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a new thread begins on the first GPU
        while True:
            with self._state:
                self._state.wait_for(lambda: self._closed or self._outstanding())
                if self._closed:
                    return
            with self._driving:
                self._drive()
            if self._pause_s:
                with self._state:
                    self._state.wait_for(lambda: self._closed or bool(self._news), self._pause_s)

    def _drive(self) -> None:
        try:
            self._round()
        except HorovodInternalError:
            return  # whoever waits is told

    def _outstanding(self) -> bool:
        return bool(self._mine) or self._joining is not None or self._leaving is not None

    def _round(self) -> None:
        """Tell the others what is new here, hear what is new there, and do what all have asked for."""
        with self._state:
            if self._broken or self._closed or not self._outstanding():
                return
            told, self._news = self._news[:_MOST], self._news[_MOST:]
            alone = self._alone(told)
            flags = (JOIN if self._joining is not None else 0) | (LEAVE if self._leaving is not None else 0)
        try:
            if alone is not None:
                self._round_of_one(told[0], *alone)
                return
            steps = self._joining.number if self._joining is not None else 0
            message = self._ledger.compose([(one.text, one.number) for one in told], flags, self._overdue(), steps)
            with torch.no_grad():
                self._put_small(message)
                with self._communicator.region(self._label, self._waits_in()):
                    messages = self._exchange(message)
                places = [self._places.of(self._ledger.asked_in(each)) for each in messages]
                self._obey(self._ledger.hear(messages), places)
        except BaseException as error:
            self._break(error)
            if not isinstance(error, Exception):
                raise
            raise HorovodInternalError(self._broken) from error

    def _alone(self, told: list[Request]) -> tuple[inline.Alone, int] | None:
        """How to tell the others of a small sum, the only thing that this rank waits for; None if it is not that."""
        if len(told) != 1 or len(self._mine) != 1 or self._joining is not None or self._leaving is not None:
            return None
        (request,) = told
        number = self._ledger.number_if_alone(request.text)
        if number is None or not request.outputs or self._communicator.wire.size == 1:
            return None
        known = self._lone.get(number)
        if known is None or known.form != request.form:
            if not inline.Alone.fits(request.form):
                return None
            known = self._lone[number] = inline.Alone(request.form, self._out[_AREA_AT:], self._in[:, _AREA_AT:])
        if request.tensors[0].is_cuda or timeline.recording():
            return None
        return known, number

    def _round_of_one(self, request: Request, alone: inline.Alone, number: int) -> None:
        """A round, seen from a rank that has nothing but a small sum to say.

        What it sends is what any round would; if every rank has said the very same, there is nothing to be matched.
        """
        _HEAD.pack_into(self._sent, 0, 0, 1, 0)
        _ONE.pack_into(self._sent, _HEAD.size, number, request.number)
        with torch.no_grad():
            alone.put(request)
            with self._communicator.region(self._label, f"{request.called} over {self._name}"):
                self._carry()
            said = self._sent[:_ONE_ENDS]
            if all(self._heard[at : at + _ONE_ENDS] == said for at in range(0, len(self._heard), _MESSAGE_BYTES)):
                with self._state:
                    del self._mine[request.key]
                alone.finish(request)
                self._pause_s = 0.0
                return
            messages = self._read(self._ledger.compose([(request.text, request.number)], 0))
            places = [self._places.of(self._ledger.asked_in(each)) for each in messages]
            self._obey(self._ledger.hear(messages), places)

    def _put_small(self, message: Message) -> None:
        """Write numbers into the message that have room there."""
        if self._communicator.wire.size == 1 or not message.known:
            return
        area = self._out[_AREA_AT:]
        for key, at in self._places.of(self._ledger.asked_in(message)).items():
            request = self._mine[key]
            come_after(request.ready)
            inline.put(area, at, self._communicator, request)

    def _obey(self, outcome: Outcome, places: Sequence[Mapping[Key, int]]) -> None:
        if outcome.trouble:
            raise HorovodInternalError(outcome.trouble)
        batch = self._left_to_do(outcome, places)
        if batch:
            called = [one.request.called for one in batch if one.request is not None] or [
                "what others do after hvd.join()"
            ]
            more = f" and {len(called) - 1} more" if len(called) > 1 else ""
            try:
                region = self._communicator.region(f"{self._label}, performed", f"{called[0]}{more} over {self._name}")
                with timeline.performing([one.request for one in batch]), region:
                    perform(self._communicator, batch)
            except Exception as error:
                for one in batch:
                    if one.request is not None:
                        failure = HorovodInternalError(str(error))
                        failure.__cause__ = error
                        one.request.fail(failure)
                raise
        if outcome.last_joined is not None:
            joining, self._joining = self._joining, None
            assert joining is not None
            joining.finish(self._communicator.ranks[outcome.last_joined])
        if outcome.join_error and self._joining is not None:
            joining, self._joining = self._joining, None
            joining.fail(HorovodInternalError(outcome.join_error))
        if outcome.ended:
            leaving, self._leaving = self._leaving, None
            assert leaving is not None
            self._closed = True
            leaving.finish()
        if outcome.news:
            self._pause_s = 0.0
        else:
            self._pause_s = min(_LONGEST_PAUSE_S, max(0.0005, self._pause_s * 2))

    def _left_to_do(self, outcome: Outcome, places: Sequence[Mapping[Key, int]]) -> list[Agreed]:
        """End what has failed and what came with the messages; the rest needs an exchange of its own."""
        batch = []
        for decision in outcome.decisions:
            with self._state:
                request = self._mine.pop(decision.key, None)
            if decision.error:
                if request is not None:
                    request.fail(HorovodInternalError(decision.error))
                continue
            if decision.form.kind == "gradients" and decision.absent:  # agreed on when all are there
                if request is not None:
                    request.finish()
                continue
            if request is not None and len(places) > 1 and all(decision.key in each for each in places):
                areas, at = self._in[:, _AREA_AT:].unbind(), [each[decision.key] for each in places]
                with timeline.performing([request]):
                    inline.finish(self._communicator, request, areas, at)
                continue
            if request is not None:
                come_after(request.ready)
            batch.append(Agreed(decision.form, request))
        return batch

    def _exchange(self, message: Message) -> list[Message]:
        wire, rest = self._communicator.wire, message.rest
        if wire.size == 1:
            return [message]
        numbers = [number for pair in message.known for number in pair]
        flags = message.flags | min(message.steps, _MOST_STEPS) << _FLAG_BITS
        _HEAD.pack_into(self._sent, 0, flags, len(message.known), len(rest))
        struct.pack_into(f"={len(numbers)}i", self._sent, _HEAD.size, *numbers)
        self._carry()
        return self._read(message)

    def _carry(self) -> None:
        """Exchange the ranks' messages."""
        wire = self._communicator.wire
        if wire.device.type == "cpu":
            wire.at_once.all_gather_into(self._in, self._out).wait()
        else:
            received = torch.empty_like(self._in, device=wire.device)
            wire.at_once.all_gather_into(received, self._out.to(wire.device)).wait()
            self._in.copy_(received)

    def _read(self, message: Message) -> list[Message]:
        """What the ranks have said; a second exchange brings what did not fit into the first."""
        heads = [_HEAD.unpack_from(self._heard, at) for at in range(0, len(self._heard), _MESSAGE_BYTES)]
        rests = self._exchange_rests(message.rest, [length for _, _, length in heads])
        messages = []
        for rank, (flags, count, _) in enumerate(heads):
            read = struct.unpack_from(f"={2 * count}i", self._heard, rank * _MESSAGE_BYTES + _HEAD.size)
            known = list(zip(read[::2], read[1::2], strict=True))
            messages.append(Message.read(flags & _FLAGS, known, rests[rank], flags >> _FLAG_BITS))
        return messages

    def _exchange_rests(self, mine: bytes, lengths: Sequence[int]) -> list[bytes]:
        longest = max(lengths)
        if not longest:
            return [b""] * len(lengths)
        wire = self._communicator.wire
        sent = torch.frombuffer(bytearray(mine.ljust(longest, b"\0")), dtype=torch.uint8).to(wire.device)
        out = torch.empty((wire.size, longest), dtype=torch.uint8, device=wire.device)
        wire.at_once.all_gather_into(out, sent).wait()
        return [row.numpy().tobytes()[:length] for row, length in zip(out.cpu(), lengths, strict=True)]

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _waits_in(self) -> str:
        with self._state:
            first, others = next(iter(self._mine.values()), None), len(self._mine) - 1
        if first is None:
            return f"{'hvd.join()' if self._joining is not None else 'hvd.shutdown()'} over {self._name}"
        return f"{first.called}{f' and {others} more' if others else ''} over {self._name}"

    def _overdue(self) -> str:
        """What this rank has waited for too long; "" if there is nothing."""
        now = time.monotonic()
        with self._state:
            late = [(key, one) for key, one in self._mine.items() if now - one.began > self._timeout_s]
        for key, request in late:
            missing = self._ledger.missing(key)
            if not missing:
                continue
            instead = [
                f"rank {rank} waits in {', '.join(self._ledger.asked_by(rank)[:3]) or 'nothing'}" for rank in missing
            ]
            return (
                f"{request.called} over {self._name} has waited {self._timeout_s:g} s for rank"
                f"{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}; {'; '.join(instead)}"
            )
        return ""

    def _refuse_if_over(self, what: str) -> None:
        if self._broken:
            raise HorovodInternalError(f"{what}: an earlier operation failed: {self._broken}") from self._cause
        if self._closed:
            raise HorovodInternalError(f"{what}: the ranks of {self._name} have ended their work")

    def _break(self, error: BaseException) -> None:
        with self._state:
            if not self._broken:
                self._broken = str(error) or type(error).__name__
                self._cause = error
        self._fail_all(self._broken)

    def _fail_all(self, reason: str) -> None:
        with self._state:
            ends = [*self._mine.values(), *(one for one in (self._joining, self._leaving) if one is not None)]
            self._mine.clear()
            self._news.clear()
            self._joining = self._leaving = None
            self._state.notify_all()
        for request in ends:
            failure = HorovodInternalError(f"{request.called}: {reason}")
            failure.__cause__ = self._cause
            request.fail(failure)

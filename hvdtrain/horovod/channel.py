"""The way of one `DistributedOptimizer`'s gradients that needs no matching: a communicator that nothing else uses.

Before each window of gradients the ranks ask each other a small question: do all use the same layout of packs, one that all have
agreed on before? If so, each pack is a plain all-reduce, in the layout's order. If not, that window's packs go by name, through
the `Controller`. A rank that has joined says so in the same question and takes part with zeros; one that leaves says that too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from hvdtrain.backends.group import Group
from hvdtrain.backends.wire import Work
from hvdtrain.errors import HorovodInternalError, HvdtrainError
from hvdtrain.horovod import timeline
from hvdtrain.horovod.performing import Sending
from hvdtrain.horovod.requests import Form, Request

_log = logging.getLogger(__name__)

_STATES = 3
LIVE, JOINED, LEFT = range(_STATES)
"""What a rank is in a window: one that sends gradients, one that has joined, one that ends its work."""
_DROPPED = (
    "{ranks} called optimizer.load_state_dict between backward and step, and other ranks did not, so that they hold different "
    "weights; load on every rank, or before backward"
)
_PATIENCE_S = 0.005  # that the program has to come by itself before the helper does its work
_MOST_IDLE = 200  # looks without any work; then the helper sleeps until there is some


class Channel:
    """One rank's part in the windows of one optimizer.

    Args:
        communicator: Of all ranks; used by nothing else.
        called: The optimizer, for messages.

    Attributes:
        layouts: Those that all ranks have agreed on, in that order; of each the forms of its packs. Its number is its place plus 1.
        over: No more windows, because a rank has left, or an exchange has failed.
    """

    def __init__(self, communicator: Group, called: str) -> None:
        self._communicator, self._called = communicator, called
        size = communicator.wire.size
        self._said = torch.zeros(2, dtype=torch.int64, device="cpu")
        self._heard = torch.zeros(size, 2, dtype=torch.int64, device="cpu")
        self._question: Work | None = None
        self._answer: int | None = None
        self._open = False
        self._sendings: list[Sending] = []
        self._trouble: HorovodInternalError | None = None
        self._held: Callable[[], bool] | None = None
        self._held_s = 0.0
        self._bell = threading.Event()
        self._helper: threading.Thread | None = None
        self.layouts: list[tuple[Form, ...]] = []
        self.over = False

    # -- layouts ------------------------------------------------------------------------------------------------------

    def learn(self, forms: tuple[Form, ...]) -> None:
        """All ranks have just agreed on a layout."""
        if forms not in self.layouts:
            self.layouts.append(forms)

    def number_of(self, forms: tuple[Form, ...] | None) -> int:
        """The number of a layout; 0 if the ranks have not agreed on it."""
        return self.layouts.index(forms) + 1 if forms in self.layouts else 0

    # -- one window ---------------------------------------------------------------------------------------------------

    def ask(self, state: int, number: int = 0, dropped: int = 0, *, at_once: bool = False) -> None:
        """Begin a window: tell the other ranks what this one is, and by which layout it sends.

        Args:
            state: LIVE, JOINED or LEFT.
            number: Of the layout.
            dropped: How many windows this rank has taken part in without using what they brought; alike on all that are LIVE.
            at_once: The caller waits for the answer next.

        Raises:
            HorovodInternalError: There are no more windows, or the engine failed.
        """
        if self.over:
            raise HorovodInternalError(f"{self._called}: {self._trouble or 'the ranks have ended their work'}")
        self._answer, self._sendings, self._open = None, [], True
        self._said[0], self._said[1] = state + dropped * _STATES, number
        with self._translated():
            wire = self._communicator.wire
            self._question = (wire.at_once if at_once else wire).all_gather_into(self._heard, self._said)

    @property
    def answered(self) -> bool:
        """Whether `answer` would return at once."""
        return self.troubled or self._question is None or self._question.is_completed()

    @property
    def troubled(self) -> bool:
        """Whether `answer` would raise what it has raised before."""
        return self._trouble is not None

    def hear(self) -> None:
        """Return when every rank has begun the window. Raises what the engine raises."""
        if self._question is not None:
            self._question.wait()

    def answer(self) -> int:
        """The number of the layout in whose order packs are sent; 0 if they go by name, or there is nobody that sends any.

        Raises:
            HorovodInternalError: A rank has left while this one goes on, ranks have dropped different windows, or something failed
                before.
            RuntimeError: The engine failed; to be called in `waited_for`, or when `answered`.
        """
        if self._trouble is not None:
            raise self._trouble
        if self._answer is None:
            self.hear()
            self._answer = self._heeded()
        return self._answer

    def _heeded(self) -> int:
        said, numbers = self._heard.t().tolist()
        ranks, states = self._communicator.ranks, [one % _STATES for one in said]
        left = [rank for rank, state in zip(ranks, states, strict=True) if state == LEFT]
        used = {number for state, number in zip(states, numbers, strict=True) if state == LIVE}
        dropped = {rank: one // _STATES for rank, state, one in zip(ranks, states, said, strict=True) if state == LIVE}
        trouble = ""
        if left:
            trouble = f"{_named(left)} called hvd.shutdown(), or left the program, without it"
        elif len(set(dropped.values())) > 1:
            most = max(dropped.values())
            trouble = _DROPPED.format(ranks=_named([rank for rank, count in dropped.items() if count == most]))
        self.over = self.over or bool(trouble)
        if trouble and states[self._communicator.rank] == LIVE:
            self._trouble = HorovodInternalError(f"{self._called}: {trouble}")
            raise self._trouble
        return used.pop() if len(used) == 1 and not trouble else 0

    @property
    def nobody(self) -> bool:
        """Whether the window that was answered is one in which no rank sends gradients."""
        return LIVE not in (self._heard[:, 0] % _STATES).tolist()

    def send(self, request: Request | None) -> None:
        """Start the next pack of the layout that was agreed on; ``None`` for zeros."""
        assert self._answer
        form = self.layouts[self._answer - 1][len(self._sendings)]
        with self._translated(), torch.no_grad():
            self._sendings.append(Sending(self._communicator, form, request))

    def finish(self) -> None:
        """Send zeros for the packs that were not sent, and end all requests. To be called in `waited_for`."""
        self._open = False
        if not self._answer:
            return
        sendings, total = self._sendings, len(self.layouts[self._answer - 1])
        while len(sendings) < total:
            self.send(None)
        with torch.no_grad(), timeline.performing([one.request for one in sendings]):
            for sending in sendings:
                sending.spread()
            for sending in sendings:
                sending.finish()
        self._sendings = []

    @contextmanager
    def waited_for(self) -> Iterator[None]:
        """Around what waits for the other ranks: lets the watch name those that do not come."""
        with self._translated(), self._communicator.region(self._called, self._called):
            yield

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Any failure is the last thing that happens here."""
        try:
            yield
        except BaseException as error:
            self.over = True
            if isinstance(error, HorovodInternalError):
                self._trouble = self._trouble or error
                raise
            if self._trouble is None:
                said = str(error) or type(error).__name__
                self._trouble = HorovodInternalError(
                    said if isinstance(error, HvdtrainError) else f"{self._called}: {said}"
                )
                self._trouble.__cause__ = error
            if not isinstance(error, Exception):
                raise
            raise self._trouble from error

    # -- beside the program -------------------------------------------------------------------------------------------

    def hold(self, send: Callable[[], bool]) -> None:
        """Let a thread send what the program has not sent within moments, because it waits elsewhere.

        Args:
            send: Asks the other ranks, if that was not done, and sends if they have answered; says whether nothing is left to do.
        """
        self._held, self._held_s = send, time.monotonic()
        if self._helper is None:
            self._helper = threading.Thread(target=self._help, name=f"hvdtrain {self._called}", daemon=True)
            self._helper.start()
        if not self._bell.is_set():
            self._bell.set()

    def release(self) -> None:
        """The program has come by itself."""
        self._held = None

    def _help(self) -> None:
        idle = 0
        while self._bell.wait() and not self.over:
            send = self._held
            if send is None or time.monotonic() - self._held_s < _PATIENCE_S:
                idle = idle + 1 if send is None else 0
                if idle > _MOST_IDLE:
                    idle = 0
                    self._bell.clear()
                    if self._held is not None:  # it came just now
                        self._bell.set()
                time.sleep(_PATIENCE_S)
                continue
            self._held = None
            try:
                while not send():
                    self.hear()
            except Exception as error:  # the program is told when it asks
                _log.debug("%s: %s", self._called, error)
            del send

    def serve(self, state: int) -> None:
        """Take part in the others' windows with zeros until none of them sends gradients; having left, in one.

        Args:
            state: JOINED or LEFT.

        Raises:
            HorovodInternalError: The engine failed.
        """
        if self._open and not self.over:  # of an optimizer that is garbage
            with self.waited_for():
                self.answer()
                self.finish()
        while not self.over:
            with self.waited_for():
                self.ask(state)
                self.answer()
                self.finish()
            if self.nobody:
                return

    def retire(self) -> None:
        """End the thread; the communicator is freed when nothing refers to this any more."""
        self.over = True
        self._bell.set()

    def close(self) -> None:
        """Free the communicator now."""
        self.retire()
        self._communicator.close()


def _named(ranks: Sequence[int]) -> str:
    """Ranks in words."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def agreement(number: int, forms: Sequence[Form]) -> Form:
    """What ranks say when they agree on a layout.

    Args:
        number: The optimizer's.
        forms: Of the packs.
    """
    tensors = tuple(tensor for form in forms for tensor in form.tensors)
    first = forms[0] if forms else None
    told = (
        *(first.details if first is not None else ()),
        ("packs", [[form.name, form.detail("parameters")] for form in forms]),
    )
    return Form(kind="gradients", name=f"DistributedOptimizer {number}", tensors=tensors, details=told)

"""The channels of a job: which optimizers have one, and what happens with all of them when this rank joins or leaves."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hvdtrain.backends.communicator import Communicator
from hvdtrain.backends.group import Group
from hvdtrain.errors import HorovodInternalError
from hvdtrain.horovod.channel import Channel
from hvdtrain.horovod.requests import Form


class Sender(Protocol):
    """What fills the windows of a channel."""

    def give_up_window(self, state: int) -> None:
        """End a window that is under way, if there is one, as far as other ranks wait for it; the rank is JOINED or LEFT now."""


@dataclass(slots=True, eq=False)
class _Held:
    channel: Channel
    sender: weakref.ref[Any]  # to a Sender


class Channels:
    """By the number of their optimizer, which is the same on every rank.

    Args:
        make: Makes a communicator of all ranks; every rank must call it.
        over: All ranks, for a small exchange whenever one is made.

    Attributes:
        windows: In which this rank has sent gradients through a channel since all ranks had joined.
    """

    def __init__(self, make: Callable[[], Group | None], over: Communicator) -> None:
        self._make, self._over = make, over
        self.windows = 0
        self._held: dict[int, _Held] = {}
        self._turn = threading.Lock()
        self._state = 0  # JOINED or LEFT while this rank serves the others
        self._servants: list[threading.Thread] = []
        self._trouble: HorovodInternalError | None = None

    def of(self, number: int, sender: Sender) -> Channel | None:
        """The channel of an optimizer; None if the ranks have not made it yet."""
        held = self._held.get(number)
        if held is None:
            return None
        owner = held.sender()
        if owner is not None and owner is not sender:
            raise RuntimeError(
                f"two living DistributedOptimizers have the number {number}, one of them from before hvd.shutdown(); make them "
                "all anew after hvd.init()"
            )
        held.sender = weakref.ref(sender)
        return held.channel

    def agreed(self, number: int, sender: weakref.ref[Any], forms: tuple[Form, ...]) -> None:
        """All ranks have agreed on a layout of an optimizer; called in the same order on all of them."""
        held = self._held.get(number)
        if held is None:
            self._free_what_nobody_uses()
            group = self._make()
            assert group is not None
            held = _Held(Channel(group, f"the gradients of DistributedOptimizer {number}"), sender)
        held.channel.learn(forms)
        with self._turn:
            if number not in self._held:
                self._held[number] = held
                if self._state:
                    self._employ(held)

    def serve(self, state: int) -> None:
        """Begin to take part in the others' windows with nothing, because this rank has joined or leaves."""
        with self._turn:
            self._state = state
            for held in self._held.values():
                self._employ(held)

    def served(self, timeout_s: float | None = None) -> None:
        """Wait until the others need nothing more.

        Raises:
            HorovodInternalError: The engine failed.
        """
        with self._turn:
            self._state, servants, self._servants = 0, self._servants, []
        for servant in servants:
            servant.join(timeout_s)
        trouble, self._trouble = self._trouble, None
        if trouble is not None:
            raise trouble

    def close(self) -> None:
        """Free all of them."""
        for held in self._held.values():
            held.channel.close()
        self._held.clear()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _employ(self, held: _Held) -> None:
        servant = threading.Thread(target=self._serve, args=(held, self._state), daemon=True)
        self._servants.append(servant)
        servant.start()

    def _serve(self, held: _Held, state: int) -> None:
        try:
            sender = held.sender()
            if sender is not None:
                sender.give_up_window(state)
            del sender
            held.channel.serve(state)
        except HorovodInternalError as error:
            self._trouble = error

    def _free_what_nobody_uses(self) -> None:
        """Close channels whose optimizers are garbage on every rank."""
        garbage = [number for number, held in self._held.items() if held.sender() is None]
        said = self._over.all_gather(torch.tensor(garbage, dtype=torch.int64, device="cpu"))
        for number in set.intersection(*(set(numbers.tolist()) for numbers in said)):
            self._held.pop(number).channel.retire()

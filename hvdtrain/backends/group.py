"""A communicator of some of the ranks, which can be given back: its threads, connections and communicators cost memory.

It is closed by `Group.close`, at the end of a `with` block, or when nothing refers to it any more. All of that is local: no rank
waits for another. What is collected as garbage is freed by a thread of its own, because a collector may run at any moment,
inside the engine too.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from hvdtrain.backends.communicator import Communicator
from hvdtrain.backends.wire import Wire
from hvdtrain.errors import CollectiveError

_log = logging.getLogger(__name__)


class Group(Communicator):
    """What `hvdtrain.backends.base.Backend.group` makes.

    Args:
        wire: The engine's operations.
        options: As for `Communicator`.
    """

    def __init__(self, wire: Wire, *options: Any, **more: Any) -> None:
        super().__init__(wire, *options, **more)
        self._closed = False
        _janitor.employ()
        self._garbage = weakref.finalize(self, _janitor.free, wire.close)
        self._garbage.atexit = False  # the engine ends as a whole

    @property
    def wire(self) -> Wire:
        """The engine's own operations, for code that measures or extends them."""
        if self._closed:
            raise CollectiveError(f"{self._label} was closed; make it anew by backend.group(ranks), on every rank")
        return super().wire

    def close(self) -> None:
        """Free what the engine holds for this group; may be called again. This rank's operations must be over."""
        if self._garbage.detach() is None:
            return
        self._closed = True
        wire, self._wire = self._wire, None
        assert wire is not None
        try:
            with turn:
                wire.close()
        finally:
            _janitor.free(_nothing)

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


turn = threading.Lock()
"""Held while groups are made or freed: torch's registry of groups is not meant for two threads."""


class _Janitor:
    """A thread that frees what was collected as garbage; there is one as long as there are groups."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._counting = threading.Lock()
        self._groups = 0
        self.free = self._queue.put  # the one call that is safe inside a garbage collection

    def employ(self) -> None:
        with self._counting:
            self._groups += 1
            if self._groups == 1:
                threading.Thread(target=self._run, name="hvdtrain-groups", daemon=True).start()

    def _run(self) -> None:
        while True:
            close = self._queue.get()
            try:
                with turn:
                    close()
            except Exception as error:
                _log.warning("a group of ranks could not be freed: %s", error)
            del close
            with self._counting:
                self._groups -= 1
                if not self._groups:
                    return


def _nothing() -> None:
    pass


_janitor = _Janitor()

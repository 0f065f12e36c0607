"""A communicator of some of the ranks, which can be given back: its threads, connections and communicators cost memory.

It is closed by `Group.close`, at the end of a `with` block, or when nothing refers to it any more. All of that is local: no rank
waits for another. What is collected as garbage is freed by a thread of its own, because a collector may run at any moment,
inside the engine too.
"""

from __future__ import annotations

import atexit
import logging
import os
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
    """A thread that frees what was collected as garbage; there is one as long as there are groups.

    At the end of the process it has freed what there was, or frees nothing any more: a thread that Python ends inside the engine
    would end the process by SIGABRT.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], None] | threading.Event] = SimpleQueue()
        self._counting = threading.Lock()
        self._tasks = 0  # groups, and questions whether all is free
        self._process = 0  # whose end it hears of
        self._over = False
        self.free = self._queue.put  # the one call that is safe inside a garbage collection

    def employ(self) -> None:
        with self._counting:
            self._tasks += 1
            if self._tasks == 1:
                threading.Thread(target=self._run, name="hvdtrain-groups", daemon=True).start()
            if not self._process:
                self._process = os.getpid()
                atexit.register(self._end)

    def settle(self) -> None:
        """Wait, within bounds, until all is free that was garbage when this was called."""
        done = threading.Event()
        self.employ()
        self.free(done)
        done.wait(_SETTLE_S)

    def _end(self) -> None:
        if os.getpid() != self._process:
            return
        self.settle()
        held = turn.acquire(timeout=_SETTLE_S)  # unless the engine never gives a group back
        self._over = True
        if held:
            turn.release()

    def _run(self) -> None:
        while True:
            task = self._queue.get()
            if isinstance(task, threading.Event):
                task.set()
            else:
                self._close(task)
            del task
            with self._counting:
                self._tasks -= 1
                if not self._tasks:
                    return

    def _close(self, close: Callable[[], None]) -> None:
        try:
            with turn:
                if not self._over:
                    close()
        except Exception as error:
            _log.warning("a group of ranks could not be freed: %s", error)


def settle() -> None:
    """Wait, within bounds, until groups that nothing refers to any more are freed."""
    _janitor.settle()


def _nothing() -> None:
    pass


_SETTLE_S = 10.0
_janitor = _Janitor()

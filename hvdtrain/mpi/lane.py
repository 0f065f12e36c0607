"""One thread per group that makes its MPI calls, in order, while the caller computes on.

MPI calls block, and mpi4py lets go of the interpreter lock meanwhile. A clock watches the call that is under way: if it
lasts longer than its time-out, all that wait for it get an error, and the lane takes no more work, because an MPI call
cannot be taken back.

A caller that would wait anyway may take an idle lane and make its calls itself (`Lane.enter`), as long as they do not wait for
other ranks; what would wait is handed over to the thread (`Lane.hand_over`).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_log = logging.getLogger(__name__)

_TICK_S = 0.25
_LOOK_AGAIN_S = 0.05
_LOOK_S = 0.002  # between two looks whether a closing lane is idle
_MOST_CALLBACKS = 64  # that wait for one another; threads start as they are needed
_NO_TIMEOUT = timedelta(0)


# Older versions of torch let the Python half of a Work go while C++ (DDP) holds the other half, which then waits for ever,
# with the interpreter's lock. Seen with 2.4, not with 2.13.
_FORGETS_WORK = tuple(int(part) for part in str(torch.__version__).split(".")[:2]) < (2, 13)
_MOST_KEPT = 64
_kept: OrderedDict[int, MpiWork] = OrderedDict()

_Base: Any = dist.Work


class MpiWork(_Base):  # type: ignore[misc]
    """An operation that was handed to a lane.

    Args:
        what: The operation, for messages.
        tensors: Its result, complete when the work is.
        timeout_s: Bound of the MPI call itself, in seconds.
    """

    def __init__(self, what: str, tensors: Sequence[Any], timeout_s: float) -> None:
        super().__init__()
        self.what = what
        self.timeout_s = timeout_s
        self.source = -1
        self.callbacks: Executor | None = None
        self._tensors = list(tensors)
        self._pending = threading.Lock()  # held until the operation is over
        self._pending.acquire()
        self._over = False
        self._error: Exception | None = None
        self._ended: torch.futures.Future[Any] | None = (
            None  # a future that only ends; `_future` follows it with the result or the error
        )
        self._future: torch.futures.Future[Any] | None = None
        self._turn = threading.Lock()
        if _FORGETS_WORK:
            _kept[id(self)] = self
            while len(_kept) > _MOST_KEPT:
                _kept.popitem(last=False)

    # -- what c10d asks -----------------------------------------------------------------------------------------------

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """Block until the operation is over.

        Args:
            timeout: How long this call may block; the operation's own time-out holds besides.

        Raises:
            DistBackendError: The operation failed or timed out.
        """
        limit = timeout.total_seconds()
        if not self._over:
            if not self._pending.acquire(timeout=limit if limit > 0 else -1):
                raise dist.DistBackendError(
                    f"{self.what}: waited {limit:g} s, timed out; the operation goes on and can be waited for again"
                )
            self._pending.release()
        _kept.pop(id(self), None)
        if self._error is not None:
            raise self._error
        return True

    def synchronize(self) -> None:
        """The same as `wait`."""
        self.wait()

    def is_completed(self) -> bool:
        """Say whether the operation is over, well or badly."""
        return self._over

    def is_success(self) -> bool:
        """Say whether it is over and well."""
        return self._over and self._error is None

    def exception(self) -> Exception | None:
        """What it failed with, if it is over and has failed."""
        return self._error

    def result(self) -> list[Any]:
        """The tensors, once it is over."""
        self.wait()
        return self._tensors

    def source_rank(self) -> int:
        """Of a receive from any rank: the rank that sent."""
        return self.source

    _source_rank = source_rank

    def get_future(self) -> Any:
        """A future of the result, for communication hooks."""
        with self._turn:
            if self._future is None:
                devices: list[Any] = sorted(
                    {t.device for t in self._tensors if isinstance(t, Tensor) and t.is_cuda}, key=str
                )
                self._ended = torch.futures.Future(devices=devices) if devices else torch.futures.Future()
                # Future.set_exception sets the exception as the *result*, which C++ (DDP's reducer) takes for tensors and
                # crashes; what a callback of then() raises is an error there too.
                self._future = self._ended.then(self._outcome)
                if self._over:
                    self._ended.set_result(self._tensors)
            return self._future

    # -- what the lane says -------------------------------------------------------------------------------------------

    def finish(self, error: Exception | None = None) -> bool:
        """End the operation; only the first end counts.

        Returns:
            Whether this was the first.
        """
        with self._turn:
            if self._over:
                return False
            self._error = error
            self._over = True
            self._pending.release()
            ended = self._ended
        if ended is not None:
            # Completing a future runs what was chained to it, and that may call and wait for further operations
            # (PowerSGD does): it must not hold up the lane that has to perform them.
            try:
                if self.callbacks is not None:
                    self.callbacks.submit(ended.set_result, self._tensors)
                    return True
            except RuntimeError:  # the group is being destroyed
                pass
            ended.set_result(self._tensors)
        return True

    def _outcome(self, _: Any) -> list[Any]:
        if self._error is not None:
            raise self._error
        return self._tensors


_Item = tuple[MpiWork, Callable[[], None]]


class Lane:
    """A queue of operations and the thread that performs them.

    Args:
        name: Of the thread.
        explain: Says more about an operation that timed out: the ranks that are missing.
        end: Ends the process, for a reason, when a caller's own thread is inside an MPI call that will not return.

    Attributes:
        inside: The thread that performs an operation, or None. A caller's thread that may be interrupted gives the lane back by
            setting it, which nothing can come into, and not by a call of `leave`, at whose beginning Python looks for signals.
        broken: Why no more operations are taken.
    """

    def __init__(
        self, name: str, explain: Callable[[MpiWork], str], end: Callable[[str], None] = lambda reason: None
    ) -> None:
        self.name = name
        self._explain, self._end = explain, end
        self._items: deque[_Item] = deque()
        self._handed: _Item | None = None  # before all that is queued
        self._bell: SimpleQueue[None] = SimpleQueue()  # rung when the thread should look at what there is to do
        self._order = threading.Lock()
        self.inside: int | None = None
        self._thread: threading.Thread | None = None
        self._watched = False
        self._current: tuple[MpiWork, float, bool] | None = (
            None  # the operation under way, its deadline, and whether a caller's own thread performs it
        )
        self.broken: Exception | None = None
        self._closed = False
        self._callbacks = ThreadPoolExecutor(_MOST_CALLBACKS, thread_name_prefix=f"{name} callbacks")

    @property
    def stuck(self) -> bool:
        """Whether a thread is inside an MPI call that will not return."""
        return self.broken is not None and (
            self.inside is not None or (self._thread is not None and self._thread.is_alive())
        )

    def submit(self, work: MpiWork, operation: Callable[[], None]) -> MpiWork:
        """Perform ``operation`` when those before it are over."""
        work.callbacks = self._callbacks
        with self._order:
            if self.broken is not None:
                raise dist.DistBackendError(
                    f"{work.what}: {self.name} is unusable since an earlier failure: {self.broken}"
                )
            if self._closed:
                raise dist.DistBackendError(f"{work.what}: {self.name} was destroyed")
            self._employ()
            self._bell.put(None)  # first: what is queued is then seen, though an interrupt may come here
            self._items.append((work, operation))
        return work

    # -- in the caller's own thread -----------------------------------------------------------------------------------

    def enter(self) -> bool:
        """Take the lane, if nothing is queued or under way; `leave` or `hand_over` must follow."""
        me = threading.get_ident()
        with self._order:
            if self._pending() or self.inside is not None or self._closed or self.broken is not None:
                return False
            self.inside = me
        return True

    def leave(self) -> None:
        """Give the lane back."""
        self.inside = None
        self.left()

    def left(self) -> None:
        """Let the thread look at once at what was queued while a caller was inside; else it does within moments."""
        if self._items or self._closed:
            self._bell.put(None)

    def perform(self, work: MpiWork, operation: Callable[[], None]) -> None:
        """Perform an operation here, for which no other rank has to come any more; the lane is taken."""
        try:
            if not self._watched:
                self._watch()
            self._perform(work, operation, here=True)
        except BaseException as error:  # such as Ctrl-C, between two calls that belong together
            self.interrupted(work.what, error)
            raise

    def interrupted(self, what: str, error: BaseException) -> None:
        """Take no more operations, because a caller's thread was torn out of one that the other ranks go on with."""
        self.broken = self.broken or dist.DistBackendError(f"{what} was interrupted ({type(error).__name__})")

    def hand_over(self, work: MpiWork, rest: Callable[[], None]) -> None:
        """Give the lane back, and let the thread perform what is left of an operation, before all that was queued since.

        Where a call is interrupted, the lane is still this thread's (`inside`) if nothing was handed over.
        """
        work.callbacks = self._callbacks
        with self._order:
            self._employ()
            self._bell.put(None)
            handed = (work, rest)
            self._handed = handed
            self.inside = None

    # -- the thread ---------------------------------------------------------------------------------------------------

    def close(self, timeout_s: float) -> bool:
        """Take no more work, and end when what there is is over.

        Returns:
            Whether everything was over and the thread had ended within ``timeout_s``.
        """
        until = time.monotonic() + timeout_s
        with self._order:
            self._closed = True
            self._bell.put(None)
        while self._busy() and time.monotonic() < until:  # seldom: another thread of the program is inside
            if self._thread is None:
                time.sleep(_LOOK_S)
            else:
                self._thread.join(_LOOK_S)
        if self._thread is not None:
            self._thread.join(max(0.0, until - time.monotonic()))
        ended = not self._busy() and (self._thread is None or not self._thread.is_alive())
        self._callbacks.shutdown(wait=ended)
        return ended

    def _busy(self) -> bool:
        with self._order:
            return self._pending() or self.inside is not None

    def _pending(self) -> bool:
        return bool(self._items) or self._handed is not None

    def _employ(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
            self._thread.start()
        self._watch()

    def _watch(self) -> None:
        if not self._watched:
            _clock.watch(self)
            self._watched = True

    def _run(self) -> None:
        torch.set_grad_enabled(False)
        me = threading.get_ident()
        while True:
            with self._order:
                item, free = None, self.inside is None
                if free and self._handed is not None:
                    item, self._handed = self._handed, None
                elif free and self._items:
                    item = self._items.popleft()
                elif free and self._closed:
                    return
                if item is not None:
                    self.inside = me
                pending = self._pending() or self._closed
            if item is None:
                with contextlib.suppress(Empty):  # a caller that was interrupted while it left has not rung
                    self._bell.get(timeout=_LOOK_AGAIN_S if pending else None)
                continue
            try:
                self._serve(*item)
            finally:
                del item  # tensors must not live until the next operation comes
                self.inside = None

    def _serve(self, work: MpiWork, operation: Callable[[], None]) -> None:
        if self.broken is not None:
            work.finish(dist.DistBackendError(f"{work.what}: given up, because of {self.broken}"))
        else:
            self._perform(work, operation, here=False)

    def _perform(self, work: MpiWork, operation: Callable[[], None], *, here: bool) -> None:
        self._current = (work, time.monotonic() + work.timeout_s, here)
        try:
            operation()
        except dist.DistError as error:
            work.finish(error)
        except Exception as error:
            failure = dist.DistBackendError(f"{work.what} failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            work.finish(failure)
        else:
            work.finish()
        finally:
            self._current = None

    # -- when it takes too long ---------------------------------------------------------------------------------------

    def give_up(self, reason: str) -> None:
        """Let what is under way fail, and everything after it, because of what is known from elsewhere."""
        current = self._current
        self.broken = self.broken or dist.DistBackendError(reason)
        if current is not None:
            current[0].finish(dist.DistBackendError(f"{current[0].what}: {reason}"))
        self._drop()

    def check(self, now: float) -> None:
        """Give up on the operation under way if its time is over."""
        current = self._current
        if current is None or now < current[1]:
            return
        work, _, here = current
        error = dist.DistBackendError(f"{work.what} timed out after {work.timeout_s:g} s{self._explain(work)}")
        if self._current is current and work.finish(error):
            self.broken = error
            self._drop()
            if here:
                self._end(str(error))

    def _drop(self) -> None:
        """Fail what is queued: the thread, inside MPI, will not come to it."""
        with self._order:
            dropped = [item for item in (self._handed, *self._items) if item is not None]
            self._handed = None
            self._items.clear()
        for work, _ in dropped:
            work.finish(dist.DistBackendError(f"{work.what}: given up, because of {self.broken}"))


class _Clock:
    """The thread that looks at all lanes' deadlines."""

    def __init__(self) -> None:
        self._lanes: weakref.WeakSet[Lane] = weakref.WeakSet()
        self._turn = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ending = threading.Event()

    def watch(self, lane: Lane) -> None:
        with self._turn:
            self._lanes.add(lane)
            if self._thread is None:
                self._ending.clear()
                self._thread = threading.Thread(target=self._run, name="hvdtrain-mpi-clock", daemon=True)
                self._thread.start()

    def forget(self, lane: Lane) -> None:
        with self._turn:
            self._lanes.discard(lane)
            if not self._lanes and self._thread is not None:
                self._ending.set()
                self._thread.join()
                self._thread = None

    def _run(self) -> None:
        while not self._ending.wait(_TICK_S):
            now = time.monotonic()
            for lane in list(self._lanes):
                lane.check(now)


_clock = _Clock()


def forget(lane: Lane) -> None:
    """Stop watching a lane that has ended."""
    _clock.forget(lane)

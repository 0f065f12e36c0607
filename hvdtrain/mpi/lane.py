"""One thread per group that makes its MPI calls, in order, while the caller computes on.

MPI calls block, and mpi4py lets go of the interpreter lock meanwhile. A clock watches the call that is under way: if it
lasts longer than its time-out, all that wait for it get an error, and the lane takes no more work, because an MPI call
cannot be taken back.

A caller that would wait anyway may take an idle lane and make its calls itself (`Lane.enter`), as long as they do not wait for
other ranks; what would wait is handed over to the thread (`Lane.hand_over`).
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import OrderedDict
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
_NOTHING = MpiWork("nothing", (), 0.0)  # wakes the thread
_kept.clear()


def _do_nothing() -> None:
    pass


class Lane:
    """A queue of operations and the thread that performs them.

    Args:
        name: Of the thread.
        explain: Says more about an operation that timed out: the ranks that are missing.
        end: Ends the process, for a reason, when a caller's own thread is inside an MPI call that will not return.
    """

    def __init__(
        self, name: str, explain: Callable[[MpiWork], str], end: Callable[[str], None] = lambda reason: None
    ) -> None:
        self.name = name
        self._explain, self._end = explain, end
        self._queue: SimpleQueue[_Item | None] = SimpleQueue()
        self._handed: _Item | None = None  # before all that is queued
        self._order = threading.Lock()
        self._ahead = 0  # operations queued or under way
        self._turn = threading.Lock()  # held while an operation is performed, by whatever thread
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
        """Whether the thread is inside an MPI call that will not return."""
        return self.broken is not None and (
            self._turn.locked() or (self._thread is not None and self._thread.is_alive())
        )

    def submit(self, work: MpiWork, operation: Callable[[], None]) -> MpiWork:
        """Perform ``operation`` when those before it are over."""
        if self.broken is not None:
            raise dist.DistBackendError(f"{work.what}: {self.name} is unusable since an earlier failure: {self.broken}")
        if self._closed:
            raise dist.DistBackendError(f"{work.what}: {self.name} was destroyed")
        work.callbacks = self._callbacks
        with self._order:
            self._employ()
            self._ahead += 1
            self._queue.put((work, operation))
        return work

    # -- in the caller's own thread -----------------------------------------------------------------------------------

    def enter(self) -> bool:
        """Take the lane, if nothing is queued or under way; `leave` or `hand_over` must follow."""
        with self._order:
            if self._ahead or self._closed or self.broken is not None:
                return False
            self._ahead = 1
            self._turn.acquire()
        return True

    def leave(self) -> None:
        """Give the lane back."""
        self._turn.release()
        with self._order:
            self._ahead -= 1

    def perform(self, work: MpiWork, operation: Callable[[], None]) -> None:
        """Perform an operation here, for which no other rank has to come any more; the lane is taken."""
        if not self._watched:
            self._watch()
        try:
            self._perform(work, operation, here=True)
        except BaseException as error:  # such as Ctrl-C, between two calls that belong together
            self.broken = self.broken or dist.DistBackendError(f"{work.what} was interrupted ({type(error).__name__})")
            raise

    def hand_over(self, work: MpiWork, rest: Callable[[], None]) -> None:
        """Give the lane back, and let the thread perform what is left of an operation, before all that was queued since."""
        work.callbacks = self._callbacks
        with self._order:
            self._employ()
            self._handed = (work, rest)
            self._turn.release()
            self._queue.put((_NOTHING, _do_nothing))

    # -- the thread ---------------------------------------------------------------------------------------------------

    def close(self, timeout_s: float) -> bool:
        """Take no more work, and end when what there is is over.

        Returns:
            Whether the thread ended within ``timeout_s``.
        """
        with self._order:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        if self._thread is not None:
            self._thread.join(timeout_s)
        ended = self._thread is None or not self._thread.is_alive()
        if ended and self._turn.acquire(timeout=timeout_s):
            self._turn.release()
        else:
            ended = False
        self._callbacks.shutdown(wait=ended)
        return ended

    def _employ(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
            self._thread.start()
        self._watch()

    def _watch(self) -> None:
        if not self._watched:
            self._watched = True
            _clock.watch(self)

    def _run(self) -> None:
        torch.set_grad_enabled(False)
        while True:
            item = self._queue.get()
            with self._turn:
                handed, self._handed = self._handed, None
                for one in (handed, item):
                    if one is not None and one[0] is not _NOTHING:
                        self._serve(*one)
            if item is None:
                return
            del item, handed, one  # tensors must not live until the next operation comes

    def _serve(self, work: MpiWork, operation: Callable[[], None]) -> None:
        try:
            if self.broken is not None:
                work.finish(dist.DistBackendError(f"{work.what}: given up, because of {self.broken}"))
            else:
                self._perform(work, operation, here=False)
        finally:
            with self._order:
                self._ahead -= 1

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
        handed, self._handed = self._handed, None
        if handed is not None:
            handed[0].finish(dist.DistBackendError(f"{handed[0].what}: given up, because of {self.broken}"))
        while True:
            try:
                item = self._queue.get_nowait()
            except Empty:
                return
            if item is not None:
                item[0].finish(dist.DistBackendError(f"{item[0].what}: given up, because of {self.broken}"))


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

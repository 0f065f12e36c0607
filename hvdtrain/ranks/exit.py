"""How a process ends when its engine will not let it.

An engine's own end (MPI_Finalize, Horovod's destructors) waits for the other ranks, without a bound when they are gone.
Whoever finds that out calls `end_hard`: Python then ends as it always does, tracebacks and handlers and all, but for the
engine. Nothing here knows which engine that is, or ends a process that was not given up.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hvdtrain.errors import HvdtrainError, RankFailure
from hvdtrain.ranks.describing import is_long, traced

if TYPE_CHECKING:
    from hvdtrain.ranks.watch import NullWatch


@dataclass(slots=True)
class _Ending:
    """How this process is to end.

    Attributes:
        code: With which exit code, and without the engine's own end; None for as usual.
        farewells: Called with the code, last of all.
        prepared: Whether Python will come by here when it ends.
        shows: What shows an exception that nobody caught, but for long ones.
        at_exception: Such an exception ends the process hard.
        bound_s: Seconds that the engine's own end may take; None for any.
    """

    bound_s: float | None = None
    code: int | None = None
    farewells: list[Callable[[int], None]] = field(default_factory=list)
    prepared: bool = False
    shows: Callable[[type[BaseException], BaseException, TracebackType | None], Any] = sys.excepthook
    at_exception: bool = False


_CHILD_S = 2.0  # for the end of an engine that a forked process has no part in

_ending = _Ending()


def prepare(farewell: Callable[[int], None] | None = None) -> None:
    """Be ready for `end_hard`; called when an engine starts, so that handlers at exit registered since then still run.

    Args:
        farewell: Called with the exit code right before a hard end, once all else is done: what the engine can still do
            for the other ranks.
    """
    if farewell is not None and farewell not in _ending.farewells:
        _ending.farewells.append(farewell)
    if not _ending.prepared:
        _ending.prepared = True
        _ending.shows, sys.excepthook = sys.excepthook, _show
        atexit.register(_leave)


def bound_end(seconds: float) -> None:
    """Let the kernel end this process (SIGALRM) if the engine's own end takes longer: it is waited for outside of Python."""
    _ending.bound_s = seconds
    prepare()


def end_by_alarm(seconds: float) -> None:
    """Let the kernel end this process after so long, whatever it waits in; for the main thread, as the last thing of all."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def end_hard(code: int) -> None:
    """Let the process end with ``code`` and without its engine's own end; the first code counts."""
    if _ending.code is None:
        _ending.code = code
    prepare()


def ending() -> bool:
    """Whether the process is to end without its engine's own end."""
    return _ending.code is not None


def code_of(error: BaseException) -> int:
    """The exit code of a process that ``error`` ends: never 0."""
    if isinstance(error, HvdtrainError):
        return error.exit_code
    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code:
        return error.code
    return 1


def end_all_on_exception() -> None:
    """From now on an exception that nobody caught ends this process hard, after its traceback was shown."""
    _ending.at_exception = True
    prepare()


@contextmanager
def end_anyway(after_s: float, who: str) -> Iterator[None]:
    """End the process if what is done inside takes longer than ``after_s`` seconds: it ends in any case, but must not hang."""
    done = threading.Event()

    def wait() -> None:
        if not done.wait(after_s):
            print(f"hvdtrain: {who} could not end within {after_s:g} s, and is ended", file=sys.stderr, flush=True)  # noqa: T201
            os._exit(1)

    threading.Thread(target=wait, name="hvdtrain-end", daemon=True).start()
    try:
        yield
    finally:
        done.set()


class Goodbye:
    """Tells the other ranks at exit that this one is done, so that none waits for it, and never waits for ever itself.

    Args:
        watch: Of the ranks to say goodbye to.
        timeout_s: How long to wait for theirs, in seconds.
        stuck: Whether the engine is inside a call that will not return.
    """

    def __init__(self, watch: NullWatch, timeout_s: float, stuck: Callable[[], bool]) -> None:
        self._watch, self._timeout_s, self._stuck = watch, timeout_s, stuck

    def at_exit(self) -> None:
        """Say it when the process ends."""
        prepare()
        atexit.register(self._say)

    def never(self) -> None:
        """Do not say it."""
        atexit.unregister(self._say)

    def _say(self) -> None:
        if ending() or self._stuck():
            self._watch.close()
            end_hard(1)
            return
        try:
            self._watch.leave(self._timeout_s)
        except (RankFailure, RuntimeError) as error:
            print(f"hvdtrain: {error}", file=sys.stderr, flush=True)  # noqa: T201 - last words
            end_hard(HvdtrainError.exit_code)


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if is_long(error):  # mpirun takes a minute to pass on 20 MB
        print(traced(error), file=sys.stderr, flush=True)  # noqa: T201 - last words
    else:
        _ending.shows(kind, error, trace)
    if _ending.at_exception:
        end_hard(code_of(error))


def _leave() -> None:
    """One of the last handlers at exit: those that were registered after it have run before."""
    code = _ending.code
    if code is None:
        if _ending.bound_s is not None and threading.current_thread() is threading.main_thread():
            end_by_alarm(_ending.bound_s)
        return
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    for farewell in _ending.farewells:
        farewell(code)
    os._exit(code)


def _in_child() -> None:
    """In a forked process: the engine's own end would wait for its parent's ranks or threads, and has nothing to say to them."""
    _ending.farewells.clear()
    if _ending.prepared:
        _ending.bound_s = _CHILD_S


os.register_at_fork(after_in_child=_in_child)

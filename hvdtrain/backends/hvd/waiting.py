"""Waiting for Horovod, but not for ever: it blocks without a bound in several places."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from hvdtrain.backends.hvd.library import hvd
from hvdtrain.errors import CollectiveError, HvdtrainError, RankFailure
from hvdtrain.ranks.watch import NullWatch

T = TypeVar("T")


class Waiter:
    """Waits with a bound, and not for a rank that has failed.

    Args:
        timeout_s: The bound, in seconds.
        watch: Knows of ranks that failed.
        who: This rank, for messages: "rank 0 of 2".
    """

    def __init__(self, timeout_s: float, watch: NullWatch, who: str) -> None:
        self._timeout_s, self._watch, self._who = timeout_s, watch, who

    def begin(self, start: Callable[[], int], what: str) -> int:
        """Start an operation and return Horovod's handle.

        That takes no time, unless Horovod's thread holds a lock while it waits for another rank. No bound can be put on
        it from within: the watch ends a rank that stays inside for longer than the timeout.
        """
        with self._watch.blind(what, self._timeout_s):
            return start()

    def until(self, done: Callable[[], bool], what: str) -> None:
        """Return once ``done`` says so.

        Raises:
            RankFailure: Another rank reported a failure.
            RuntimeError: It took longer than the timeout.
        """
        end = time.monotonic() + self._timeout_s
        pause = 0.0  # first yield, then sleep: Horovod's own wait spins, which takes the core from its thread
        for turn in range(1 << 62):
            if done():
                return
            if turn > 20:
                pause = min(0.002, 2e-5 + pause * 1.02)
                self._watch.raise_if_failed()
                if time.monotonic() > end:
                    raise RuntimeError(f"timed out: Horovod had not finished {what} after {self._timeout_s:g} s")
            time.sleep(pause)

    def call(self, function: Callable[[], T], what: str, failure: type[HvdtrainError] = CollectiveError) -> T:
        """Make a call of Horovod that blocks without a bound in a thread, and wait for it with one.

        Returns:
            What it returned.

        Raises:
            RankFailure: Another rank reported a failure.
            HvdtrainError: A ``failure``: the call failed, or took longer than the timeout.
        """
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(function())
            except BaseException as error:
                errors.append(error)

        threading.Thread(target=run, name=f"hvdtrain-{what}", daemon=True).start()
        try:
            self.until(lambda: bool(results or errors), what)
        except RankFailure:
            raise
        except RuntimeError as error:
            raise failure(f"{self._who}: {error}") from error
        if errors:
            raise failure(f"{self._who}: {what} failed: {errors[0]}") from errors[0]
        return results[0]


def shut_down(timeout_s: float) -> bool:
    """Shut Horovod down within a bound; return whether it did. If not, the process must end without it."""
    atexit.unregister(hvd.mpi_ops._basics.shutdown)  # horovod's own, without a bound
    if not hvd.is_initialized():
        return True
    thread = threading.Thread(target=hvd.shutdown, name="hvdtrain-shutdown", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return not thread.is_alive()

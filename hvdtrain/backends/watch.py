"""Who waits for what: the ranks' small talk beside the engine, so that no failure ends in a hang.

Each rank keeps one record in a key-value store (a `torch.distributed.Store`, never the engine): how many collectives it
has begun, and what it is waiting for. One thread a rank publishes it and reads the others' last words. Out of that come

* *the first failure*: the rank that fails writes its traceback; whoever comes second ends quietly as its victim, also
  when its main thread is stuck inside an engine call (promise 7);
* *the missing ranks*: a time-out names the ranks that did not come, and what they are doing instead;
* *the early leaver*: a rank that left the program cannot take part in a collective it never began, so whoever waits for
  it is told within seconds instead of at the time-out.

It never kills a rank for being slow: only a failure, a departure or the store's own death does.
"""

from __future__ import annotations

import atexit
import json
import logging
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hvdtrain.errors import RankFailure

if TYPE_CHECKING:
    from torch.distributed import Store

_log = logging.getLogger(__name__)

_STUCK_S = 3.0  # how long a rank waits for a rank that has left before it says so
_GRACE_S = 3.0  # how long a victim's main thread gets to unwind before the process ends
_ACK_S = 3.0  # how long a failed rank stays so that the others can read its words


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A rank's last words."""

    rank: int
    host: str
    message: str
    traceback: str


class NullWatch:
    """The watch of a world of one: there is nobody to watch."""

    failure: Failure | None = None

    @staticmethod
    @contextmanager
    def region(*args: object, **kwargs: object) -> Iterator[None]:
        """Do nothing."""
        yield

    def missing(self, label: str, ranks: Sequence[int]) -> str:
        """Return ""."""
        return ""

    def raise_if_failed(self) -> None:
        """Do nothing."""

    def report(self, message: str, traceback: str) -> Failure | None:
        """Return None: there is nobody to tell."""
        return None

    def wait_for_failure(self, timeout_s: float) -> Failure | None:
        """Return None."""
        return None

    def leave(self, timeout_s: float) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Watch(NullWatch):
    """One rank's part in the watch; `start` begins it, `leave` or `close` ends it.

    Args:
        store: A connection used by nothing else (a store serves one request at a time).
        rank: This rank.
        world_size: Number of ranks.
        interval_s: How often records are exchanged. Worlds of more than 256 ranks exchange more seldom, so that the
            store sees at most about 500 requests a second.
        exit_process: Ends the process at once; replaceable for embedding.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        interval_s: float = 0.5,
        exit_process: Callable[[int], Any] = os._exit,
    ) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._interval_s = interval_s * max(1.0, world_size / 256)
        self._exit_process = exit_process
        self._counts: dict[str, int] = {}
        # Label, what, ranks, since; the innermost last. Threads wait beside each other.
        self._waiting: list[tuple[str, str, tuple[int, ...], float]] = []
        self._turn = threading.Lock()
        self._state = "computing"
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hvdtrain-watch", daemon=True)
        self.failure = None
        self.on_failure: list[Callable[[str], None]] = []
        """Called, in the watch's thread, with what went wrong: an engine that can let its waits fail should do so."""

    def start(self) -> None:
        """Publish the first record and begin watching."""
        self._publish()
        self._thread.start()

    # -- what the other modules tell and ask --------------------------------------------------------------------------

    @contextmanager
    def region(  # type: ignore[override]
        self, label: str, what: str, ranks: Sequence[int], *, again: bool = False
    ) -> Iterator[None]:
        """Mark that this rank is inside an operation that needs ``ranks``.

        Args:
            label: The group whose operations are counted.
            what: The operation, for messages.
            ranks: World ranks that must take part.
            again: The operation was counted when it was started; this is the wait for it.
        """
        self.raise_if_failed()
        waiting = (label, what, tuple(ranks), time.monotonic())
        with self._turn:
            if not again:
                self._counts[label] = self._counts.get(label, 0) + 1
            self._waiting.append(waiting)
        try:
            yield
        finally:
            with self._turn:
                self._waiting.remove(waiting)

    def raise_if_failed(self) -> None:
        """Raise `RankFailure` if another rank has reported one."""
        failure = self.failure
        if failure is not None and failure.rank != self._rank:
            raise RankFailure(
                f"rank {failure.rank} on {failure.host} failed first: {failure.message}",
                rank=failure.rank,
                rank_traceback=failure.traceback,
            )

    def missing(self, label: str, ranks: Sequence[int]) -> str:
        """Describe the ranks that have not begun the operation this rank is in, as far as the store can tell."""
        mine = self._counts.get(label, 0)
        absent = []
        for rank in ranks:
            if rank == self._rank:
                continue
            record = self._read(f"rank/{rank}")
            if record is None:
                absent.append(f"rank {rank} (never heard of)")
            elif record["counts"].get(label, 0) < mine:
                silent = time.time() - record["time"]
                doing = f"in {record['what']}" if record["what"] else record["state"]
                absent.append(f"rank {rank} on {record['host']} ({doing}; last heard of {silent:.0f} s ago)")
        return f"; missing: {', '.join(absent)}" if absent else ""

    def report(self, message: str, traceback: str) -> Failure | None:
        """Record that this rank failed, unless another did before.

        Returns:
            The first failure: this one, or the one that came before; None if the store is gone.
        """
        mine = Failure(rank=self._rank, host=socket.gethostname(), message=message, traceback=traceback)
        try:
            first = self._store.compare_set("failure", "", json.dumps(asdict(mine)))
        except Exception as error:
            _log.debug("could not report the failure: %s", error)
            return None
        self.failure = Failure(**json.loads(first))
        return self.failure

    def wait_for_failure(self, timeout_s: float) -> Failure | None:
        """Give another rank's failure ``timeout_s`` seconds to arrive, and return it."""
        end = time.monotonic() + timeout_s
        try:
            while self.failure is None and time.monotonic() < end:
                self._look()
                time.sleep(0.05)
        except Exception as error:
            _log.debug("the store went away: %s", error)
        return self.failure

    def leave(self, timeout_s: float) -> None:
        """Say that this rank is done, and return when all are, so that the store outlives everybody's use of it.

        Raises:
            RankFailure: Another rank failed, or one did not come within ``timeout_s``.
        """
        self._state = "has left the program"
        self._publish()
        self._store.set(f"left/{self._rank}", "1")
        self._await("left", timeout_s)
        self.close()
        self._store.set(f"gone/{self._rank}", "1")
        if self._rank == 0:  # hosts the store
            try:
                self._await("gone", min(timeout_s, 10.0))
            except RankFailure as error:
                _log.warning("%s", error)

    def linger(self) -> None:
        """Stay until the other ranks have read this rank's failure, at most a few seconds."""
        atexit.register(self._have_spoken)  # what nobody caught is printed before
        end = time.monotonic() + _ACK_S
        keys = [f"ack/{rank}" for rank in range(self._world_size) if rank != self._rank]
        try:
            while time.monotonic() < end and not self._store.check(keys):
                time.sleep(0.05)
        except Exception as error:
            _log.debug("the store went away: %s", error)

    def acknowledge(self) -> None:
        """Tell the failed rank that this one has read its words."""
        try:
            self._store.set(f"ack/{self._rank}", "1")
        except Exception as error:
            _log.debug("could not acknowledge: %s", error)

    def _have_spoken(self) -> None:
        try:
            self._store.set("spoken", "1")
        except Exception as error:
            _log.debug("the store went away: %s", error)

    def let_speak(self) -> None:
        """Stay until the rank that failed first has printed why, at most a few seconds: a launcher that sees one rank end
        ends them all."""
        end = time.monotonic() + _ACK_S + 1.0
        try:
            while time.monotonic() < end and not self._store.check(["spoken"]):
                time.sleep(0.05)
        except Exception as error:
            _log.debug("the store went away: %s", error)

    def close(self) -> None:
        """End the thread; the store stays open."""
        self._closing.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing.wait(self._interval_s):
            try:
                self._publish()
                self._look()
            except Exception as error:
                if self._closing.is_set():
                    return
                self._end_soon(
                    f"lost the connection to rank 0's store ({error}); rank 0 has most likely died", tell=True
                )
                return
            if self.failure is not None and self.failure.rank != self._rank:
                self.acknowledge()
                self._tell(f"rank {self.failure.rank} on {self.failure.host} failed first: {self.failure.message}")
                self._end_soon(f"rank {self.failure.rank} failed first: {self.failure.message}", tell=self._rank == 0)
                return
            stuck = self._stuck()
            if stuck:
                self.report(stuck, "")
                self._tell(stuck)
                self._end_soon(stuck, tell=True)
                return

    def _publish(self) -> None:
        with self._turn:
            counts, waiting = dict(self._counts), list(self._waiting)
        record = {
            "counts": counts,
            "what": waiting[-1][1] if waiting else "",
            "state": self._state,
            "time": time.time(),
            "host": socket.gethostname(),
        }
        self._store.set(f"rank/{self._rank}", json.dumps(record))

    def _look(self) -> None:
        if self.failure is None and self._store.check(["failure"]):
            self.failure = Failure(**json.loads(self._store.get("failure")))

    def _read(self, key: str) -> dict[str, Any] | None:
        try:
            if not self._store.check([key]):
                return None
            record: dict[str, Any] = json.loads(self._store.get(key))
        except Exception:
            return None
        return record

    def _stuck(self) -> str:
        """Describe the rank that left without beginning the operation that this rank is waiting in, if there is one."""
        with self._turn:
            waits = [wait for wait in self._waiting if time.monotonic() - wait[3] >= _STUCK_S]
        for label, what, ranks, since in waits:
            mine = self._counts.get(label, 0)
            for rank in ranks:
                if rank == self._rank or not self._store.check([f"left/{rank}"]):
                    continue
                record = self._read(f"rank/{rank}")
                if record is not None and record["counts"].get(label, 0) < mine:
                    return (
                        f"rank {rank} on {record['host']} has left the program (its with block ended or it called sys.exit) "
                        f"while rank {self._rank} has been waiting for it for {time.monotonic() - since:.0f} s in {what}; "
                        "every rank must make the same collective calls"
                    )
        return ""

    def _await(self, stage: str, timeout_s: float) -> None:
        keys = [f"{stage}/{rank}" for rank in range(self._world_size)]
        end = time.monotonic() + timeout_s
        pause = 0.001
        while not self._store.check(keys):
            self._look()
            self.raise_if_failed()
            if time.monotonic() > end:
                absent = [rank for rank in range(self._world_size) if not self._store.check([f"{stage}/{rank}"])]
                raise RankFailure(
                    f"rank {self._rank} waited {timeout_s:g} s at the end of the program for ranks {absent}"
                )
            time.sleep(pause)
            pause = min(0.1, pause * 1.5)

    def _tell(self, message: str) -> None:
        for listener in self.on_failure:
            listener(message)

    def _end_soon(self, message: str, *, tell: bool) -> None:
        """Let the main thread unwind; if it is stuck inside the engine, end the process."""
        if self._closing.wait(_GRACE_S):
            return
        if tell:
            print(f"hvdtrain: rank {self._rank} ends: {message}", file=sys.stderr, flush=True)  # noqa: T201 - last words
        for child in multiprocessing.active_children():  # DataLoader workers would outlive os._exit
            child.terminate()
        self._exit_process(1)

"""Who waits for what: the ranks' small talk beside the engine, so that no failure ends in a hang.

Each rank keeps one record in the ranks' store, beside the engine: how many collectives it has begun, and what it is waiting
for. One thread a rank publishes it and reads the others' last words. Out of that come

* *the first failure* (`hvdtrain.ranks.last_words`) reaches everybody, also a rank whose main thread is stuck inside an
  engine call;
* *the missing ranks*: a time-out names the ranks that did not come, and what they are doing instead;
* *the early leaver*: a rank that left the program cannot take part in a collective it never began, so whoever waits for
  it is told within seconds instead of at the time-out;
* *the dead*: the store sees a rank's process end that did not say farewell, and one of the others tells the user.

It never kills a rank for being slow: only a failure, a departure, a death or the loss of the store does, and a store is
lost when its host is gone or has not answered for as long as any wait may take.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple
from typing import Any

from hvdtrain.errors import RankFailure
from hvdtrain.ranks.last_words import GRACE_S, Failure, LastWords, NullWords
from hvdtrain.ranks.process_state import Process
from hvdtrain.ranks.store import Store, StoreLost

_log = logging.getLogger(__name__)

ALL_THE_SAME = "every rank must make the same collective calls"
_STUCK_S = 3.0  # how long a rank waits for a rank that has left before it says so
_DEATH_S = 1.0  # how long a rank has been gone before that is said: one whose launcher ends all ranks is no news
_SILENT = 5  # records that a rank that is alive does not miss in a row, however busy its host
_ANSWER_S = 2.0  # how long the store may take to answer a rank that has waited for too long already
_NOWHERE = nullcontext()


class NullWatch:
    """The watch of a world of one: there is nobody to watch."""

    def __init__(self) -> None:
        self.words = NullWords()
        """What ranks that failed have said."""
        self.on_failure: list[Callable[[str], None]] = []
        """Called, in the watch's thread, with what went wrong: an engine that can let its waits fail should do so."""
        self.step = 0
        """What this rank is at, for messages: steps of training that it has begun."""

    @property
    def failure(self) -> Failure | None:
        """The first failure, as far as this rank has heard."""
        return self.words.first

    def region(
        self, label: str, what: str, ranks: Sequence[int], *, again: bool = False
    ) -> AbstractContextManager[None]:
        """Do nothing."""
        return _NOWHERE

    @contextmanager
    def blind(self, what: str, timeout_s: float) -> Iterator[None]:
        """Do nothing."""
        yield

    def count(self, label: str) -> None:
        """Do nothing."""

    def end(self, reason: str) -> None:
        """End the process at once."""
        print(f"hvdtrain: {reason}", file=sys.stderr, flush=True)  # noqa: T201 - last words
        os._exit(1)

    def missing(self, label: str, ranks: Sequence[int]) -> str:
        """Return ""."""
        return ""

    def raise_if_failed(self) -> None:
        """Do nothing."""

    def elsewhere(self, label: str) -> str:
        """Return ""."""
        return ""

    def leave(self, timeout_s: float) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class _Region(AbstractContextManager[None]):
    """What `Watch.region` returns; entered once."""

    __slots__ = ("_again", "_waiting", "_watch")

    def __init__(self, watch: Watch, waiting: tuple[str, str, tuple[int, ...], float], again: bool) -> None:
        self._watch, self._waiting, self._again = watch, waiting, again

    def __enter__(self) -> None:
        watch, label = self._watch, self._waiting[0]
        if watch.words.first is not None:
            watch.raise_if_failed()
        with watch._turn:
            if not self._again:
                watch._counts[label] = watch._counts.get(label, 0) + 1
            watch._waiting.append(self._waiting)

    def __exit__(self, *_: object) -> None:
        with self._watch._turn:
            self._watch._waiting.remove(self._waiting)


class Watch(NullWatch):
    """One rank's part in the watch; `start` begins it, `leave` or `close` ends it.

    Args:
        store: This rank's connection with the ranks' store.
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
        super().__init__()
        self.words: LastWords = LastWords(store, rank, world_size)
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._interval_s = interval_s * max(1.0, world_size / 256)
        self._exit_process = exit_process
        self._host, self._process = socket.gethostname(), Process.here()
        self._lost: dict[int, float] = {}  # ranks whose process has ended, and since when this one knows
        self._left: list[int] = []  # ranks that have left the program in order
        self._counts: dict[str, int] = {}
        # Label, what, ranks, since; the innermost last. Threads wait beside each other.
        self._waiting: list[tuple[str, str, tuple[int, ...], float]] = []
        self._blind: dict[int, tuple[str, float, float]] = {}  # thread: what, its bound, since
        self._turn = threading.Lock()
        self._state = "computing"
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hvdtrain-watch", daemon=True)

    def start(self) -> None:
        """Publish the first record and begin watching."""
        self._look()
        self._thread.start()

    # -- what the other modules say and ask ---------------------------------------------------------------------------

    def region(
        self, label: str, what: str, ranks: Sequence[int], *, again: bool = False
    ) -> AbstractContextManager[None]:
        """Mark that this rank is inside an operation that needs ``ranks``.

        Args:
            label: The group whose operations are counted.
            what: The operation, for messages.
            ranks: World ranks that must take part.
            again: The operation was counted when it was started; this is the wait for it.
        """
        return _Region(self, (label, what, tuple(ranks), time.monotonic()), again)

    @contextmanager
    def blind(self, what: str, timeout_s: float) -> Iterator[None]:
        """Mark that this thread is inside a call of the engine that should return at once, and has no bound if it does not.

        A rank that is in there for longer than ``timeout_s`` seconds is ended by the watch: nothing else can.
        """
        thread = threading.get_ident()
        self._blind[thread] = what, timeout_s, time.monotonic()
        try:
            yield
        finally:
            del self._blind[thread]

    def count(self, label: str) -> None:
        """Count an operation that is about to begin, and that this rank does not wait in yet; as `region` does.

        Raises:
            RankFailure: Another rank has reported a failure.
        """
        if self.words.first is not None:
            self.raise_if_failed()
        with self._turn:
            self._counts[label] = self._counts.get(label, 0) + 1

    def end(self, reason: str) -> None:
        """End all ranks, and this process although its main thread is inside the engine; names the ranks that it waits for."""
        with self._turn:
            waiting = self._waiting[-1] if self._waiting else None
        if waiting is not None and "; missing: " not in reason:
            reason += self.missing(waiting[0], waiting[2])
        self.words.report(reason, "")
        self._notify(reason)
        self._end_soon(reason, aloud=True)

    def raise_if_failed(self) -> None:
        """Raise `RankFailure` if another rank has reported one."""
        failure = self.failure
        if failure is not None and failure.rank != self._rank:
            raise failure.error()

    def missing(self, label: str, ranks: Sequence[int]) -> str:
        """Describe the ranks that keep this one waiting, as far as the store can tell.

        They have not begun the operation that it is in; or they have, and were not heard of since: such a rank was
        stopped or cut off in the middle of it.
        """
        mine = self._counts.get(label, 0)
        try:
            records = self._read([rank for rank in ranks if rank != self._rank], within_s=_ANSWER_S)
        except StoreLost as error:
            return f"; rank 0's host does not tell which ranks are missing: {error}"
        absent = []
        for rank, record in records.items():
            if record is None:
                absent.append(f"rank {rank} (never heard of)")
            elif record["counts"].get(label, 0) < mine or record["silent_s"] > _SILENT * self._interval_s:
                absent.append(f"rank {rank} on {record['host']} ({_doing(record)})")
        return f"; missing: {', '.join(absent)}" if absent else ""

    def elsewhere(self, label: str) -> str:
        """Describe a rank that is in another operation, which cannot end without this rank and which it has not begun.

        Args:
            label: Of the operation that this rank is in: a rank in one of these is not elsewhere.
        """
        try:
            records = self._read([rank for rank in range(self._world_size) if rank != self._rank])
        except StoreLost:
            return ""
        for rank, record in records.items():
            if record is None or not record["what"] or self._rank not in (record["ranks"] or [self._rank]):
                continue
            other = record["label"]
            if other != label and record["counts"][other] > self._counts.get(other, 0):
                return f"rank {rank} on {record['host']} is not: it waits in {record['what']}; {ALL_THE_SAME}"
        return ""

    def leave(self, timeout_s: float) -> None:
        """Say that this rank is done, and return when all are; the connection to the store stays open.

        Raises:
            RankFailure: Another rank failed, or one did not come within ``timeout_s``.
        """
        self._state = "has left the program"
        try:
            self._publish()
            self._store.set(f"left/{self._rank}", "1")
            self._await_all(timeout_s)
        except StoreLost as error:
            raise RankFailure(f"rank {self._rank} waited at the end of the program for the others: {error}") from error
        self.close()

    def close(self) -> None:
        """End the thread; the store stays open."""
        self._closing.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing.wait(self._interval_s):
            try:
                self._look()
                stuck = self._stuck() or self._overdue()
            except StoreLost as error:
                if not self._closing.is_set():
                    self._end_soon(f"rank 0's host is gone, stopped or cut off: {error}", aloud=True)
                return
            if self.failure is None and stuck:
                self.words.report(stuck, "")
                self._notify(stuck)
                self._end_soon(stuck, aloud=True)
                return
            if self.failure is not None and self.failure.rank != self._rank:
                self.words.acknowledge()
                self._notify(str(self.failure.error()))
                self._end_soon(self.failure.sentence, aloud=self._rank == 0 and not self.failure.died)
                return

    def _look(self) -> None:
        """Publish this rank's record and read what is new, all in one question."""
        _, said, lost, left = self._store.ask(self._own_record(), ["get", "failure"], ["lost"], ["names", "left/"])
        self.words.hear(said)
        self._left = [int(key.removeprefix("left/")) for key in left]
        now = time.monotonic()
        for rank, how in lost:
            since = self._lost.setdefault(rank, now)
            if rank in self._left or rank == self._rank:
                continue
            if self.failure is None and now - since >= _DEATH_S:
                record = self._read([rank])[rank]
                host = record["host"] if record else "an unknown host"
                self.words.report_death(rank, host, _death(how, record))

    def _publish(self) -> None:
        self._store.ask(self._own_record())

    def _own_record(self) -> list[str]:
        with self._turn:
            counts, waiting = dict(self._counts), self._waiting[-1] if self._waiting else None
        record = {
            "counts": counts,
            "what": waiting[1] if waiting else "",
            "label": waiting[0] if waiting else "",
            "ranks": list(waiting[2]) if waiting and len(waiting[2]) < self._world_size else None,  # None: everybody
            "state": self._state,
            "step": self.step,
            "host": self._host,
            "process": astuple(self._process) if self._process is not None else None,
        }
        return ["set", f"rank/{self._rank}", json.dumps(record)]

    def _read(self, ranks: Sequence[int], *, within_s: float | None = None) -> dict[int, dict[str, Any] | None]:
        """Other ranks' records, and since when each is silent; None where there is none."""
        keys = [f"rank/{rank}" for rank in ranks]
        ages, *found = self._store.ask(["ages", keys], *(["get", key] for key in keys), within_s=within_s)
        return {
            rank: None if record is None else {**json.loads(record), "silent_s": age}
            for rank, record, age in zip(ranks, found, ages, strict=True)
        }

    def _stuck(self) -> str:
        """Describe the rank that left without beginning the operation that this rank is waiting in, if there is one."""
        with self._turn:
            waits = [wait for wait in self._waiting if time.monotonic() - wait[3] >= _STUCK_S]
        for label, what, ranks, since in waits:
            mine = self._counts.get(label, 0)
            left = [rank for rank in ranks if rank != self._rank and rank in self._left]
            records = self._read(left) if left else {}
            for rank, record in records.items():
                if record is not None and record["counts"].get(label, 0) < mine:
                    return (
                        f"rank {rank} on {record['host']} has left the program (its with block ended or it called sys.exit) "
                        f"while rank {self._rank} has been waiting for it for {time.monotonic() - since:.0f} s in {what}; {ALL_THE_SAME}"
                    )
        return ""

    def _overdue(self) -> str:
        """Describe a call of the engine that should have returned at once and has not within its bound, if there is one."""
        for what, timeout_s, since in tuple(self._blind.values()):
            if time.monotonic() - since > timeout_s:
                silent = self.missing("", range(self._world_size))
                return f"rank {self._rank} waited {timeout_s:g} s inside the engine, which did not let it begin {what}{silent}"
        return ""

    def _await_all(self, timeout_s: float) -> None:
        keys = [f"left/{rank}" for rank in range(self._world_size)]
        end = time.monotonic() + timeout_s
        pause = 0.001
        while not self._store.check(keys):
            self.words.listen()
            self.raise_if_failed()
            if time.monotonic() > end:
                found = self._store.ask(*(["check", [key]] for key in keys))
                absent = [rank for rank, has in enumerate(found) if not has]
                raise RankFailure(
                    f"rank {self._rank} waited {timeout_s:g} s at the end of the program for ranks {absent}"
                )
            time.sleep(pause)
            pause = min(0.1, pause * 1.5)

    def _notify(self, message: str) -> None:
        for listener in self.on_failure:
            listener(message)

    def _end_soon(self, message: str, *, aloud: bool) -> None:
        """Let the main thread unwind; if it is stuck inside the engine, end the process."""
        if self._closing.wait(GRACE_S):
            return
        self.words.speak_for_the_dead()
        if aloud:
            print(f"hvdtrain: rank {self._rank} ends: {message}", file=sys.stderr, flush=True)  # noqa: T201 - last words
        self.words.end_stopped()
        for child in multiprocessing.active_children():  # DataLoader workers would outlive os._exit
            child.terminate()
        self._exit_process(1)


def _doing(record: dict[str, Any]) -> str:
    """What a rank was at when it was last heard of, in words."""
    doing = f"in {record['what']}" if record["what"] else record["state"]
    process = Process(*record["process"]) if record["process"] else None
    stopped = process is not None and process.is_here() and process.is_stopped()
    return (
        f"{doing}; {'its process is stopped, and was ' if stopped else ''}last heard of {record['silent_s']:.0f} s ago"
    )


def _death(how: str, record: dict[str, Any] | None) -> str:
    """How and when a rank ended, in words."""
    ended = f"died ({how})" if how.startswith("signal") else f"ended ({how}) without leaving" if how else "died"
    if record is None:
        return ended
    return f"{ended} during {record['what'] or 'step ' + str(record['step'])}"

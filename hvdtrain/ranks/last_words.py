"""Who failed first, who may speak, and what the user reads of it.

The rank that fails first leaves its traceback in the store; whoever fails later, or because of it, ends quietly as its
victim. All the moments of patience that this takes stand here: a launcher ends every rank as soon as one has ended, so
that the one who knows why must have spoken before anybody goes.
"""

from __future__ import annotations

import atexit
import json
import logging
import re
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from hvdtrain.errors import CollectiveError, HvdtrainError, RankFailure
from hvdtrain.ranks.describing import EndedAsVictim, described, traced
from hvdtrain.ranks.process_state import Process
from hvdtrain.ranks.store import Store, StoreLost

if TYPE_CHECKING:
    from hvdtrain.ranks.watch import NullWatch

_log = logging.getLogger(__name__)

ACK_S = 3.0  # how long a failed rank stays so that the others can read its words
GRACE_S = 3.0  # how long a victim's main thread gets to unwind before the process ends
_SPEAK_S = ACK_S + 1.0  # how long a victim waits for the rank that failed to have shown why
_BLAME_S = 2.5  # how long a rank whose engine failed waits to hear whose fault it was
_COURTESY_S = 1.5  # how long a victim stays after the rank that failed has been heard
_ANSWER_S = 2.0  # how long the store may take to answer a rank that ends

_ENGINE_ERROR = re.compile(
    r"gloo|nccl|c10d|horovod|mpi4py|DistBackendError|connection (closed|reset|refused)|broken pipe|timed out|socket|store",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A rank's last words.

    Attributes:
        rank: Which.
        host: Where it ran.
        message: What it says, or how it died.
        traceback: Its traceback; "" for none.
        died: It ended without a word.
        speaker: The rank that tells the user: itself, or one that found it dead.
    """

    rank: int
    host: str
    message: str
    traceback: str
    died: bool = False
    speaker: int = -1

    @property
    def sentence(self) -> str:
        """What the user should know."""
        return f"rank {self.rank} on {self.host} {'' if self.died else 'failed first: '}{self.message}"

    def error(self) -> RankFailure:
        """As what its victims raise."""
        return RankFailure(self.sentence, rank=self.rank, rank_traceback=self.traceback)


class NullWords:
    """The last words in a world of one: nobody else fails, and nobody listens."""

    first: Failure | None = None
    """The first failure, as far as this rank has heard."""
    rank = 0

    def listen(self) -> None:
        """Do nothing."""

    def report(self, message: str, traceback: str) -> Failure | None:
        """Return None: there is nobody to tell."""
        return None

    def report_death(self, rank: int, host: str, message: str) -> Failure | None:
        """Return None."""
        return None

    def wait_for_first(self, timeout_s: float) -> Failure | None:
        """Return None."""
        return None

    def linger(self) -> None:
        """Do nothing."""

    def acknowledge(self) -> None:
        """Do nothing."""

    def let_speak(self) -> None:
        """Do nothing."""

    def speak_for_the_dead(self) -> None:
        """Do nothing."""

    def end_stopped(self) -> None:
        """Do nothing."""


class LastWords(NullWords):
    """What the ranks of one job leave in a store when one of them fails.

    Args:
        store: That of the watch.
        rank: This rank.
        world_size: Number of ranks.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store = store
        self.rank = rank
        self._others = [other for other in range(world_size) if other != rank]
        self._spoke = threading.Lock()  # taken by the thread that speaks for a rank that died, and kept

    def listen(self) -> None:
        """Look whether a rank has failed; raises what the store raises."""
        if self.first is None:
            (said,) = self._store.ask(["get", "failure"])
            self.hear(said)

    def hear(self, said: str | None) -> None:
        """Take what the store holds for a failure, None for nothing."""
        if said is not None and self.first is None:
            self.first = Failure(**json.loads(said))

    def report(self, message: str, traceback: str) -> Failure | None:
        """Record that this rank failed, unless another did before.

        Returns:
            The first failure: this one, or the one that came before; None if the store is gone.
        """
        return self._first_of(
            Failure(rank=self.rank, host=socket.gethostname(), message=message, traceback=traceback, speaker=self.rank)
        )

    def report_death(self, rank: int, host: str, message: str) -> Failure | None:
        """Record that another rank ended without a word, unless something else failed before; returns as `report`."""
        return self._first_of(
            Failure(rank=rank, host=host, message=message, traceback="", died=True, speaker=self.rank)
        )

    def wait_for_first(self, timeout_s: float) -> Failure | None:
        """Give another rank's failure ``timeout_s`` seconds to arrive, and return it."""
        end = time.monotonic() + timeout_s
        while self.first is None and time.monotonic() < end:
            try:
                (said,) = self._store.ask(["get", "failure"], within_s=_ANSWER_S)
            except StoreLost as error:
                _log.debug("%s", error)
                break
            self.hear(said)
            time.sleep(0.05)
        return self.first

    def linger(self) -> None:
        """Stay until the other ranks have read this rank's failure, at most a few seconds."""
        atexit.register(self._have_spoken)  # what nobody caught is printed before
        self._wait_for([f"ack/{rank}" for rank in self._others], ACK_S)

    def acknowledge(self) -> None:
        """Tell the failed rank that this one has read its words."""
        self._set(f"ack/{self.rank}")

    def let_speak(self) -> None:
        """Stay until the user was told why, at most a few seconds: a launcher that sees one rank end ends them all."""
        self.speak_for_the_dead()
        self._wait_for(["spoken"], _SPEAK_S)

    def speak_for_the_dead(self) -> None:
        """If the first failure is a death that this rank found, tell the user; once."""
        first = self.first
        if first is None or not first.died or first.speaker != self.rank or not self._spoke.acquire(blocking=False):
            return
        print(f"hvdtrain: {first.sentence}", file=sys.stderr, flush=True)  # noqa: T201 - last words
        self._have_spoken()

    def end_stopped(self) -> None:
        """End ranks on this host that are stopped: a launcher's SIGTERM does not reach them."""
        try:
            records = self._store.ask(*(["get", f"rank/{rank}"] for rank in self._others), within_s=_ANSWER_S)
        except StoreLost as error:
            _log.debug("%s", error)
            return
        for record in records:
            known = json.loads(record)["process"] if record is not None else None
            process = Process(*known) if known is not None else None
            if process is not None and process.is_here() and process.state() == "T":
                process.kill()

    def _first_of(self, mine: Failure) -> Failure | None:
        try:
            (first,) = self._store.ask(["compare_set", "failure", "", json.dumps(asdict(mine))], within_s=_ANSWER_S)
        except StoreLost as error:
            _log.debug("could not report the failure: %s", error)
            return self.first
        self.first = Failure(**json.loads(first))
        return self.first

    def _have_spoken(self) -> None:
        self._set("spoken")
        self.end_stopped()

    def _set(self, key: str) -> None:
        try:
            self._store.ask(["set", key, "1"], within_s=_ANSWER_S)
        except StoreLost as error:
            _log.debug("the store went away before %s: %s", key, error)

    def _wait_for(self, keys: list[str], timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        try:
            while time.monotonic() < end and not self._store.ask(["check", keys], within_s=_ANSWER_S)[0]:
                time.sleep(0.05)
        except StoreLost as error:
            _log.debug("the store went away: %s", error)


def conclude(error: BaseException, watch: NullWatch) -> RankFailure | None:
    """Find out who failed first, stay until that was heard, and end the watch.

    Args:
        error: What ends this rank.
        watch: Of the ranks that it ends with.

    Returns:
        None if this rank is the first that failed (its traceback is what the user should read); otherwise the failure of
        the rank that was, and this rank should end quietly.
    """
    words = watch.words
    if isinstance(error, RankFailure) or is_engine_error(error):
        words.wait_for_first(0.0 if isinstance(error, RankFailure) else _BLAME_S)
    first = words.report(described(error), traced(error))
    mine = first is not None and first.rank == words.rank
    if mine:
        words.linger()
    else:
        words.acknowledge()
    watch.close()
    if first is None or mine:
        return error if isinstance(error, RankFailure) else None
    words.let_speak()
    return first.error()


def end_as_victim(failure: RankFailure) -> None:
    """End this rank quietly, and not before the one that failed: it has the traceback.

    Raises:
        RankFailure: Nobody knows which rank that was, so that this one must say what it knows.
        EndedAsVictim: In all other cases.
    """
    _log.debug("this rank ends: %s", failure)
    if failure.rank is None:
        raise failure
    time.sleep(_COURTESY_S)  # launchers end all ranks as soon as one has ended
    raise EndedAsVictim(HvdtrainError.exit_code) from None


def is_engine_error(error: BaseException) -> bool:
    """Whether the engine, not the user's code, raised it: then another rank may be the cause."""
    if isinstance(error, (torch.distributed.DistError, ConnectionError)):
        return True
    if isinstance(error, CollectiveError):
        return error.__cause__ is not None
    return isinstance(error, RuntimeError) and _ENGINE_ERROR.search(described(error)) is not None


def leave_for_launcher(error: BaseException, file: str | None) -> None:
    """Leave the traceback in the file where the launcher's summary looks for it, if it names one (torchrun does)."""
    if file is None:
        return
    content = {
        "message": {
            "message": described(error),
            "extraInfo": {
                "py_callstack": traced(error),
                "timestamp": str(int(time.time())),
            },
        }
    }
    try:
        with open(file, "w") as target:
            json.dump(content, target)
    except OSError as problem:
        _log.debug("could not write %s: %s", file, problem)

"""A rank's connection to the ranks' store: every question is answered within a bound, or the store is lost.

torch's own TCPStore is not used for this: it listens on all addresses without a secret, lives in rank 0, and waits without
a bound for one that is stopped.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from hvdtrain.launch.environment import given
from hvdtrain.ranks import frames
from hvdtrain.ranks.process_state import Process
from hvdtrain.ranks.records import Records, raw, text

_ROOT = str(Path(__file__).resolve().parents[2])
_RUN = "import sys; sys.path.append(sys.argv[2]); from hvdtrain.ranks.store_server import main; main()"
_READ_BYTES = 2**18
_left_behind: list[subprocess.Popen[bytes]] = []  # of stores that outlive this process's use of them


class StoreLost(ConnectionError):
    """The ranks' store is gone, or did not answer within the bound."""


class StoreSilent(StoreLost):
    """It has not answered yet. It may be asked again."""


class Store:
    """Keys and values that all ranks of a job share; this one holds them itself, for a world of one."""

    key = b""
    """Known to the ranks of this job alone; b"" in a world of one."""

    def __init__(self) -> None:
        self._records = Records()

    def ask(self, *operations: Sequence[Any], within_s: float | None = None) -> list[Any]:
        """Do several operations at once (see `Records`).

        Args:
            within_s: How long to wait for the answer, in seconds; None for the store's own bound.

        Raises:
            StoreLost: There was none; a `StoreSilent` if there may be one later.
        """
        return self._records.do(operations)

    def close(self, *, farewell: bool = True) -> None:
        """End this rank's use of it.

        Args:
            farewell: Say so first. A rank that has not, and is gone, is lost.
        """

    # -- what is asked ------------------------------------------------------------------------------------------------

    def set(self, key: str, value: str | bytes) -> None:
        """Give a key a value."""
        self.ask(["set", key, _carried(value)])

    def get(self, key: str) -> bytes:
        """A key's value.

        Raises:
            KeyError: It has none. (Nothing here waits until it has.)
        """
        (found,) = self.ask(["get", key])
        if found is None:
            raise KeyError(key)
        return raw(found)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all of the keys have values."""
        return bool(self.ask(["check", list(keys)])[0])

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """Set a key that has the expected value, or has none while "" is expected; return what it has then."""
        return raw(self.ask(["compare_set", key, _carried(expected), _carried(desired)])[0])

    def add(self, key: str, amount: int) -> int:
        """Add to a number, which begins as 0, and return the sum."""
        return int(self.ask(["add", key, amount])[0])

    def append(self, key: str, value: str | bytes) -> None:
        """Append to a key's value."""
        self.ask(["append", key, _carried(value)])

    def delete_key(self, key: str) -> bool:
        """Forget a key; say whether it had a value."""
        return bool(self.ask(["delete", key])[0])

    def count(self) -> int:
        """How many keys have values."""
        return int(self.ask(["count", ""])[0])

    def lost(self) -> dict[int, str]:
        """Ranks that have gone without a farewell, each with how: "signal 9", or "" if nobody could see."""
        return dict(self.ask(["lost"])[0])

    def under(self, prefix: str) -> Store:
        """The same store, where each key has a prefix."""
        return _Part(self, prefix)


class _Part(Store):
    def __init__(self, whole: Store, prefix: str) -> None:
        self._whole, self._prefix = whole, f"{prefix}/"

    def ask(self, *operations: Sequence[Any], within_s: float | None = None) -> list[Any]:
        return self._whole.ask(*(self._prefixed(*operation) for operation in operations), within_s=within_s)

    def close(self, *, farewell: bool = True) -> None:
        self._whole.close(farewell=farewell)

    def _prefixed(self, name: str, *rest: Any) -> list[Any]:
        if not rest:
            return [name]
        first = [self._prefix + key for key in rest[0]] if isinstance(rest[0], list) else self._prefix + rest[0]
        return [name, first, *rest[1:]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where a store listens: a Unix socket's path, or a host and a port."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        return self.path or f"{self.host} port {self.port}"


class RemoteStore(Store):
    """A connection to the store's process; several threads may share it.

    Args:
        address: Where it listens.
        secret: The job's.
        rank: This rank.
        answer_s: Bound of each answer, in seconds.
        connect_s: Bound of the start, in seconds.

    Raises:
        StoreLost: Nothing answers there, or what does has not the same secret.
    """

    def __init__(
        self, address: Address, secret: bytes, rank: int, *, answer_s: float, connect_s: float | None = None
    ) -> None:
        self.address, self._answer_s = address, answer_s
        self.key = frames.proof(secret, "key")
        self._turn = threading.Lock()
        self._lost = ""
        self._owed = 0  # answers that have not come
        self._received = frames.Buffer(frames.GREETING_BYTES)
        end = time.monotonic() + (answer_s if connect_s is None else connect_s)
        try:
            self._socket = _connect(address, end)
            _open.add(self)
            self._signer = self._greet(secret, rank, end)
        except (OSError, frames.Refused) as error:
            self._break(str(error))
            raise StoreLost(f"the ranks' store at {address} did not let this rank in: {error}") from error
        self._received.largest = frames.LARGEST_BYTES

    def ask(self, *operations: Sequence[Any], within_s: float | None = None) -> list[Any]:
        """As `Store.ask`."""
        bound = self._answer_s if within_s is None else within_s
        end = time.monotonic() + bound
        content = json.dumps(operations).encode()
        silence = f"no answer from the ranks' store at {self.address} within {bound:g} s"
        if not self._turn.acquire(timeout=bound):
            raise StoreSilent(silence)
        try:
            if self._lost:
                raise StoreLost(self._lost)
            try:
                self._send(self._signer.sign(content), end)
            except TimeoutError:  # half a question
                self._break(silence)
                raise
            self._owed += 1
            while self._owed:  # answers to questions whose askers have gone are for nobody
                answer: list[Any] = json.loads(self._signer.check(self._next(end)))
                self._owed -= 1
        except StoreLost:
            raise
        except TimeoutError as error:
            raise StoreSilent(silence) from error
        except (OSError, frames.Refused) as error:
            if not self._lost:
                self._break(f"the connection to the ranks' store at {self.address} was lost: {error}")
            raise StoreLost(self._lost) from error
        finally:
            self._turn.release()
        return answer

    def close(self, *, farewell: bool = True) -> None:
        """End the connection; may be called again."""
        if not self._turn.acquire(timeout=1.0):
            return
        try:
            if farewell and not self._lost:
                self._send(self._signer.sign(json.dumps("farewell").encode()), time.monotonic() + 1.0)
        except OSError:
            pass
        finally:
            self._break("this rank has left the ranks' store")
            self._turn.release()

    def __del__(self) -> None:
        if hasattr(self, "_socket"):
            self._socket.close()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _greet(self, secret: bytes, rank: int, end: float) -> frames.Signer:
        mine, here = frames.nonce(), Process.here()
        theirs = self._next(end)
        who = json.dumps({"rank": rank, "process": astuple(here) if here is not None else None})
        proof = frames.proof(secret, "rank", theirs, mine, who.encode())
        greeting = {"nonce": mine.hex(), "who": who, "proof": proof.hex()}
        self._send(frames.frame(json.dumps(greeting).encode()), end)
        if not frames.same(self._next(end), frames.proof(secret, "store", mine, theirs)):
            raise frames.Refused("what listens there does not know this job's secret")
        return frames.Signer(secret, theirs, mine, listens=False)

    def _send(self, content: bytes, end: float) -> None:
        self._socket.settimeout(max(0.001, end - time.monotonic()))
        self._socket.sendall(content)

    def _next(self, end: float) -> bytes:
        while (body := self._received.take()) is None:
            self._socket.settimeout(max(0.001, end - time.monotonic()))
            received = self._socket.recv(_READ_BYTES)
            if not received:
                raise ConnectionResetError("it was closed there")
            self._received.feed(received)
        return body

    def _break(self, reason: str) -> None:
        self._lost = self._lost or reason
        if hasattr(self, "_socket"):
            self._socket.close()

    def _forget(self) -> None:
        """In a forked child: the connection is the parent's, and must not outlive it here."""
        self._break("the ranks' store is connected with this process's parent")
        self._turn = threading.Lock()


_open: weakref.WeakSet[RemoteStore] = weakref.WeakSet()


def _forget_all() -> None:
    for store in list(_open):
        store._forget()


os.register_at_fork(after_in_child=_forget_all)


class StoreProcess:
    """The process that serves a store; see `hvdtrain.ranks.store_server`.

    Args:
        listener: A listening socket, which that process takes over.
        secret: The job's.
        file: In which the others find the store; removed with it.
    """

    def __init__(self, listener: socket.socket, secret: bytes, file: Path | None = None) -> None:
        _left_behind[:] = [process for process in _left_behind if process.poll() is None]
        told = {"secret": secret.hex(), "file": None if file is None else str(file), "starter": os.getpid()}
        with listener:
            # -I and -S: neither the environment nor packages of the user's have a say in it.
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    "-B",
                    "-c",
                    _RUN,
                    str(listener.fileno()),
                    _ROOT,
                    str(listener.getsockname()),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
                start_new_session=True,
                cwd="/",
                env=_environment(),
            )
        assert self._process.stdin is not None
        with self._process.stdin as told_there:
            told_there.write(json.dumps(told).encode())
        _left_behind.append(self._process)

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def wait(self, timeout_s: float) -> None:
        """Return when it has ended, which it does when all ranks have; or after ``timeout_s`` seconds."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return
        if self._process in _left_behind:
            _left_behind.remove(self._process)


def _connect(address: Address, end: float) -> socket.socket:
    left = max(0.001, end - time.monotonic())
    if not address.path:
        connected = socket.create_connection((address.host, address.port), timeout=left)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connected
    connected = socket.socket(socket.AF_UNIX)
    try:
        connected.settimeout(left)
        connected.connect(address.path)
    except OSError:
        connected.close()
        raise
    return connected


def _environment() -> dict[str, str]:
    """What Python needs to start, and not what makes a process one of the ranks."""
    names = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME")
    return {name: value for name in names if (value := given(name)) is not None}


def _carried(value: str | bytes) -> str:
    return text(value.encode() if isinstance(value, str) else value)

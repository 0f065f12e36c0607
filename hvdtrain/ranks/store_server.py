"""The process in which the ranks' store lives, started by rank 0 and by nothing else.

A process of its own, so that the ranks hear of each other also while rank 0 is dead, stopped, or busy in a call that lets
no other thread of it run. It has no parent to end it: it ends itself when no rank is connected any more. It serves all
connections from one loop, so that one that says nothing holds up nobody.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvdtrain.ranks import frames
from hvdtrain.ranks.process_state import Process
from hvdtrain.ranks.records import Records

_GREETING_S = 10.0  # how long whoever connects may take to prove that it knows the secret
_STRANGERS = 256  # connections that have not proved it yet; the oldest goes first
_FIRST_S = 120.0  # how long to wait for the first rank
_LOOK_S = 0.5  # how often to look whether processes of this host are still there
_READ_BYTES = 2**18


@dataclass(eq=False, slots=True)
class _Connection:
    socket: socket.socket
    local: bool
    nonce: bytes = field(default_factory=frames.nonce)
    since: float = field(default_factory=time.monotonic)
    received: frames.Buffer = field(default_factory=lambda: frames.Buffer(frames.GREETING_BYTES))
    to_send: bytearray = field(default_factory=bytearray)
    signer: frames.Signer | None = None
    rank: int | None = None
    process: Process | None = None
    farewell: bool = False


class Server:
    """Serves one job's ranks until they are gone.

    Args:
        listener: A listening socket.
        secret: The job's.
        starter: The process that started this one, rank 0's.
    """

    def __init__(self, listener: socket.socket, secret: bytes, starter: int) -> None:
        self._listener, self._secret, self._starter = listener, secret, starter
        self._records = Records()
        self._selector = selectors.DefaultSelector()
        self._connections: set[_Connection] = set()
        self._began = time.monotonic()
        self._met = False
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def serve(self) -> None:
        """Return when the last rank has gone, or none has come."""
        look = 0.0
        while not self._over():
            for key, events in self._selector.select(_LOOK_S):
                if key.data is None:
                    self._accept()
                elif key.data in self._connections:
                    self._attend(key.data, events)
            now = time.monotonic()
            if now >= look:
                look = now + _LOOK_S
                self._look(now)

    def _over(self) -> bool:
        if self._met:
            return not any(connection.signer for connection in self._connections)
        return os.getppid() != self._starter or time.monotonic() > self._began + _FIRST_S

    def _accept(self) -> None:
        try:
            connected, _ = self._listener.accept()
        except OSError:  # it has gone again; or there are no descriptors left, until some connection ends
            time.sleep(0.01)
            return
        connected.setblocking(False)
        local = connected.family == socket.AF_UNIX
        if local and _user(connected) not in (os.getuid(), 0):
            connected.close()
            return
        if not local:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        strangers = sorted((one for one in self._connections if one.signer is None), key=lambda one: one.since)
        for one in strangers[: max(0, len(strangers) - _STRANGERS + 1)]:
            self._drop(one)
        connection = _Connection(connected, local)
        self._connections.add(connection)
        self._selector.register(connected, selectors.EVENT_READ, connection)
        try:
            self._send(connection, frames.frame(connection.nonce))
        except OSError:  # it has gone again
            self._drop(connection)

    def _attend(self, connection: _Connection, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self._send(connection, b"")
            if events & selectors.EVENT_READ:
                received = connection.socket.recv(_READ_BYTES)
                if not received:
                    self._drop(connection)
                    return
                connection.received.feed(received)
                while connection in self._connections and (body := connection.received.take()) is not None:
                    self._answer(connection, body)
        except BlockingIOError:
            return
        except (OSError, frames.Refused, ValueError, KeyError, TypeError, AttributeError):  # not one of us
            self._drop(connection)

    def _answer(self, connection: _Connection, body: bytes) -> None:
        if connection.signer is None:
            self._greet(connection, body)
            return
        operations = json.loads(connection.signer.check(body))
        if operations == "farewell":
            connection.farewell = True
            return
        answer = json.dumps(self._records.do(operations)).encode()
        self._send(connection, connection.signer.sign(answer))

    def _greet(self, connection: _Connection, body: bytes) -> None:
        greeting = json.loads(body)
        theirs, who = bytes.fromhex(greeting["nonce"]), greeting["who"]
        expected = frames.proof(self._secret, "rank", connection.nonce, theirs, who.encode())
        if len(theirs) != frames.NONCE_BYTES or not frames.same(bytes.fromhex(greeting["proof"]), expected):
            raise frames.Refused("no proof")
        described = json.loads(who)
        connection.rank = described["rank"]
        process = Process(*described["process"]) if described["process"] else None
        connection.process = process if process is not None and process.is_here() else None
        connection.signer = frames.Signer(self._secret, connection.nonce, theirs, listens=True)
        connection.received.largest = frames.LARGEST_BYTES
        self._met = True
        self._send(connection, frames.frame(frames.proof(self._secret, "store", theirs, connection.nonce)))

    def _send(self, connection: _Connection, content: bytes) -> None:
        connection.to_send += content
        with suppress(BlockingIOError):
            sent = connection.socket.send(connection.to_send)
            del connection.to_send[:sent]
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.to_send else 0)
        self._selector.modify(connection.socket, wanted, connection)

    def _drop(self, connection: _Connection) -> None:
        how = connection.process.ended() if connection.process is not None else ""
        self._connections.discard(connection)
        self._selector.unregister(connection.socket)
        connection.socket.close()
        if connection.signer is not None and connection.rank is not None and not connection.farewell:
            self._records.lost.setdefault(connection.rank, how)

    def _look(self, now: float) -> None:
        for connection in list(self._connections):
            if connection.signer is None:
                if now > connection.since + _GREETING_S:
                    self._drop(connection)
            # A child of a rank may hold its connection open.
            elif connection.process is not None and connection.process.is_gone():
                self._drop(connection)


def _user(connected: socket.socket) -> int:
    """The user whose process is at the other end of a Unix socket."""
    _, user, _ = struct.unpack("3i", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)


def main() -> None:
    """Serve on the listening socket whose descriptor is named, with what stands in the standard input."""
    told: dict[str, Any] = json.loads(sys.stdin.read())
    descriptor = int(sys.argv[1])
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the ranks may save and leave in order
        signal.signal(name, signal.SIG_IGN)
    quiet = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(quiet, standard)
    listener = socket.socket(fileno=descriptor)
    try:
        Server(listener, bytes.fromhex(told["secret"]), told["starter"]).serve()
    finally:  # what rank 0 removes, unless it was ended before
        _remove(listener, told["file"])


def _remove(listener: socket.socket, file: str | None) -> None:
    path = listener.getsockname() if listener.family == socket.AF_UNIX else ""
    with suppress(OSError):
        if path:
            os.unlink(path)
    with suppress(OSError, ValueError):
        if file is not None and json.loads(Path(file).read_text())["path"] == path != "":  # and not another job's
            os.unlink(file)

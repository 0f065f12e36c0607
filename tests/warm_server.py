"""Loads PyTorch, and makes copies of this process, each of which runs what a Python of its own would (see warm.py)."""

from __future__ import annotations

import array
import gc
import io
import json
import os
import random
import runpy
import selectors
import signal
import socket
import sys
import types
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed.run  # the launcher is a copy, too

del sys.modules["torch.distributed.run"]  # it will be __main__; what it imports stays
sys.path.pop(0)  # this folder

EARLY: dict = runpy.run_path(str(Path(__file__).with_name("warm_start.py")))
HAS = EARLY["early"](dict(os.environ))
PATH = list(sys.path)


def received(connection: socket.socket) -> tuple[dict, list[int]]:
    """What is asked for, and the job's standard files; nothing if who asked is gone already."""
    files = array.array("i")
    head, rights, *_ = connection.recvmsg(8, socket.CMSG_SPACE(3 * files.itemsize), socket.MSG_WAITALL)
    for _, _, data in rights:
        files.frombytes(data)
    size = int.from_bytes(head, "big")
    asked = b""
    while len(asked) < size and (more := connection.recv(size - len(asked))):
        asked += more
    return json.loads(asked) if size and len(asked) == size else {}, list(files)


class Server:
    """Makes copies of this process and tells who asked for one how it ended."""

    def __init__(self, address: str) -> None:
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(address + "_")
        self.listening.listen(64)
        os.rename(address + "_", address)  # whoever finds it is heard
        self.chosen = selectors.DefaultSelector()
        self.jobs: dict[int, tuple[int, socket.socket]] = {}  # by pidfd
        self.chosen.register(0, selectors.EVENT_READ, self.leave)
        self.chosen.register(self.listening, selectors.EVENT_READ, self.accept)

    def serve(self) -> dict:
        """Returns in copies only, with what is theirs to do."""
        while True:
            for key, _ in self.chosen.select():
                if job := key.data(key.fileobj):
                    return job

    def leave(self, _: int) -> None:
        """The tests have ended."""
        for pid, _ in self.jobs.values():
            self.kill(pid)
        os._exit(0)

    def accept(self, listening: socket.socket) -> dict | None:
        connection, _ = listening.accept()
        asked, files = received(connection)
        pid = 0
        if asked and EARLY["early"](asked["environment"]) == HAS:
            pid = os.fork()
            if not pid:
                self.close(connection)
                return {**asked, "files": files}
        for fd in files:
            os.close(fd)
        with suppress(OSError):  # it is gone: `gone` sees it
            connection.sendall(pid.to_bytes(8, "big"))
        if pid:
            fd = os.pidfd_open(pid)
            self.jobs[fd] = pid, connection
            self.chosen.register(fd, selectors.EVENT_READ, self.ended)
            self.chosen.register(connection, selectors.EVENT_READ, self.gone)
        else:
            connection.close()
        return None

    def ended(self, fd: int) -> None:
        pid, connection = self.jobs.pop(fd)
        self.chosen.unregister(fd)
        os.close(fd)
        with suppress(KeyError):
            self.chosen.unregister(connection)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with suppress(OSError):
            connection.sendall(code.to_bytes(8, "big", signed=True))
        connection.close()

    def gone(self, connection: socket.socket) -> None:
        """Who asked for a copy has ended."""
        for pid, theirs in self.jobs.values():
            if theirs is connection:
                self.chosen.unregister(connection)
                self.kill(pid)

    def close(self, connection: socket.socket) -> None:
        """In a copy: nothing of this is its own."""
        for each in (self.listening, connection, *(theirs for _, theirs in self.jobs.values())):
            each.close()
        for fd in self.jobs:
            os.close(fd)
        self.chosen.close()

    @staticmethod
    def kill(pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def become(job: dict) -> None:
    """Everything that a Python of its own would have from its beginning."""
    os.setpgid(0, 0)
    for fd, file in enumerate(job["files"]):
        os.dup2(file, fd)
        os.close(file)
    os.umask(job["umask"])
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    raw = bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    for fd, name, mode in ((0, "stdin", "rb"), (1, "stdout", "wb"), (2, "stderr", "wb")):
        binary = open(fd, mode, buffering=0 if raw and fd else -1, closefd=False)  # noqa: SIM115
        errors = "backslashreplace" if fd == 2 else "strict"
        lines = fd == 2 or os.isatty(fd)
        text = io.TextIOWrapper(binary, "utf-8", errors, line_buffering=lines, write_through=raw and fd > 0)
        text.mode = mode[0]  # type: ignore[misc]
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)
    random.seed()
    np.random.seed()
    torch.default_generator.seed()  # another number in each process
    words = job["words"]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    first = "" if words[0] == "-c" else os.getcwd() if words[0] == "-m" else os.path.dirname(os.path.realpath(words[0]))
    sys.path[:] = [first, *paths, *PATH]
    sys.argv[:] = words[1:] if words[0] == "-m" else ["-c", *words[2:]] if words[0] == "-c" else words
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    main.__builtins__ = __builtins__  # type: ignore[attr-defined]
    if words[0] == "-m":
        runpy._run_module_as_main(words[1])  # type: ignore[attr-defined]
        return
    file = "<string>" if words[0] == "-c" else words[0]
    code = words[1] if words[0] == "-c" else Path(file).read_bytes()
    if words[0] != "-c":
        main.__file__ = os.path.abspath(file)
    exec(compile(code, file, "exec", dont_inherit=True), main.__dict__)


gc.collect()
gc.freeze()  # copies neither touch nor take apart what they did not make
become(Server(sys.argv[1]).serve())

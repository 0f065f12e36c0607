"""A rank whose launcher is gone ends too: it saves if it still can, and is gone within a bound in any case.

Who kills a launcher kills nobody else: its ranks would train on, unseen, and hold the GPUs. So each rank watches the
launchers among its ancestors, in a thread that sleeps until one of them has ended, and then sends itself SIGTERM, as the
launcher would have done. A rank that a `hvdtrain.training.stopping.StopRequest` protects finishes its step, saves with the
others and ends; any other dies of it. Both at once: one that is stuck is killed `SAVE_S` later.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Sequence

from hvdtrain.launch.ancestry import Ancestor, read_ancestors
from hvdtrain.launch.processes import started

_log = logging.getLogger(__name__)

SAVE_S = 30.0
"""How long a rank may take to end by itself."""
_POLL_S = 1.0  # where the kernel cannot wake the thread
_PROGRAMS = (
    "mpirun",
    "mpiexec",
    "prterun",
    "orterun",
    "prted",
    "orted",
    "mpiexec.hydra",
    "hydra_pmi_proxy",
    "mpirun.openmpi",
    "mpiexec.openmpi",
    "mpirun.mpich",
    "horovodrun",
    "torchrun",
    "hvdtrain",
)
_SCRIPTS = (
    *_PROGRAMS,
    "torch.distributed.run",
    "torch.distributed.launch",
    "horovod.runner.launch",
    "hvdtrain.launch.guard",
)

_held: list[tuple[threading.Thread, int]] = []  # the thread, and the end of a pipe that wakes it


def hold(launcher: str) -> bool:
    """Begin to watch, until `release`; once in a process.

    Args:
        launcher: `Topology.launcher`; a process that none has started may outlive whoever typed its name.

    Returns:
        Whether there is something to watch.
    """
    if _held or launcher in ("none", "environment", "pytorchjob"):
        return bool(_held)
    watched = {one.pid: began for one in launchers(launcher, read_ancestors()) if (began := started(one.pid))}
    if not watched:
        return False
    let_go, kept = os.pipe()
    thread = threading.Thread(target=_watch, args=(watched, let_go), name="hvdtrain-leash", daemon=True)
    _held.append((thread, kept))
    thread.start()
    return True


def release() -> None:
    """Watch no more: the process is no rank any longer."""
    while _held:
        thread, kept = _held.pop()
        os.write(kept, b"x")  # not by closing it: forked children hold it too
        os.close(kept)
        thread.join(2 * _POLL_S)


def launchers(launcher: str, ancestors: Sequence[Ancestor]) -> list[Ancestor]:
    """Those of a rank's ancestors without which it must not go on.

    Args:
        launcher: `Topology.launcher`.
        ancestors: Parent, grandparent, ...
    """
    if launcher == "spawn":
        return list(ancestors[:1])
    found = [one for one in ancestors if one.program in _PROGRAMS or one.script in _SCRIPTS]
    if not found and launcher == "horovodrun":  # on another host than horovodrun's, which holds them by ssh
        found = [one for one in ancestors if one.arguments and one.arguments[0].startswith("sshd")][:1]
    return found


def _watch(watched: dict[int, str], let_go: int) -> None:
    pid = _first_to_end(watched, let_go)
    os.close(let_go)
    if pid is None:
        return
    line = f"hvdtrain: rank process {os.getpid()} ends, because its launcher, process {pid}, is gone\n"
    _silence_what_nobody_reads()
    try:
        os.write(2, line.encode())
    except OSError:
        _log.debug("nobody reads the standard error")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SAVE_S)
    os.kill(os.getpid(), signal.SIGKILL)


def _first_to_end(watched: dict[int, str], let_go: int) -> int | None:
    """Return when one of the processes has ended: its pid; or None when let go."""
    ends, by_descriptor = select.poll(), {}
    ends.register(let_go, select.POLLIN)
    asleep = hasattr(os, "pidfd_open")
    for pid in watched if asleep else ():
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:  # it has just ended, or this kernel knows no such thing
            asleep = False
            break
        by_descriptor[descriptor] = pid
        ends.register(descriptor, select.POLLIN)
    try:
        while True:
            for pid, began in watched.items():
                if started(pid) != began:
                    return pid
            ready = [descriptor for descriptor, _ in ends.poll(None if asleep else _POLL_S * 1000)]
            if let_go in ready:
                return None
            if asleep and ready:
                return by_descriptor[ready[0]]
    finally:
        for descriptor in by_descriptor:
            os.close(descriptor)


def _silence_what_nobody_reads() -> None:
    """A launcher that is gone has taken the readers of its ranks' output along; to write there would be an error."""
    for number in (sys.__stdout__, sys.__stderr__):
        try:
            descriptor = number.fileno() if number is not None else -1
            broken = select.poll()
            broken.register(descriptor, 0)
            if any(event & select.POLLERR for _, event in broken.poll(0)):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
        except (OSError, ValueError):
            continue

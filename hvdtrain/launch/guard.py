"""A process around a launcher that turns a signal into a checkpoint: ``hvdtrain guard mpirun -np 4 python -m hvdtrain``.

mpirun ends its ranks half a second after a SIGTERM, torchrun dies of SIGUSR1 and leaves its ranks behind, and every launcher
has its own exit code for ranks that saved and ended. Around each of them this one does the same:

* SIGTERM, SIGINT, SIGHUP and SIGUSR1 become SIGUSR1 to the ranks on this host, which save together with all others and end;
  where no rank is on this host, the launcher gets it to hand it on (mpirun and srun do).
* Ranks that have not ended `WAIT_S` later are left to the launcher, which gets SIGTERM, and then killed. A second Ctrl-C does
  that at once, and so does a signal before there is anything to save.
* The exit code is 75 when the ranks saved and ended, whatever the launcher makes of it; else the launcher's.

If this process is killed, the ranks notice (`hvdtrain.launch.leash`). Standard library only; no torch is loaded.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from hvdtrain.errors import Preempted
from hvdtrain.launch.environment import given, settle
from hvdtrain.launch.processes import catches, descendants, lives, started

VARIABLE = "HVDTRAIN_GUARD"
"""Where ranks find their guard: its pid, a file descriptor in it, and that file's name."""
WAIT_VARIABLE = "HVDTRAIN_GUARD_WAIT_S"
WAIT_S = 120.0
STOPPED = Preempted.exit_code
_KILL_S = 10.0  # how long a launcher that was told to end may take
_POLL_S = 0.05
_FORWARD = (
    "mpirun",
    "mpiexec",
    "prterun",
    "orterun",
    "srun",
    "mpiexec.hydra",
)  # give SIGUSR1 to their ranks themselves


def run(command: Sequence[str], wait_s: float = WAIT_S) -> int:
    """Run a launcher under guard.

    Args:
        command: The launcher's.
        wait_s: How long ranks may take to save and end after a signal, in seconds.

    Returns:
        Its exit code as shells have it, or 75.

    Raises:
        OSError: The command cannot be started.
    """
    guard = _Guard(wait_s)
    guard.listen()
    # A session of its own: Ctrl-C on a terminal comes to this process alone.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL if _terminal(0) else None, start_new_session=True)
    return guard.wait(child.pid, lambda: _as_shells(child.poll()))


def fork_under() -> None:
    """Go on in a child of this process, which becomes its guard; nothing happens under a guard that is there already.

    For a launcher in Python: called before it starts anything.
    """
    if told() is not None:
        return
    guard = _Guard(float(given(WAIT_VARIABLE) or WAIT_S))
    unguarded = guard.listen()
    child = os.fork()
    if not child:
        for number, handler in unguarded.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.setsid()
        if _terminal(0):
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        return

    def poll() -> int | None:
        pid, status = os.waitpid(child, os.WNOHANG)
        return _as_shells(os.waitstatus_to_exitcode(status)) if pid else None

    os._exit(guard.wait(child, poll))


def tell_saved() -> None:
    """Tell the guard, if there is one on this host, that this rank's job has saved its state and ends."""
    path = told()
    if path is not None:
        try:
            with open(path, "ab", buffering=0) as file:
                file.write(b"saved\n")
        except OSError:
            return


def told() -> str | None:
    """The file in which the guard reads, as the environment says; None without a guard on this host."""
    pid, _, rest = (given(VARIABLE) or "").partition(":")
    descriptor, _, name = rest.partition(":")
    path = f"/proc/{pid}/fd/{descriptor}"
    try:  # on another host the same path may be anybody's
        return path if name and os.readlink(path).startswith(f"/memfd:{name} ") else None
    except OSError:
        return None


class _Guard:
    """The guard of one child process."""

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._asked: list[int] = []  # signals, in the order in which they came
        name = f"hvdtrain-guard-{secrets.token_hex(8)}"
        self._file = os.memfd_create(name) if hasattr(os, "memfd_create") else -1
        if self._file >= 0:
            settle({VARIABLE: f"{os.getpid()}:{self._file}:{name}"})

    def listen(self) -> dict[signal.Signals, Any]:
        """Hear signals from here on, before there is a child that one could leave behind; return who heard them."""
        heard = {}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
                heard[number] = signal.signal(number, self._note)
        return heard

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked.append(number)

    def wait(self, child: int, poll: Callable[[], int | None]) -> int:
        """Wait for the child, through whatever comes: its exit code, or 75."""
        self._child, self._poll = child, poll
        while (code := self._poll()) is None and not self._asked:
            time.sleep(_POLL_S)
        if code is None and self._ask_to_stop():
            end = time.monotonic() + self._wait_s
            while (code := self._poll()) is None and time.monotonic() < end and self._asked.count(signal.SIGINT) < 2:
                time.sleep(_POLL_S)
        if code is None:
            code = self._end()
        if self._file >= 0 and os.fstat(self._file).st_size:
            if code != STOPPED:
                _say(
                    f"the run has saved its state and ended, so the exit code is {STOPPED} and not the launcher's {code}"
                )
            return STOPPED
        return code

    def _ask_to_stop(self) -> bool:
        """Send SIGUSR1 where it is understood; return whether there was anybody."""
        listening = [pid for pid in (self._child, *descendants(self._child)) if catches(pid, signal.SIGUSR1)]
        forwarding = [pid for pid in listening if _program(pid) in _FORWARD]
        chosen = [pid for pid in listening if pid not in forwarding] or forwarding
        for pid in chosen:
            _send(pid, signal.SIGUSR1)
        return bool(chosen)

    def _end(self) -> int:
        """Let the launcher end its ranks, and end whatever is left of both."""
        everybody = {pid: started(pid) for pid in (self._child, *descendants(self._child))}
        _send(self._child, signal.SIGTERM)
        end = time.monotonic() + _KILL_S
        code = None
        while time.monotonic() < end:
            code = self._poll() if code is None else code
            if code is not None and not any(lives(*one) for one in everybody.items()):
                return code
            time.sleep(_POLL_S)
        _say(f"not everything ended within {_KILL_S:g} s of a SIGTERM to the launcher; the rest is killed")
        everybody |= {pid: started(pid) for pid in descendants(self._child)}
        for pid, began in everybody.items():
            if lives(pid, began):
                _send(pid, signal.SIGKILL)
        while code is None:
            code = self._poll()
            time.sleep(_POLL_S)
        return code


def _as_shells(code: int | None) -> int | None:
    return 128 - code if code is not None and code < 0 else code


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except OSError:  # it has ended, or belongs to somebody else
        return


def _program(pid: int) -> str:
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    except OSError:
        return ""


def _terminal(descriptor: int) -> bool:
    try:
        return os.isatty(descriptor)
    except OSError:
        return False


def _say(text: str) -> None:
    try:
        os.write(2, f"hvdtrain guard: {text}\n".encode())
    except OSError:
        return

"""Ctrl-C while there is something to save: the first one asks to stop, as SIGTERM does, a second one ends the process at once.

At once means: whatever its main thread does, also when that is stuck inside an engine and no Python code runs there. So a
thread of its own hears of signals, by the descriptor that Python writes each signal's number to.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

EXIT_CODE = 128 + signal.SIGINT
SAME_S = 1.0
"""SIGINTs so shortly after the first count as one with it: a terminal's Ctrl-C goes to all processes, and launchers pass on
theirs."""
_LEAVE = b"\0"  # the number of no signal


class Interrupt:
    """Notes the first SIGINT while its `with` block runs; ask it by calling it. A second one ends the process with code 130.

    Args:
        tell: Called once, from another thread, at the first one, with what the user should know.
    """

    def __init__(self, tell: Callable[[str], object] = lambda text: None) -> None:
        self._tell = tell
        self._asked = False
        self._before: object = None
        self._descriptor_before = -1
        self._pipe = (-1, -1)
        self._thread: threading.Thread | None = None

    def __call__(self) -> bool:
        """Whether a SIGINT has come."""
        return self._asked

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is not threading.main_thread():  # Python allows it nowhere else
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._thread = threading.Thread(target=self._listen, name="interrupt", daemon=True)
        self._thread.start()
        self._descriptor_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        signal.signal(signal.SIGINT, self._before)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._descriptor_before)
        os.write(self._pipe[1], _LEAVE)  # not by closing: a forked process may have it open too
        self._thread.join()
        self._thread = None
        for descriptor in self._pipe:
            os.close(descriptor)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def _listen(self) -> None:
        first: float | None = None
        while (number := os.read(self._pipe[0], 1)) != _LEAVE:
            if number[0] != signal.SIGINT:
                continue
            now = time.monotonic()
            if first is None:
                first = now
                self._asked = True
                self._tell("interrupted: a checkpoint is being saved; once more ends at once")
            elif now - first >= SAME_S:
                os._exit(EXIT_CODE)

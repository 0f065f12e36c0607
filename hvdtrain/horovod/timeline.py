"""A trace of what rank 0's operations waited for and did, for chrome://tracing or https://ui.perfetto.dev.

Each name has a lane. An event "NEGOTIATE_..." lasts from the call until all ranks have asked for the same; the event after it
until the result is there. What is performed together ends together.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

from hvdtrain.errors import OutputError
from hvdtrain.horovod.requests import Request

_log = logging.getLogger(__name__)
_FLUSH_S = 1.0  # a job that is killed loses no more of its trace


class Timeline:
    """A trace that is being written.

    Args:
        path: The file; replaced if it is there.
        mark_cycles: Mark each batch of operations that were performed together.

    Raises:
        OutputError: It cannot be written.
    """

    def __init__(self, path: str, *, mark_cycles: bool = False) -> None:
        self._path, self._mark_cycles = path, mark_cycles
        self._began = time.monotonic()
        self._lanes: dict[str, int] = {}
        self._flushed = 0.0
        self._writing = threading.Lock()
        try:
            self._file: IO[str] = open(path, "w", encoding="utf-8")  # noqa: SIM115 - until close()
        except OSError as error:
            raise OutputError(f"the timeline {path} cannot be written: {error.strerror or error}") from error
        self._file.write('[\n{"name": "process_name", "ph": "M", "pid": 0, "args": {"name": "rank 0"}}')

    def note(self, requests: Sequence[Request], agreed_s: float) -> None:
        """What was agreed on then, and is over now."""
        now = time.monotonic()
        events: list[dict[str, Any]] = []
        if self._mark_cycles and requests:
            events.append({"name": "CYCLE_START", "ph": "i", "s": "g", "ts": self._us(agreed_s), "pid": 0, "tid": 0})
        for request in requests:
            form = request.form
            lane = form.name or form.kind
            if lane not in self._lanes:
                self._lanes[lane] = len(self._lanes) + 1
                named = {"name": "thread_name", "ph": "M", "pid": 0, "tid": self._lanes[lane], "args": {"name": lane}}
                events.append(named)
            begun = max(request.began, self._began)
            told = {"tensors": [f"{dtype}{list(shape)}" for dtype, shape in form.tensors]}
            for name, start, end in (
                (f"NEGOTIATE_{form.kind.upper()}", begun, max(begun, agreed_s)),
                (form.kind.upper(), max(begun, agreed_s), now),
            ):
                span = {"name": name, "ph": "X", "ts": self._us(start), "dur": round((end - start) * 1e6, 3)}
                events.append({**span, "pid": 0, "tid": self._lanes[lane], "args": told})
        with self._writing:
            if self._file.closed:
                return
            self._file.write("".join(f",\n{json.dumps(event)}" for event in events))
            if now - self._flushed > _FLUSH_S:
                self._file.flush()
                self._flushed = now

    def close(self) -> None:
        """Complete the file.

        Raises:
            OutputError: It could not be written.
        """
        try:
            with self._writing, self._file:
                self._file.write("\n]\n")
        except OSError as error:
            raise OutputError(f"the timeline {self._path} is incomplete: {error.strerror or error}") from error

    def _us(self, moment_s: float) -> float:
        return round((moment_s - self._began) * 1e6, 3)


class _Recording:
    timeline: Timeline | None = None


def begin(path: str, *, mark_cycles: bool) -> None:
    """Record from here on.

    Raises:
        ValueError: A trace is being recorded.
        OutputError: The file cannot be written.
    """
    if _Recording.timeline is not None:
        raise ValueError("a timeline is being recorded; call hvd.stop_timeline() first")
    _Recording.timeline = Timeline(path, mark_cycles=mark_cycles)


def end() -> None:
    """Complete the trace that is being recorded, if one is."""
    ending, _Recording.timeline = _Recording.timeline, None
    if ending is not None:
        ending.close()


def recording() -> bool:
    """Whether a trace is being recorded."""
    return _Recording.timeline is not None


@contextmanager
def performing(requests: Sequence[Request | None]) -> Iterator[None]:
    """Around the operations that all ranks have agreed on."""
    recording = _Recording.timeline
    if recording is None:
        yield
        return
    agreed_s = time.monotonic()
    yield
    try:
        recording.note([request for request in requests if request is not None], agreed_s)
    except OSError as error:  # a full disk does not end the training
        _Recording.timeline = None
        _log.warning("the timeline ends here: %s", error)
        with suppress(OutputError):
            recording.close()

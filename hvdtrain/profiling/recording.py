"""What one rank records of the steps that are profiled: torch.profiler's events, and its phases."""

from __future__ import annotations

import inspect
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from hvdtrain.backends.laps import PHASES, Laps
from hvdtrain.errors import OutputError
from hvdtrain.profiling.trace import Span, overlap, spans_of, union
from hvdtrain.profiling.verdict import RankTimes

_MARK = "hvdtrain clock"
_LANE, _LANE_NAME = 1, "phases of the step"  # no thread has the number of init
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
# Older versions of torch, such as 2.4, keep all events unasked.
_KEPT: dict[str, Any] = {"acc_events": True} if "acc_events" in inspect.signature(profile.__init__).parameters else {}


class Recording:
    """Records from `start` to `stop`.

    Args:
        rank: Of this process.
        device: Of the model.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank, self._on_gpu = rank, device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        self._profile = profile(activities=activities, **_KEPT)
        self._laps = Laps(device)
        self._phases: list[tuple[str, Span]] = []  # in microseconds since 1970, as this process sees them
        self._steps = 0
        self._epoch_ns = 0
        self._last = 0.0

    def start(self) -> None:
        """Begin; right after a step."""
        self._profile.start()
        self._marked_ns = self._mark()
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()
        self._last = self._now()
        self._laps.skip()
        self._laps.begin(timed=True)

    def lap(self, phase: str) -> None:
        """A phase of the step ends; "" is what belongs to no step."""
        if phase:
            self._laps.lap(phase)
        else:
            self._laps.skip()
        now = self._now()
        if phase:
            self._phases.append((phase, (self._last, now)))
        self._last = now

    def stepped(self) -> None:
        """A step ends."""
        self.lap("other")
        self._steps += 1

    def go_on(self) -> None:
        """The next step begins."""
        self._laps.begin(timed=True)

    def stop(self) -> None:
        """End, after at least one step.

        Raises:
            OutputError: The events cannot be read, because torch hands them out by a temporary file and its disk is full.
                The phases are known.
        """
        self._seconds = dict(zip(PHASES, self._laps.take(self._steps), strict=True))  # the next step may have begun
        self._profile.stop()
        events: list[dict[str, Any]] = []
        try:
            with tempfile.TemporaryDirectory(prefix="hvdtrain-profile-") as folder:
                file = Path(folder) / "trace.json"
                self._profile.export_chrome_trace(str(file))
                events = json.loads(file.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
        except (OSError, ValueError, RuntimeError) as error:
            raise OutputError(
                f"the events of the profiled steps cannot be read, for which torch writes a temporary file ({error}); free "
                "space there, or set TMPDIR to another folder"
            ) from error
        finally:
            self._take(events)

    def abandon(self) -> None:
        """End without looking at what was recorded."""
        self._profile.stop()

    @property
    def steps(self) -> int:
        """How many steps were recorded."""
        return self._steps

    @property
    def operators(self) -> str:
        """A table of the operations that took the most time by themselves."""
        averages: Any = self._profile.key_averages()
        key = "self_device_time_total" if self._on_gpu else "self_cpu_time_total"
        return str(averages.table(sort_by=key, row_limit=30, max_name_column_width=60))

    def times(self, alone: float) -> RankTimes:
        """Where a step's time goes.

        Args:
            alone: What the exchange takes by itself, in seconds; NaN if nothing is exchanged.
        """
        steps = max(1, self._steps)
        input_s, exchange_s = self._seconds["data"], self._seconds["exchange"]
        rest = sum(self._seconds.values()) - input_s - exchange_s
        if self._on_gpu:
            own = [event for event in self.events if not str(event.get("name")).startswith("nccl")]  # that is exchange
            busy = sum(end - begin for begin, end in spans_of(own, _ON_GPU)) / 1e6 / steps
            compute = min(rest, max(0.0, busy))
        else:
            outside = union(span for phase, span in self._phases if phase not in ("data", "exchange"))
            sends = self._main_thread([event for event in self.events if _sends(event)])
            works = self._main_thread([e for e in self.events if e.get("cat") == "cpu_op" or _sends(e)])
            sent = overlap(outside, sends) / 1e6 / steps  # FSDP gathers and sums inside forward and backward
            compute = min(rest, overlap(outside, works) / 1e6 / steps - sent)
            rest, exchange_s = rest - sent, exchange_s + sent
        return RankTimes(
            rank=self._rank, input=input_s, exchange=exchange_s, compute=compute, python=rest - compute, alone=alone
        )

    # -- inside -------------------------------------------------------------------------------------------------------

    def _main_thread(self, events: Sequence[dict[str, Any]]) -> list[Span]:
        """When these took place on the thread that trains, by this process's clock."""
        spans = spans_of(events, ("cpu_op", "user_annotation"), self._thread)
        return [(begin + self.shift_us, end + self.shift_us) for begin, end in spans]

    def _now(self) -> float:
        return (self._epoch_ns + time.perf_counter_ns()) / 1e3

    def _mark(self) -> int:
        """Let the trace hold a moment of which this process's clock is known."""
        with record_function(_MARK):
            return time.time_ns()

    def _take(self, events: list[dict[str, Any]]) -> None:
        """Keep the events, and add the phases to them; know how far their clock is from this process's."""
        mark = next((event for event in events if event.get("name") == _MARK and event.get("ph") == "X"), None)
        self._thread = None if mark is None else mark["tid"]
        middle = 0.0 if mark is None else mark["ts"] + mark.get("dur", 0.0) / 2
        self.shift_us = 0.0 if mark is None else self._marked_ns / 1e3 - middle
        self.error_us = 0.0 if mark is None else mark.get("dur", 0.0) / 2
        process = os.getpid()
        lane = [
            {"ph": "M", "name": "thread_name", "pid": process, "tid": _LANE, "args": {"name": _LANE_NAME}},
            {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": _LANE, "args": {"sort_index": -1}},
        ]
        spans = [
            {"ph": "X", "cat": "phase", "name": phase, "pid": process, "tid": _LANE, "ts": begin - self.shift_us, "dur": end - begin}
            for phase, (begin, end) in self._phases
        ]  # fmt: skip
        kept = [event for event in events if event.get("ph") in ("X", "s", "f", "C") and event.get("cat") != "Trace"]
        there = {event.get("pid") for event in kept}  # torch names processes in which nothing happens
        names = [event for event in events if event.get("ph") == "M" and event.get("pid") in there]
        self.events = [*names, *lane, *kept, *spans]


def _sends(event: Mapping[str, Any]) -> bool:
    return str(event.get("name")).startswith(("c10d::", "FSDP::", "gloo:", "mpi:", "nccl:"))

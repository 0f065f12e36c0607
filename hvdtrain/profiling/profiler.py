"""The callback of ``--profile``: records some steps on every rank, and writes what came of it on rank 0."""

from __future__ import annotations

import cProfile
import gzip
import io
import json
import logging
import math
import pstats
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hvdtrain.backends.base import Backend
from hvdtrain.errors import OutputError
from hvdtrain.observe.whole_file import write_whole
from hvdtrain.profiling.recording import Recording
from hvdtrain.profiling.trace import RankTrace, merged
from hvdtrain.profiling.verdict import RankTimes, Verdict, judge
from hvdtrain.settings.profiling import ProfiledSteps

if TYPE_CHECKING:
    from hvdtrain.training.events import StepEvent
    from hvdtrain.training.trainer import Trainer

_log = logging.getLogger(__name__)
_MOST_RANKS = 32  # in one trace: a browser has to open it
_REPEATS = 3


class Profiler:
    """Profiles some steps of a run; every rank must have one.

    After these steps Python's own profiler looks at rank 0 for as many steps again, apart, because it makes Python slower.

    Args:
        backend: Running.
        steps: Which.
        folder: Rank 0 writes there.
        tell: Takes sentences for people, on rank 0.
    """

    def __init__(self, backend: Backend, steps: ProfiledSteps, folder: Path, tell: Callable[[str], object]) -> None:
        self._backend, self._steps, self._folder, self._tell = backend, steps, folder, tell
        self._recording: Recording | None = None
        self._python: cProfile.Profile | None = None
        self._python_until = self._python_steps = 0
        self._engine_traced = False
        self._done = False

    # -- events -------------------------------------------------------------------------------------------------------

    def on_start(self, trainer: Trainer) -> None:
        """Begin at once, if the first step is the next one."""
        at = trainer.position.steps
        if at >= self._steps.last:
            self._done = True
            if self._backend.rank == 0:
                _log.warning("--profile %d:%d: this run goes on after step %d", self._steps.first, self._steps.last, at)
        elif at >= self._steps.first - 1:
            self._begin(trainer)

    def on_step(self, trainer: Trainer, event: StepEvent) -> None:
        """Begin, go on or end."""
        if self._recording is not None:
            self._recording.stepped()
            if event.step >= self._steps.last:
                self._conclude(trainer)
            else:
                self._recording.go_on()
        elif event.step == self._steps.first - 1 and not self._done:
            self._begin(trainer)
        elif self._python is not None:
            self._python_steps += 1
            if event.step >= self._python_until:
                self._end_python()

    def finish(self, trainer: Trainer) -> None:
        """The run is over, perhaps before these steps; every rank must call it."""
        if self._recording is not None and self._recording.steps:
            self._conclude(trainer)
        elif not self._done and self._backend.rank == 0:
            self._tell(
                f"nothing was profiled: --profile {self._steps.first}:{self._steps.last}, and the run ended after step "
                f"{trainer.position.steps}"
            )
        self._end_python()

    def close(self) -> None:
        """Stop what is still recorded, and throw it away: a process that ends with torch's profiler at work may crash."""
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.abandon()
            if self._backend.rank == 0:
                _log.warning("the run ended in the middle of what --profile was to record; nothing of it is written")
        if self._python is not None:
            self._python.disable()
            self._python = None

    # -- inside -------------------------------------------------------------------------------------------------------

    def _begin(self, trainer: Trainer) -> None:
        backend = self._backend
        if backend.rank == 0:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                _log.warning("%s cannot be made: %s", self._folder, error.strerror)
        self._engine_traced = backend.begin_engine_trace(self._folder / "horovod_timeline.json")
        if backend.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self._recording = Recording(backend.rank, backend.device)
        self._sent = backend.traffic.sent_bytes
        trainer.laps.listeners.append(self._recording.lap)
        self._recording.start()

    def _conclude(self, trainer: Trainer) -> None:
        recording, backend = self._recording, self._backend
        assert recording is not None
        trainer.laps.listeners.remove(recording.lap)
        self._recording, self._done = None, True
        try:
            recording.stop()
            unread = ""
        except OutputError as error:
            unread = str(error)
        sent = (backend.traffic.sent_bytes - self._sent) / recording.steps
        if self._engine_traced:
            backend.end_engine_trace()
        times = recording.times(self._alone(sent, trainer.replica.bucket_bytes))
        clock = backend.clock_offset()
        own = {
            "host": socket.gethostname(),
            "shift_us": recording.shift_us + clock.offset_ns / 1e3,
            "error_us": recording.error_us + clock.error_ns / 1e3,
            "events": recording.events if backend.rank < _MOST_RANKS else [],
        }
        packed = gzip.compress(json.dumps(own).encode(), compresslevel=3)
        everyone = backend.gather_object((packed, times, unread))
        if backend.device.type == "cuda":
            self._write_memory()
        if everyone is not None:
            try:
                self._write(everyone, recording)
            except OutputError as error:
                _log.warning("%s", error)
            self._python_steps = 0
            self._begin_python(trainer.position.steps + recording.steps)

    def _alone(self, sent_bytes: float, bucket_bytes: int) -> float:
        """Seconds that the exchange of a step takes when nothing else is done; NaN if nothing is sent. A collective."""
        ranks = self._backend.world_size
        most = float(self._backend.all_reduce(torch.tensor(sent_bytes), "max"))
        if ranks == 1 or not most:
            return math.nan
        count = int(most * ranks / (2 * (ranks - 1)) / 4)
        pieces = torch.ones(count, device=self._backend.device).split(max(1, bucket_bytes // 4))
        best = math.inf
        for _ in range(_REPEATS):
            self._backend.barrier()
            began = time.perf_counter()
            for piece in pieces:
                self._backend.all_reduce_(piece)
            if self._backend.device.type == "cuda":
                torch.cuda.synchronize(self._backend.device)
            best = min(best, time.perf_counter() - began)
        return best

    def _write(self, everyone: list[tuple[bytes, RankTimes, str]], recording: Recording) -> None:
        for rank, (_, _, unread) in enumerate(everyone):
            if unread:  # without its events nobody knows compute from Python, nor one clock from another
                _log.warning("nothing is written of the steps that --profile recorded: rank %d: %s", rank, unread)
                return
        traces = [
            RankTrace(rank=rank, **json.loads(gzip.decompress(packed)))
            for rank, (packed, _, _) in enumerate(everyone[:_MOST_RANKS])
        ]
        remedy = "choose another --run-dir"
        verdict: Verdict = judge([times for _, times, _ in everyone])
        self._tell(verdict.sentence)
        write_whole(self._folder / "trace.json", json.dumps(merged(traces)), remedy=remedy)
        write_whole(self._folder / "operators.txt", recording.operators + "\n", remedy=remedy)
        clocks = max(trace.error_us for trace in traces)
        told: dict[str, Any] = {
            "steps": recording.steps,
            "clock_error_us": round(clocks, 3),
            **verdict.as_json(),
        }
        write_whole(self._folder / "verdict.json", json.dumps(told, indent=1) + "\n", remedy=remedy)
        clock = "" if len(traces) == 1 else f", the ranks' clocks aligned to {clocks / 1e3:.2g} ms"
        self._tell(f"profiled {recording.steps} steps{clock}: {self._folder}")

    def _write_memory(self) -> None:
        file = self._folder / f"memory-rank{self._backend.rank}.pickle"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(file))
        except (OSError, RuntimeError) as error:
            _log.warning("%s cannot be written: %s", file, error)
        torch.cuda.memory._record_memory_history(enabled=None)

    def _begin_python(self, until: int) -> None:
        python = cProfile.Profile()
        try:
            python.enable()
        except ValueError as error:  # another profiler is at work in this process
            _log.warning("Python is not profiled: %s", error)
            return
        self._python, self._python_until = python, until

    def _end_python(self) -> None:
        if self._python is None:
            return
        python, self._python = self._python, None
        python.disable()
        if not self._python_steps:
            self._tell("no python.txt is written: no step was left after those that were profiled")
            return
        text = io.StringIO()
        statistics = pstats.Stats(python, stream=text)
        statistics.sort_stats("tottime").print_stats(40)
        statistics.sort_stats("cumulative").print_stats(40)
        try:
            write_whole(self._folder / "python.txt", text.getvalue(), remedy="choose another --run-dir")
            statistics.dump_stats(self._folder / "python.pstats")
        except (OSError, OutputError) as error:
            _log.warning("%s", error)

"""``metrics.jsonl``: one JSON object a logged step or evaluation, and one for each start of the run."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hvdtrain.errors import OutputError
from hvdtrain.observe.logger import EvalRecord, StepRecord
from hvdtrain.observe.whole_file import write_whole

_log = logging.getLogger(__name__)


class JsonlLogger:
    """Appends records to a file, each line whole at once; NaN and infinities become null.

    The file is left as it is until there is a record. One that is deleted meanwhile, with its folder or without, is made anew
    with all that was in it. A record that cannot be written (a full disk) is kept and written with the next one that can.

    Args:
        path: The file; its folder is made.
        resumed_step: Records of later steps, left by a run that got further than its last checkpoint, are removed, so
            that no step is there twice. 0 begins a new file.
        environment: Where it runs; written before the first record, as one of kind "start".
    """

    def __init__(self, path: Path, resumed_step: int = 0, environment: Mapping[str, Any] | None = None) -> None:
        self._path = path
        self._environment = environment
        self._resumed_step = resumed_step
        self._descriptor: int | None = None
        self._waiting: list[str] = []

    def log_step(self, record: StepRecord) -> None:
        """Append a step."""
        self._append({"kind": "step", "time": round(time.time(), 3), **asdict(record)})

    def log_eval(self, record: EvalRecord) -> None:
        """Append an evaluation."""
        metrics = {f"eval_{name}": value for name, value in record.metrics.items()}
        self._append({"kind": "eval", "step": record.step, "epoch": record.epoch, **metrics})

    def close(self) -> None:
        """Close the file.

        Raises:
            OutputError: Some records could not be written.
        """
        try:
            if self._descriptor is not None or self._waiting:
                self._write()
        except OSError as error:
            raise OutputError(
                f"{len(self._waiting)} records could not be written to {self._path}: {error.strerror}; free space there, or "
                "choose another --run-dir"
            ) from error
        finally:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def _append(self, record: dict[str, Any]) -> None:
        had_waiting = bool(self._waiting)
        if self._environment is not None:
            start = {"kind": "start", "time": round(time.time(), 3), "step": self._resumed_step}
            self._waiting.append(json.dumps({**start, "environment": self._environment}) + "\n")
            self._environment = None
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._waiting.append(json.dumps(clean) + "\n")
        try:
            self._write()
        except (OSError, OutputError) as error:
            if not had_waiting:
                _log.warning("%s cannot be written now, so its records wait: %s", self._path, error)

    def _write(self) -> None:
        """Write what waits: all of it, or nothing."""
        if self._descriptor is None:
            self._descriptor = self._open()
        if not self._is_there():
            self._restore()
        text = "".join(self._waiting).encode()
        end = os.fstat(self._descriptor).st_size
        try:
            written = 0
            while written < len(text):
                written += os.write(self._descriptor, text[written:])
        except OSError:
            os.ftruncate(self._descriptor, end)
            raise
        self._waiting.clear()

    def _open(self) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            if not self._path.is_file():  # a FIFO would be waited for, and /dev/zero has no end
                raise OSError(errno.EINVAL, "there is something there that is no plain file")
            text = self._path.read_text(encoding="utf-8", errors="replace") if self._resumed_step else ""
            lines = text.splitlines()
            kept = [line for line in lines if _step(line) <= self._resumed_step]
            write_whole(self._path, "".join(f"{line}\n" for line in kept))
        return _opened(self._path)

    def _is_there(self) -> bool:
        """Whether the file that is open is still the one at its path; False if there is none."""
        assert self._descriptor is not None
        own = os.fstat(self._descriptor)
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return False
        if (there.st_dev, there.st_ino) != (own.st_dev, own.st_ino):
            raise OSError(errno.EEXIST, "somebody has put another file there")
        return True

    def _restore(self) -> None:
        """Make the file anew out of the deleted one, which is there as long as it is open."""
        assert self._descriptor is not None
        content = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        write_whole(self._path, content.decode())
        os.close(self._descriptor)
        self._descriptor = None
        self._descriptor = _opened(self._path)
        _log.warning("%s was deleted while this run wrote it; it is there again, with all of its records", self._path)


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line cut off by a kill, or damaged
        return math.inf

"""``metrics.jsonl``: one JSON object a logged step or evaluation."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from hvdtrain.observe.logger import EvalRecord, StepRecord
from hvdtrain.observe.whole_file import write_whole


class JsonlLogger:
    """Appends records to a file, each line whole at once; NaN and infinities become null.

    The file is left as it is until there is a record.

    Args:
        path: The file; its folder is made.
        resumed_step: Records of later steps, left by a run that got further than its last checkpoint, are removed, so
            that no step is there twice. 0 begins a new file.
    """

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        self._path = path
        self._resumed_step = resumed_step
        self._file: TextIO | None = None

    def log_step(self, record: StepRecord) -> None:
        """Append a step."""
        self._append({"kind": "step", **asdict(record)})

    def log_eval(self, record: EvalRecord) -> None:
        """Append an evaluation."""
        metrics = {f"eval_{name}": value for name, value in record.metrics.items()}
        self._append({"kind": "eval", "step": record.step, "epoch": record.epoch, **metrics})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _append(self, record: dict[str, Any]) -> None:
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        if self._file is None:
            self._file = self._open()
        self._file.write(json.dumps(clean) + "\n")

    def _open(self) -> TextIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            lines = self._path.read_text().splitlines() if self._resumed_step else []
            kept = [line for line in lines if _step(line) <= self._resumed_step]
            write_whole(self._path, "".join(f"{line}\n" for line in kept))
        return self._path.open("a", buffering=1)


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line cut off by a kill
        return math.inf

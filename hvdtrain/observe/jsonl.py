"""``metrics.jsonl``: one JSON object a logged step or evaluation."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hvdtrain.observe.logger import EvalRecord, StepRecord


class JsonlLogger:
    """Appends records to a file, each line whole at once; NaN and infinities become null.

    Args:
        path: The file; its folder is made.
        resumed_step: Records of later steps, left by a run that got further than its last checkpoint, are removed, so
            that no step is there twice. 0 begins a new file.
    """

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if resumed_step and _step(line) <= resumed_step]
            temporary = path.with_name(f"{path.name}.{os.getpid()}")
            temporary.write_text("".join(f"{line}\n" for line in kept))
            temporary.replace(path)
        self._file = path.open("a", buffering=1)

    def log_step(self, record: StepRecord) -> None:
        """Append a step."""
        self._append({"kind": "step", **asdict(record)})

    def log_eval(self, record: EvalRecord) -> None:
        """Append an evaluation."""
        metrics = {f"eval_{name}": value for name, value in record.metrics.items()}
        self._append({"kind": "eval", "step": record.step, "epoch": record.epoch, **metrics})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, record: dict[str, Any]) -> None:
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(clean) + "\n")


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line cut off by a kill
        return math.inf

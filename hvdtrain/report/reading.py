"""What the folder of a run holds, however the run ended: read line by line, and nothing of it is believed."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvdtrain.errors import ConfigError
from hvdtrain.version import __version__

MOST_POINTS = 2000
"""So many records of a kind are kept of a run, evenly spaced: pictures show no more, and files may be huge."""
_LONGEST_LINE = 2**22
_LARGEST_FILE = 2**22  # of summary.json and config.yaml
_MOST_RANKS = 4096


@dataclass(kw_only=True, slots=True)
class Run:
    """What is known of a run.

    Attributes:
        name: How the report calls it, different for each run.
        folder: Where it was read.
        steps: Records of logged steps: numbers by name, NaN for what was not finite; "phases", seconds by phase and rank; and
            "start", which start of the run wrote it, counted from 1 (0 if it was not told).
        evaluations: Records of evaluations, likewise.
        environments: Of each start of the run, the first first.
        summary: Of its end; empty if there is none.
        settings: Lines of ``config.yaml``, by name.
        remarks: Sentences on what is missing or damaged.
    """

    name: str
    folder: Path
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    environments: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def read_run(folder: Path, name: str) -> Run:
    """Read a run's folder; the run may be going on.

    Raises:
        ConfigError: There is no such folder, or it is no run's; says what to give.
    """
    metrics = folder / "metrics.jsonl"
    try:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder; give the folder of a run, which holds metrics.jsonl")
        if not metrics.is_file():
            raise ConfigError(
                f"{folder} holds no metrics.jsonl: it is no run's folder, or that of a run without a logged step yet (--log-every)"
            )
        run = Run(name=name, folder=folder)
        _read_records(metrics, run)
    except OSError as error:
        raise ConfigError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    run.summary = _read_summary(folder / "summary.json", run.remarks)
    run.settings = _read_settings(folder / "config.yaml", run.remarks)
    run.remarks += _remarks(run)
    return run


def names_of(folders: list[Path]) -> list[str]:
    """Short names of folders, each a different one."""
    names = [folder.resolve().name or str(folder) for folder in folders]
    return [
        name if names.count(name) == 1 else f"{name} ({folder})" for name, folder in zip(names, folders, strict=True)
    ]


class _Thinned:
    """Keeps evenly spaced records of a stream of unknown length, and the last one."""

    def __init__(self) -> None:
        self._kept: list[dict[str, Any]] = []
        self._every, self._seen = 1, 0
        self._last: dict[str, Any] | None = None

    def add(self, record: dict[str, Any]) -> None:
        if self._seen % self._every == 0:
            self._kept.append(record)
            if len(self._kept) > MOST_POINTS:
                self._kept = self._kept[::2]
                self._every *= 2
        self._last = record
        self._seen += 1

    def all(self) -> list[dict[str, Any]]:
        last = [] if self._last is None or (self._kept and self._kept[-1] is self._last) else [self._last]
        return self._kept + last


def _read_records(file: Path, run: Run) -> None:
    steps, evaluations = _Thinned(), _Thinned()
    damaged = first_damaged = 0
    number = nonfinite = 0
    first_nonfinite = math.nan
    for number, line in _lines(file):
        record = _record(line)
        if record is None:
            damaged += 1
            first_damaged = first_damaged or number
        elif record["kind"] == "start":
            run.environments.append(record)
        elif record["kind"] == "eval":
            evaluations.add(record)
        else:
            if "loss" in record and not math.isfinite(record["loss"]):
                first_nonfinite = first_nonfinite if nonfinite else record["step"]
                nonfinite += 1
            record["start"] = len(run.environments)
            steps.add(record)
    run.steps, run.evaluations = steps.all(), evaluations.all()
    if damaged:
        run.remarks.append(
            f"{damaged} of {number} lines of metrics.jsonl could not be read and are left out; the first is line {first_damaged}"
        )
    if nonfinite:
        run.remarks.append(
            f"the loss was not finite at {nonfinite} logged steps, first at step {first_nonfinite:.0f}: gaps in the curve"
        )


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines by number; of one that is too long only the beginning, which is then damaged."""
    with file.open(encoding="utf-8", errors="replace") as opened:
        number = 0
        while line := opened.readline(_LONGEST_LINE):
            number += 1
            yield number, line
            while len(line) == _LONGEST_LINE and not line.endswith("\n"):
                line = opened.readline(_LONGEST_LINE)


def _record(line: str) -> dict[str, Any] | None:
    """A line's numbers; None if it is damaged. What other versions have besides is left out."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("kind") not in ("step", "eval", "start"):
        return None
    step = _number(found.get("step"))
    if step is None or not abs(step) < 1e15:
        return None
    if found["kind"] == "start":
        return {"kind": "start", "step": step, **_plain(found.get("environment"))}
    record: dict[str, Any] = {"kind": found["kind"]}
    for name, value in found.items():
        number = math.nan if value is None and name.endswith("loss") else _number(value)
        if number is not None and name not in ("kind", "phases", "start"):
            record[name] = number
    phases = found.get("phase_seconds")
    if isinstance(phases, dict):
        rows = {str(phase): _row(ranks) for phase, ranks in phases.items() if isinstance(ranks, list)}
        lengths = {len(row) for row in rows.values()}
        if len(lengths) == 1 and 0 < lengths.pop() <= _MOST_RANKS:
            record["phases"] = rows
    return record


def _row(ranks: list[Any]) -> array[float]:
    """Four bytes a number: there may be thousands of ranks."""
    numbers = [_number(value) for value in ranks]
    return array("f", [0.0 if number is None or not 0 <= number < 1e9 else number for number in numbers])


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _plain(value: Any) -> dict[str, Any]:
    return {str(name): _shallow(each) for name, each in value.items()} if isinstance(value, dict) else {}


def _shallow(value: Any, levels: int = 4) -> Any:
    """Without what nobody can print or count: nesting without end, long lists, numbers that are none or beyond any float."""
    if isinstance(value, dict | list) and not levels:
        return "..."
    if isinstance(value, dict):
        return {name: _shallow(each, levels - 1) for name, each in value.items()}
    if isinstance(value, list):
        return [_shallow(each, levels - 1) for each in value[:64]]
    number = _number(value)
    is_number = isinstance(value, int | float)
    return str(value) if is_number and (number is None or not math.isfinite(number)) else value


def _read_summary(file: Path, remarks: list[str]) -> dict[str, Any]:
    try:
        text = _text(file)
        return _plain(json.loads(text)) if text else {}
    except (OSError, ValueError, RecursionError):
        remarks.append("summary.json is damaged and left out")
        return {}


def _read_settings(file: Path, remarks: list[str]) -> dict[str, str]:
    """Lines ``name: value`` of a file that hvdtrain wrote; those of a section by ``section.name``."""
    try:
        text = _text(file)
    except OSError:
        remarks.append("config.yaml cannot be read and is left out")
        return {}
    found: dict[str, str] = {}
    section = ""
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, value = line.partition(":")
        if not colon:
            continue
        inside = line[0].isspace()
        section = section if inside else name.strip()
        key = f"{section}.{name.strip()}" if inside else section
        if value.strip():
            found[key] = value.strip()
    return found


def _text(file: Path) -> str:
    if not file.is_file():
        return ""
    with file.open(encoding="utf-8", errors="replace") as opened:
        return opened.read(_LARGEST_FILE)


def _remarks(run: Run) -> Iterator[str]:
    if not run.steps and not run.evaluations:
        yield "there is no logged step and no evaluation yet"
    if not run.summary:
        last = run.steps[-1] if run.steps else None
        total = f" of {last['total_steps']:.0f}" if last is not None and "total_steps" in last else ""
        where = f"; the last logged step is {last['step']:.0f}{total}" if last is not None else ""
        yield f"there is no summary.json: the run has not finished, or was ended{where}"
    if run.steps and not any("phases" in record for record in run.steps):
        yield "there are no phase times: the run was written by an earlier version of hvdtrain, or by a loop of its own"
    if run.steps and not run.evaluations:
        yield "there is no evaluation"
    wrote = run.summary.get("hvdtrain_version") or (run.environments[-1].get("hvdtrain") if run.environments else None)
    if wrote is not None and str(wrote) != __version__:
        yield f"it was written by hvdtrain {wrote}, and this is {__version__}; what this version does not know is left out"
    if len(run.environments) > 1:
        starts = ", ".join(f"{each['step']:.0f}" for each in run.environments[1:])
        yield f"it was started {len(run.environments)} times, again after step {starts}"

"""Events of a Chrome trace: those of several ranks on one clock, and how much of a span they fill. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Span = tuple[float, float]
"""Begin and end, in microseconds."""
_PROCESSES = 1000  # a rank's processes have numbers from so many times the rank


@dataclass(frozen=True, kw_only=True, slots=True)
class RankTrace:
    """One rank's events.

    Attributes:
        rank: Which.
        host: Where.
        events: As torch.profiler writes them, in microseconds of a clock of their own.
        shift_us: To be added for the clock that all ranks share.
        error_us: How far off that may be.
    """

    rank: int
    host: str
    events: Sequence[Mapping[str, Any]]
    shift_us: float
    error_us: float


def merged(traces: Sequence[RankTrace]) -> dict[str, Any]:
    """One trace with a process for each rank (and for each of its GPUs), which begins at 0."""
    first = min(
        (event["ts"] + trace.shift_us for trace in traces for event in trace.events if _is_timed(event)), default=0.0
    )
    events: list[dict[str, Any]] = []
    for trace in traces:
        numbers: dict[Any, int] = {}
        named: set[Any] = set()
        for event in trace.events:
            if event.get("ph") == "M" and event.get("name") in ("process_sort_index", "process_labels"):
                continue
            number = numbers.setdefault(event.get("pid"), trace.rank * _PROCESSES + len(numbers))
            shown = {**event, "pid": number}
            if event.get("ph") == "M" and event.get("name") == "process_name":
                named.add(event.get("pid"))
                shown["args"] = {"name": _name(trace, event)}
            if _is_timed(event):
                shown["ts"] = event["ts"] + trace.shift_us - first
            if "id" in event:  # flows, each of its own rank
                shown["id"] = f"{trace.rank}.{event['id']}"
            events.append(shown)
        for process, number in numbers.items():
            if process not in named:
                name = {"name": f"rank {trace.rank} on {trace.host}"}
                events.append({"ph": "M", "name": "process_name", "pid": number, "tid": 0, "args": name})
            order = {"sort_index": number}
            events.append({"ph": "M", "name": "process_sort_index", "pid": number, "tid": 0, "args": order})
    return {
        "displayTimeUnit": "ms",
        "traceEvents": events,
        "clocks": {f"rank {trace.rank}": {"error_us": round(trace.error_us, 3)} for trace in traces},
    }


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time without overlaps, in order."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def overlap(some: Sequence[Span], others: Sequence[Span]) -> float:
    """How long both are the case; each is in order and without overlaps."""
    total, at = 0.0, 0
    for begin, end in some:
        while at < len(others) and others[at][1] <= begin:
            at += 1
        inside = at
        while inside < len(others) and others[inside][0] < end:
            total += min(end, others[inside][1]) - max(begin, others[inside][0])
            inside += 1
    return total


def spans_of(events: Iterable[Mapping[str, Any]], categories: Sequence[str], thread: Any = None) -> list[Span]:
    """When events of these categories took place, on one thread or on any."""
    return union(
        (event["ts"], event["ts"] + event.get("dur", 0.0))
        for event in events
        if event.get("ph") == "X" and event.get("cat") in categories and thread in (None, event.get("tid"))
    )


def _is_timed(event: Mapping[str, Any]) -> bool:
    return isinstance(event.get("ts"), int | float) and event.get("ph") != "M"


def _name(trace: RankTrace, event: Mapping[str, Any]) -> str:
    what = str(event.get("args", {}).get("name", ""))
    what = "" if "python" in what.lower() else f": {what}"
    return f"rank {trace.rank} on {trace.host}{what}"

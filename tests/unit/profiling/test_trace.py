"""Ranks' events on one clock, and how much of a span they fill."""

from __future__ import annotations

import json

import pytest

from hvdtrain.profiling.trace import RankTrace, merged, overlap, spans_of, union


def op(ts: float, dur: float = 1.0, **more) -> dict:
    return {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 4711, "tid": 4711, "ts": ts, "dur": dur, **more}


def test_events_of_ranks_whose_clocks_differ_meet_on_one_clock_that_begins_at_zero():
    early = RankTrace(rank=0, host="a", events=[op(1000.0), op(1010.0)], shift_us=5000.0, error_us=1.0)
    late = RankTrace(rank=1, host="b", events=[op(9000.0)], shift_us=-2995.0, error_us=2.5)
    trace = json.loads(json.dumps(merged([early, late])))
    assert [(event["pid"], event["ts"]) for event in trace["traceEvents"] if event["ph"] == "X"] == [
        (0, 0.0), (0, 10.0), (1000, 5.0),
    ]  # fmt: skip
    assert trace["clocks"] == {"rank 0": {"error_us": 1.0}, "rank 1": {"error_us": 2.5}}


def test_processes_of_one_number_are_told_apart_and_named_with_their_gpus():
    events = [
        {"ph": "M", "name": "process_name", "pid": 4711, "tid": 0, "args": {"name": "python"}},
        {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "args": {"name": "GPU 0"}},
        {"ph": "M", "name": "process_sort_index", "pid": 0, "tid": 0, "args": {"sort_index": 5}},
        op(1.0),
        op(2.0, pid=0, cat="kernel"),
        {"ph": "s", "id": 7, "pid": 4711, "tid": 4711, "ts": 1.0, "cat": "ac2g", "name": "ac2g"},
    ]
    trace = merged([RankTrace(rank=rank, host="a", events=events, shift_us=0, error_us=0) for rank in (0, 3)])
    names = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert names == {0: "rank 0 on a", 1: "rank 0 on a: GPU 0", 3000: "rank 3 on a", 3001: "rank 3 on a: GPU 0"}
    order = {e["pid"]: e["args"]["sort_index"] for e in trace["traceEvents"] if e["name"] == "process_sort_index"}
    assert order == {number: number for number in names}
    assert [e["id"] for e in trace["traceEvents"] if e["ph"] == "s"] == ["0.7", "3.7"]
    assert events[3]["pid"] == 4711  # left alone


def test_a_rank_without_a_name_or_without_events_is_no_trouble():
    trace = merged([RankTrace(rank=0, host="a", events=[op(5.0)], shift_us=0, error_us=0)])
    assert {"name": "rank 0 on a"} in [event.get("args") for event in trace["traceEvents"]]
    assert merged([RankTrace(rank=0, host="a", events=[], shift_us=0, error_us=0)])["traceEvents"] == []


def test_nested_and_touching_spans_are_one():
    assert union([(5, 6), (0, 3), (1, 2), (3, 4)]) == [(0, 4), (5, 6)]
    assert union([]) == []


@pytest.mark.parametrize(
    ("some", "others", "expected"),
    [
        ([(0, 10)], [(2, 3), (5, 20)], 6),
        ([(0, 1), (2, 3), (4, 5)], [(0, 10)], 3),
        ([(0, 4), (4, 8)], [(3, 5)], 2),
        ([(0, 1)], [(1, 2)], 0),
        ([], [(0, 1)], 0),
    ],
)
def test_overlap_counts_what_is_in_both(some, others, expected):
    assert overlap(some, others) == expected
    assert overlap(others, some) == expected


def test_spans_are_those_of_a_thread_and_of_categories():
    events = [op(0), op(10, tid=2), op(20, cat="phase"), {"ph": "M", "name": "x"}]
    assert spans_of(events, ("cpu_op",), 4711) == [(0, 1)]
    assert spans_of(events, ("cpu_op",)) == [(0, 1), (10, 11)]

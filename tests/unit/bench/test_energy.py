"""Joules between two times, out of counters that begin anew; and why there are none."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from hvdtrain.bench.energy import Counter, Meter, find_counters, metered


def zone(folder: Path, name: str, kind: str, joules: float) -> Path:
    place = folder / name
    place.mkdir(parents=True)
    (place / "name").write_text(f"{kind}\n")
    (place / "max_energy_range_uj").write_text("262143328850\n")
    (place / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    return place


def test_packages_and_memory_are_counted_and_what_a_package_contains_only_once(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 10)
    zone(tmp_path, "intel-rapl:0:0", "core", 4)
    zone(tmp_path, "intel-rapl:0:1", "dram", 3)
    zone(tmp_path, "intel-rapl:1", "psys", 99)
    counters, why_not = find_counters(tmp_path)
    assert [(counter.name, counter.read()) for counter in counters if not counter.name.startswith("GPU")] == [
        ("package-0", 10.0),
        ("dram", 3.0),
    ]
    assert why_not == ""


@pytest.mark.parametrize("there", [True, False])
def test_where_nothing_can_be_read_the_reason_is_said(tmp_path, there):
    if there:
        (zone(tmp_path, "intel-rapl:0", "package-0", 1) / "energy_uj").unlink()
    counters, why_not = find_counters(tmp_path if there else tmp_path / "none")
    if all(counter.name.startswith("GPU") for counter in counters) and counters:
        pytest.skip("this machine has GPUs that tell")
    assert counters == []
    assert ("intel-rapl:0 cannot be read (No such file or directory" if there else "no RAPL in") in why_not


def test_joules_are_read_while_the_block_runs_over_a_counter_that_begins_anew(tmp_path):
    place = zone(tmp_path, "intel-rapl:0", "package-0", 262143)
    counters, _ = find_counters(tmp_path)
    with metered((counters[:1], "")) as meter:
        time.sleep(0.25)
        began = time.time()
        time.sleep(0.5)
        beside = place / "new"
        beside.write_text("5000000")  # 0.32885 J to the end of its range, and 5 J
        beside.replace(place / "energy_uj")
        time.sleep(0.5)
        ended = time.time()
        time.sleep(0.25)
    assert meter.between(began, ended) == pytest.approx(5.32885, abs=0.001)
    assert meter.between(began - 100, ended) is None
    assert not [thread for thread in threading.enumerate() if thread.name == "energy"]


def test_between_two_readings_it_is_interpolated():
    meter = Meter(
        counters=[Counter(name="x", read=float)], why_not="", readings=[(0.0, 0.0), (10.0, 20.0), (20.0, 20.0)]
    )
    assert meter.between(5.0, 15.0) == pytest.approx(10.0)
    assert meter.between(5.0, float("nan")) is None

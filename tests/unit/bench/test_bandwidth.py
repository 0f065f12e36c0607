"""Sizes, bus bandwidth and what rounds of timed collectives come to."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdtrain.bench.bandwidth import CUT, FACTORS, bus_bandwidth, size_named, size_of, sizes, whole_size
from hvdtrain.bench.collectives import COPY, Measured, as_json, bandwidths, read_times, rows
from hvdtrain.bench.spread import Spread, digits
from hvdtrain.cli import main
from hvdtrain.errors import ConfigError


@pytest.mark.parametrize(
    ("collective", "ranks", "factor"),
    [
        ("all-reduce", 2, 1.0), ("all-reduce", 8, 1.75), ("all-gather", 8, 0.875), ("reduce-scatter", 4, 0.75),
        ("broadcast", 8, 1.0), ("all-to-all", 4, 0.75),
    ],
)  # fmt: skip
def test_bus_bandwidth_is_nccl_tests(collective, ranks, factor):
    assert bus_bandwidth(collective, 1000, 0.5, ranks) == pytest.approx(2000 * factor)


@given(largest=st.integers(4, 2**34))
def test_sizes_are_all_powers_of_two_up_to_the_largest(largest):
    found = sizes(largest)
    assert found[0] == 4
    assert found[-1] <= largest < 2 * found[-1]
    assert all(later == 2 * earlier for earlier, later in itertools.pairwise(found))


@given(collective=st.sampled_from(list(FACTORS)), size=st.integers(4, 2**34), ranks=st.integers(2, 1024))
def test_a_size_is_cut_into_whole_numbers_for_all_ranks(collective, size, ranks):
    whole = whole_size(collective, size, ranks)
    parts = ranks if collective in CUT else 1
    assert whole % (4 * parts) == 0
    assert whole <= size < whole + 4 * parts


@pytest.mark.parametrize(
    ("text", "size"), [("4", 4), ("64K", 65536), ("64kb", 65536), ("16 MiB", 2**24), ("1G", 2**30), ("12b", 12)]
)
def test_sizes_may_have_units(text, size):
    assert size_of("--max-bytes", text) == size


@pytest.mark.parametrize("text", ["", "3", "K", "1.5M", "-4", "1T", "17G", "4 4", "²", "9" * 40])
def test_what_is_no_size_is_refused_with_the_flag(text):
    with pytest.raises(ConfigError, match="--max-bytes must be"):
        size_of("--max-bytes", text)


def test_sizes_are_said_as_people_say_them():
    assert [size_named(size) for size in (4, 1024, 3 * 2**19, 2**30, 2**34)] == [
        "4 B",
        "1 KiB",
        "1.5 MiB",
        "1 GiB",
        "16 GiB",
    ]


def test_a_spread_has_quartiles():
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]).as_json() == [2.0, 3.0, 4.0]
    assert Spread.of([7.0]).scaled(2).as_json() == [14.0, 14.0, 14.0]


@given(value=st.floats(1e-6, 1e9))
def test_digits_keep_three_digits(value):
    assert math.isclose(float(digits(value).replace(",", "")), value, rel_tol=0.006)


def test_the_time_of_a_call_is_that_of_the_slowest_rank(tmp_path):
    for rank, times in enumerate(([1.0, 4.0], [3.0, 2.0])):
        (tmp_path / f"rank{rank}.json").write_text(json.dumps({"all-reduce": {"8": times}}))
    assert read_times(tmp_path, 2) == {"all-reduce": {8: [3.0, 4.0]}}
    with pytest.raises(ConfigError, match="not all of 3 ranks"):
        read_times(tmp_path, 3)


def measured() -> Measured:
    found = Measured(ranks=2)
    found.add("torch", {"all-gather": {8: [1e-6, 3e-6]}})
    found.add("torch", {"all-gather": {8: [2e-6]}})
    found.add(COPY, {COPY: {4: [1e-6], 8: [1e-6]}})
    return found


def test_rounds_are_put_together_and_a_copy_has_no_factor():
    assert rows(measured(), "all-gather", [4, 8]) == [
        ["size", "torch us", "GB/s", "copy us", "GB/s"],
        ["8 B", "2 (1.5-2.5)", "0.002", "1 (1-1)", "0.008"],
    ]
    whole = json.loads(json.dumps(as_json(measured(), load=[0])))
    assert whole["results"]["all-gather"]["8"]["torch"]["calls"] == 3
    assert whole["results"]["all-gather"]["8"]["torch"]["bus_bytes_per_second"] == pytest.approx(2e6)
    ((size, spread),) = bandwidths(measured(), "all-gather")["torch"]
    assert size == 8
    assert spread.low < spread.median < spread.high


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-bytes", "2"], "--max-bytes must be from 4 bytes"),
        (["--collectives", "gather"], "use some of all-reduce, all-gather"),
        (["--ranks", "1"], "--ranks must be at least 2"),
        (["--engines", "nccl"], "--engines nccl: those that are here are"),
        (["--plot", "x.pdf"], "give a name that ends in .png or .svg"),
        (["--out", "/dev/null/x.json"], "could not write /dev/null/x.json"),
    ],
)
def test_wrong_flags_of_collectives_are_refused_before_anything_is_measured(capsys, words, said):
    assert main(["bench", "collectives", *words]) in (1, 2)
    shown = capsys.readouterr()
    assert said in shown.err
    assert "round" not in shown.out

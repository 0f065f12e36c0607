"""Which tests a sample of the conformance suite takes."""

from __future__ import annotations

import itertools
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launching import run

from hvdtrain.testing.plugin import sampled


class Item(pytest.Item):
    def runtest(self) -> None: ...


@pytest.fixture(scope="module")
def items_of(request):
    session = request.session

    def made(counts: dict[str, int]) -> list[pytest.Item]:
        return [
            Item.from_parent(session, name=f"{name}[{at}]", nodeid=f"suite.py::{name}[{at}]")
            for name, count in counts.items()
            for at in range(count)
        ]

    return made


@given(st.dictionaries(st.sampled_from(["test_a", "test_b", "test_c"]), st.integers(1, 40)), st.integers(1, 6))
def test_every_test_keeps_some_of_its_parameters_spread_and_in_order(items_of, counts, most):
    items = items_of(counts)
    kept = sampled(items, most)
    assert [item for item in items if item in kept] == kept
    for name, count in counts.items():
        taken = [int(item.name.partition("[")[2][:-1]) for item in kept if item.name.startswith(name)]
        assert len(taken) == min(most, count)
        assert taken[0] == 0
        assert all(b - a <= count // most + 1 for a, b in itertools.pairwise(taken))
        assert count - taken[-1] <= count // most + 1


def test_a_sample_of_nothing_is_refused():
    ended = run([sys.executable, "-m", "hvdtrain.testing", "--sample", "0"])
    assert ended.code == 2
    assert "--sample needs a number of at least 1" in ended.output

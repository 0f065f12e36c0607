"""Which tests a sample of the conformance suite takes."""

from __future__ import annotations

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
    session.config.addinivalue_line("markers", "costly(most): as the suite's plugin has it")

    def made(counts: dict[str, int]) -> list[pytest.Item]:
        return [
            Item.from_parent(session, name=f"{name}[{at}]", nodeid=f"suite.py::{name}[{at}]")
            for name, count in counts.items()
            for at in range(count)
        ]

    return made


COUNTS = st.dictionaries(st.sampled_from(["test_a", "test_b", "test_c"]), st.integers(1, 40))


@given(COUNTS, st.integers(1, 6), st.integers(0, 4))
def test_every_test_keeps_some_of_its_parameters_in_order(items_of, counts, most, turn):
    items = items_of(counts)
    kept = sampled(items, most, brief=False, turn=turn)
    assert [item for item in items if item in kept] == kept
    again = sampled(items_of(counts), most, brief=False, turn=turn)
    assert [item.name for item in again] == [item.name for item in kept]  # every rank takes the same
    for name, count in counts.items():
        assert sum(item.name.startswith(name) for item in kept) == min(most, count)


@given(COUNTS, st.integers(1, 6))
def test_who_takes_turns_leaves_nothing_out(items_of, counts, most):
    items = items_of(counts)
    turns = range(max([0, *(-(-count // most) for count in counts.values())]))
    assert {item for turn in turns for item in sampled(items, most, brief=False, turn=turn)} == set(items)


@given(COUNTS, st.sets(st.sampled_from(["test_a", "test_b", "test_c"])), st.integers(1, 6))
def test_a_brief_run_has_all_but_some_of_what_is_costly(items_of, counts, costly, most):
    items = items_of(counts)
    for item in items:
        if item.name.partition("[")[0] in costly:
            item.add_marker(pytest.mark.costly(most))
    kept = sampled(items, None, brief=True, turn=1)
    for name, count in counts.items():
        assert sum(item.name.startswith(name) for item in kept) == (min(most, count) if name in costly else count)
    assert sampled(items, None, brief=False, turn=1) == items


def test_a_sample_of_nothing_is_refused():
    ended = run([sys.executable, "-m", "hvdtrain.testing", "--sample", "0"])
    assert ended.code == 2
    assert "--sample needs a number of at least 1" in ended.output

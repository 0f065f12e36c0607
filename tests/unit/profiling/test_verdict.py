"""What binds a step, said of the rank that the others wait for."""

from __future__ import annotations

import json
import math

import pytest

from hvdtrain.profiling.verdict import RankTimes, judge


def times(rank: int = 0, **of: float) -> RankTimes:
    return RankTimes(rank=rank, **{"input": 0.01, "exchange": 0.01, "compute": 0.01, "python": 0.01, **of})


@pytest.mark.parametrize(("part", "binds"), [("input", "input"), ("exchange", "exchange"), ("compute", "compute"), ("python", "Python")])  # fmt: skip
def test_the_largest_part_binds(part, binds):
    verdict = judge([times(**{part: 0.07})])
    assert verdict.binds == binds
    assert verdict.sentence.startswith(f"{binds} binds the step: 70 of 100 ms (")
    assert verdict.shares[binds] == pytest.approx(0.7)
    assert "hidden" not in verdict.sentence
    assert json.loads(json.dumps(verdict.as_json()))["hidden"] is None


def test_it_is_the_rank_that_waits_least_that_is_looked_at():
    verdict = judge([times(0, exchange=0.09, alone=0.02), times(1, input=0.09, exchange=0.005, alone=0.02)])
    assert (verdict.rank, verdict.binds) == (1, "input")
    assert "of rank 1, for which others wait 85 ms" in verdict.sentence
    assert verdict.hidden == pytest.approx(0.75)
    assert "By itself the exchange takes 20 ms; about 75% of it is hidden" in verdict.sentence


def test_an_exchange_that_is_waited_for_longer_than_it_takes_hides_nothing():
    verdict = judge([times(exchange=0.05, alone=0.02), times(1, exchange=0.05, alone=0.02)])
    assert verdict.hidden == 0
    assert "nothing of it is hidden" in verdict.sentence


def test_a_step_of_no_length_is_no_trouble():
    verdict = judge([times(input=0.0, exchange=0.0, compute=0.0, python=0.0, alone=math.nan)])
    assert set(verdict.shares.values()) == {0.0}

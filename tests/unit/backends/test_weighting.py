import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hvdtrain.backends.weighting import Tally, Weighting
from hvdtrain.errors import TrainingError
from hvdtrain.testing.threads import run_ranks

# For each step and rank, the samples of its micro-batches; a rank may have none.
COUNTS = st.lists(st.lists(st.lists(st.integers(0, 10**6), max_size=3), min_size=3, max_size=3), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS, known=st.booleans(), averages=st.booleans())
def test_weights_make_the_mean_over_all_samples(counts, known, averages):
    """Each sample is a gradient of its own: all must end with the weight 1 / total."""

    def rank(communicator):
        weighting = Weighting(communicator, 3 if averages else 1)
        found = []
        for step in counts:
            weighting.begin_step()
            mine, total = step[communicator.wire.rank], sum(map(sum, step))
            given_total = (total or 1) if known else None
            weights = []
            for samples in mine:
                if not weights:
                    weighting.begin_backward()
                weights.append(weighting.weigh(samples, None, given_total, shared=False))
            factor = weighting.settle()
            weights = [weight * factor for weight in weights]
            weighting.close()
            summed = Tally.of(sum_over_ranks(communicator, weighting.tally.values()))
            last = weighting.factor(summed)
            for samples, weight in zip(mine, weights, strict=True):
                scale = (last or 0.0) / (3 if averages else 1)
                found.append((weight * scale, samples / total if total else 0.0, weight))
        return found

    for found in run_ranks(3, rank):
        for weight, wanted, on_the_way in found:
            assert math.isclose(weight, wanted, rel_tol=1e-12)
            assert on_the_way <= 3 * 10**6 * 2  # and in the first step, as in all alike ones, at most about one


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.lists(st.floats(0, 1e18) | st.integers(0, 10**6), max_size=3), min_size=3, max_size=3),
    known=st.booleans(),
)
def test_weights_may_be_anything_that_a_loss_is_a_mean_over(weights, known):
    total = sum(map(sum, weights))
    assume(total > 1e-25)

    def rank(communicator):
        weighting = Weighting(communicator, 1)
        weighting.begin_backward()
        mine = weights[communicator.wire.rank]
        found = [weighting.weigh(5, weight, total if known else None, shared=False) for weight in mine]
        assert all(share < 1e38 for share in found)  # float32 holds it
        settled = weighting.settle()
        last = weighting.factor(Tally.of(sum_over_ranks(communicator, weighting.tally.values())))
        return [(weight * settled * (last or 0.0), wanted / total) for weight, wanted in zip(found, mine, strict=True)]

    for weight, wanted in (pair for found in run_ranks(3, rank) for pair in found):
        assert math.isclose(weight, wanted, rel_tol=1e-12, abs_tol=1e-29 / total)


def test_samples_without_any_weight_have_no_mean():
    def rank(communicator):
        weighting = Weighting(communicator, 1)
        weighting.begin_backward()
        weighting.weigh(4, 0.0, None, shared=False)
        return weighting.factor(weighting.tally), weighting.empty

    ((factor, empty),) = run_ranks(1, rank)
    assert math.isnan(factor)
    assert empty


@pytest.mark.parametrize(
    "weight",
    [-1, 1e31, 10**400, "3", b"3", [1], torch.ones(2), math.nan, math.inf, torch.tensor(-0.5), torch.tensor(math.nan)],
)
def test_a_weight_is_a_number_from_0(weight):
    with pytest.raises(TrainingError, match="0 or more"):
        run_ranks(1, lambda communicator: Weighting(communicator, 1).weigh(1, weight, None, shared=False))


@pytest.mark.parametrize(
    "weight", [3, 3.0, np.float16(3), np.array(3), torch.tensor(3), torch.tensor(3.0, requires_grad=True), Fraction(3)]
)
def test_a_weight_is_a_number_of_any_type(weight):
    (share,) = run_ranks(1, lambda communicator: Weighting(communicator, 1).weigh(1, weight, 6.0, shared=False))
    assert share == 0.5


def sum_over_ranks(communicator, values):
    return communicator.all_reduce(torch.tensor(values, dtype=torch.float64)).tolist()


def test_equal_counts_weigh_no_more_than_with_a_total():
    def rank(communicator):
        weighting = Weighting(communicator, 3)
        seen = []
        for _ in range(3):
            weighting.begin_step()
            weighting.begin_backward()
            weight = weighting.weigh(100_000, None, None, shared=False)
            weight *= weighting.settle()
            weighting.factor(Tally.of(sum_over_ranks(communicator, weighting.tally.values())))
            seen.append(weight)
        return seen

    for seen in run_ranks(3, rank):
        assert all(0.5 < weight <= 1 for weight in seen)


def test_losses_over_the_same_samples_count_them_once():
    def rank(communicator):
        weighting = Weighting(communicator, 1)
        weighting.begin_backward()
        one = weighting.weigh(4, None, None, shared=True)
        two = weighting.weigh(4, None, None, shared=False)
        factor = weighting.factor(weighting.tally)
        return one * factor, two * factor

    assert run_ranks(1, rank) == [(1.0, 1.0)]


def test_a_last_loss_that_nothing_followed_is_counted():
    def rank(communicator):
        weighting = Weighting(communicator, 1)
        weighting.begin_backward()
        weight = weighting.weigh(4, None, None, shared=True)
        weighting.close()
        return weight * weighting.factor(weighting.tally)

    assert run_ranks(1, rank) == [1.0]


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([(-1, None, False)], "0 or more"),
        ([(1, 0, False)], "total must be positive"),
        ([(1, 2, False), (1, None, False)], "or to none"),
        ([(1, None, False), (1, 2, False)], "or to none"),
        ([(3, None, True), (4, None, False)], "same samples"),
    ],
)
def test_numbers_that_cannot_be_are_refused(calls, message):
    def rank(communicator):
        weighting = Weighting(communicator, 1)
        for samples, total, shared in calls:
            weighting.weigh(samples, None, total, shared=shared)

    with pytest.raises(TrainingError, match=message):
        run_ranks(1, rank)


def test_a_tally_fits_float32():
    growing = {"began": 10**9 + 5, "steps": 10**9 + 6, "replica": 10**9 + 7}
    tally = Tally(weight=4_000_000, samples=4_000_000, uncounted=3, counted=0, ranks=1, **growing)
    values = torch.tensor(tally.values(), dtype=torch.float32).tolist()
    assert len(values) == Tally.SIZE
    back = Tally.of(values)
    assert back.weight == back.samples == 4_000_000
    assert (back.began, back.steps, back.replica) == tuple(number % 4096 for number in growing.values())


def test_a_rank_that_has_done_nothing_tells_nothing():
    assert Tally().values() == [0.0] * Tally.SIZE

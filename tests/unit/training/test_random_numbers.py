"""Random numbers are seeded, remembered and put back, of every generator."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import hvdtrain
from hvdtrain.data.random_numbers import untouched_random_numbers
from hvdtrain.training.random_numbers import (
    OwnRandomNumbers,
    random_state,
    seed_everything,
    set_random_state,
)


def draw():
    return [*torch.rand(2).tolist(), torch.randn(()).item(), random.random(), random.gauss(0, 1), *np.random.rand(2), np.random.randn()]  # fmt: skip


@pytest.fixture(autouse=True)
def leave_no_trace():
    with untouched_random_numbers():
        yield


def test_a_seed_gives_the_same_numbers_again_and_each_rank_others():
    drawn = []
    for seed, rank in [(1, 0), (1, 1), (2, 0), (1, 0)]:
        seed_everything(seed, rank)
        drawn.append(draw())
    assert drawn[0] == drawn[3]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not set(drawn[one]) & set(drawn[other])


def test_a_state_goes_on_where_it_was_taken():
    seed_everything(3)
    draw()
    state = random_state()
    expected = draw()
    draw()
    set_random_state(state)
    assert draw() == expected


def test_the_state_of_an_earlier_version_is_read():
    state = random_state()
    expected = draw()
    version, words, gauss = state["python"]
    set_random_state({**state, "python": [version, words.tolist(), gauss]})
    assert draw() == expected


def test_a_world_of_one_draws_what_was_seeded(alone):
    seed_everything(5)
    expected = [draw(), draw()]
    seed_everything(5)
    with OwnRandomNumbers(alone):
        inside = draw()
    assert [inside, draw()] == expected


def test_the_public_names_are_these():
    assert hvdtrain.seed_everything is seed_everything
    assert hvdtrain.OwnRandomNumbers is OwnRandomNumbers

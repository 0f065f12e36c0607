"""Who may be a rank."""

import multiprocessing
import os

import pytest

from hvdtrain.errors import LaunchError
from hvdtrain.launch import once


@pytest.fixture(autouse=True)
def mark(monkeypatch):
    monkeypatch.setenv("HVDTRAIN_RANK_IS", "")


def again(rank, answer):
    try:
        once.begin(rank, 2)
    except LaunchError as error:
        answer.send(str(error))
    else:
        answer.send("")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_child_of_multiprocessing_is_not_the_same_rank_again(rank):
    once.begin(0, 2)
    once.begin(0, 2)  # the rank itself may stop and start
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=again, args=(rank, there))
    child.start()
    said = here.recv()
    child.join()
    expected = "begun by rank 0 and cannot be that rank again"
    assert (expected in said) == (rank == 0)


def test_a_world_of_one_leaves_no_mark():
    once.begin(0, 1)
    assert not os.environ["HVDTRAIN_RANK_IS"]

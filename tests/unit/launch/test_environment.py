"""Who set what: a library's variables are changed in one place, and what the user chose stays."""

from __future__ import annotations

import os

import pytest

from hvdtrain.launch import environment

HERE, THERE = "HVDTRAIN_TEST_HERE", "HVDTRAIN_TEST_THERE"


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    for name in (HERE, THERE, "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)


def test_variables_are_set_within_only_and_restored_when_it_fails():
    os.environ[HERE] = "before"

    def fail() -> None:
        with environment.variables({HERE: "1", THERE: "2"}):
            assert (os.environ[HERE], os.environ[THERE]) == ("1", "2")
            raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        fail()
    assert os.environ[HERE] == "before"
    assert THERE not in os.environ


def test_what_was_given_is_known_and_kept():
    os.environ[HERE] = "the user's"
    assert environment.given(HERE) == "the user's"
    assert environment.given(THERE) is None
    assert environment.given_like("HVDTRAIN_TEST_HE")
    assert not environment.given_like("HVDTRAIN_TEST_X")
    environment.settle(environment.not_given({HERE: "ours", THERE: "ours"}))
    assert (os.environ[HERE], os.environ[THERE]) == ("the user's", "ours")


def test_an_address_is_given_where_none_was_and_one_half_of_it_is_an_address():
    assert not environment.address_given()
    os.environ["MASTER_PORT"] = "7"
    assert environment.address_given()
    os.environ["RANK"] = "5"
    environment.give_address("host", 8, rank=1, world_size=2, local_rank=0)
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    assert [os.environ[name] for name in names] == ["host", "7", "5", "2", "0"]

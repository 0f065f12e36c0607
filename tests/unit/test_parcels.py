"""What travels by value to another process, and the name of what cannot."""

from __future__ import annotations

import pickle
import threading

import pytest

from hvdtrain.errors import ConfigError
from hvdtrain.parcels import packed

lock = threading.Lock()


class Holder:
    def __init__(self, held: object) -> None:
        self.number = 1
        self.held = held

    def method(self) -> None: ...


def closure(held: object):
    return lambda: held


def of_a_global():
    return lock


def default(held: object = lock):
    return held


of_a_global.__module__ = default.__module__ = "__main__"  # else cloudpickle sends their names
LOOP = Holder(None)
LOOP.held = [LOOP, lock]


def test_what_can_be_pickled_comes_back_in_order():
    assert pickle.loads(packed({"a": 1, "b": [2, "three"]}, "no advice")) == (1, [2, "three"])


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (lock, "it, of type lock"),
        ((1, (n for n in "ab")), "it -> [1], of type generator"),
        ({"x": {"y": lock}}, "it -> x -> y, of type lock"),
        (Holder(lock), "it -> held, of type lock"),
        (Holder([0, Holder(lock)]), "it -> held -> [1] -> held, of type lock"),
        (Holder(lock).method, "it -> self -> held, of type lock"),
        (closure(lock), "it -> held, of type lock"),
        (closure(closure(lock)), "it -> held -> held, of type lock"),
        (of_a_global, "it -> lock, of type lock"),
        (default, "it -> default 0, of type lock"),
        (LOOP, "it -> held -> [1], of type lock"),
    ],
)
def test_what_cannot_is_named_down_to_its_cause(value, named):
    with pytest.raises(ConfigError, match=r"make it there$") as caught:
        packed({"fine": 1, "it": value}, "make it there")
    assert str(caught.value).startswith(f"{named}, cannot be pickled (")

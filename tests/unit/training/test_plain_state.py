"""A state comes back as it was saved, types and all, and nothing is unpickled on the way."""

from __future__ import annotations

import functools
import io
import math
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from enum import Enum

import numpy as np
import pytest
import torch

from hvdtrain.errors import CheckpointError
from hvdtrain.training.plain_state import from_plain, to_plain


class Mode(Enum):
    UP = 1
    DOWN = 2


Pair = namedtuple("Pair", "a b")


@dataclass(frozen=True)
class Bounds:
    low: float
    high: tuple[int, ...]


class Whatever:
    pass


def through_a_file(plain):
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


VALUES = [
    None, True, 3, 10**30, -0.5, math.inf, "text", b"\x00\xff", bytearray(b"ab"), 2 - 1j, range(3, 9, 2),
    [], [1, [2.0, "x"]], (), (1, (2, [3])), {1, 2}, frozenset({3, 4}), deque([1, 2], maxlen=5),
    {}, {"a": {"b": 1}}, {1: "one", (2, 3): None}, {"__type__": "tuple"}, {None: 0, True: 1},
    Counter({3: 1, 6: 2}), OrderedDict([("z", 1), ("a", 2)]),
    torch.Size([2, 3]), torch.bfloat16, torch.device("cuda", 1),
    np.float64(0.1), np.int32(7), np.bool_(True), np.str_("x"), np.arange(6.0).reshape(2, 3), np.zeros((0, 2), np.int8),
]  # fmt: skip


def same(a, b):
    if isinstance(a, np.ndarray):
        return type(a) is type(b) and a.dtype == b.dtype and np.array_equal(a, b)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize(
    "around", [lambda x: x, lambda x: {"k": [x]}, lambda x: {7: (x,)}], ids=["bare", "list", "keys"]
)
def test_a_value_comes_back_with_its_type(value, around):
    whole = from_plain(through_a_file(to_plain(around(value), "it")), None, "it")
    expected = around(value)
    assert type(whole) is type(expected)
    inner = whole if around(0) == 0 else next(iter(whole.values()))[0]
    assert same(inner, value)


def test_dictionaries_keep_their_order_and_a_defaultdict_its_factory():
    state = defaultdict(list, {2: [1], 1: [2]})
    back = from_plain(through_a_file(to_plain(state, "it")), None, "it")
    assert list(back) == [2, 1]
    assert back["new"] == []


def test_tensors_come_back_equal_and_without_a_graph():
    weight = torch.nn.Parameter(torch.randn(3).bfloat16())
    back = from_plain(through_a_file(to_plain({"w": weight}, "it")), None, "it")["w"]
    assert torch.equal(back, weight)
    assert not back.requires_grad


def test_a_generator_goes_on_where_it_was():
    generator = torch.Generator().manual_seed(5)
    back = from_plain(through_a_file(to_plain([generator], "it")), None, "it")[0]
    assert torch.equal(torch.rand(3, generator=back), torch.rand(3, generator=generator))


class Inner:
    def __init__(self, count):
        self.count = count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def method_owner():
    return Inner(0).state_dict


@pytest.mark.parametrize(
    "kept",
    [lambda x: x, math.sqrt, method_owner(), functools.partial(max, 0), Whatever, np.sqrt],
    ids=["lambda", "built-in", "method", "partial", "class", "ufunc"],
)
def test_functions_and_classes_are_those_of_the_running_program(kept):
    plain = through_a_file(to_plain({"f": [kept], "n": 1}, "it"))
    assert from_plain(plain, {"f": [kept], "n": 9}, "it") == {"f": [kept], "n": 1}
    with pytest.raises(CheckpointError, match=r"it\['f'\]\[0\] was .* when the state was saved"):
        from_plain(plain, {"f": [], "n": 9}, "it")


def test_an_object_that_is_named_as_kept_is_kept():
    mine, other = Whatever(), Whatever()
    plain = through_a_file(to_plain({"o": mine}, "it", kept=(mine,)))
    assert from_plain(plain, {"o": other}, "it")["o"] is other


def test_what_has_a_class_of_the_program_gets_its_content_back():
    saved = {"mode": Mode.DOWN, "pair": Pair(1, (2,)), "bounds": Bounds(0.5, (1, 2)), "inner": Inner(7)}
    own = {"mode": Mode.UP, "pair": Pair(0, 0), "bounds": Bounds(0.0, ()), "inner": Inner(0)}
    back = from_plain(through_a_file(to_plain(saved, "it")), own, "it")
    assert (back["mode"], back["pair"], back["bounds"]) == (Mode.DOWN, Pair(1, (2,)), Bounds(0.5, (1, 2)))
    assert back["inner"] is own["inner"]
    assert own["inner"].count == 7
    assert own["bounds"] == Bounds(0.0, ())


def test_another_class_than_the_saved_one_is_named():
    with pytest.raises(
        CheckpointError, match=r"it\['inner'\] was a Inner when the state was saved, and is a Whatever now"
    ):
        from_plain(to_plain({"inner": Inner(1)}, "it"), {"inner": Whatever()}, "it")


class MyList(list):
    pass


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Whatever(), "Whatever"),
        (MyList([1]), "MyList"),
        (np.datetime64("2026-01-01"), "datetime64"),
        (np.array(["2026-01-01"], dtype="datetime64[D]"), "ndarray"),
        (np.array([Whatever()], dtype=object), "ndarray"),  # its memory holds addresses
        (defaultdict(lambda: 3), "makes its values by"),
        (iter([]), "list_iterator"),
    ],
)
def test_what_cannot_be_saved_is_refused_with_its_place(value, named):
    with pytest.raises(CheckpointError, match=rf"^it\['a'\]\[1\] cannot be saved.*{named}"):
        to_plain({"a": [0, value]}, "it")


def test_a_container_that_contains_itself_is_refused_and_one_that_comes_twice_is_not():
    loop: list = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match="refers to itself"):
        to_plain(loop, "it")
    twice = [1]
    assert from_plain(to_plain([twice, twice], "it"), None, "it") == [[1], [1]]


def test_a_state_of_a_later_version_is_refused():
    with pytest.raises(CheckpointError, match="saved as a 'hologram'"):
        from_plain({"__type__": "hologram"}, None, "it")

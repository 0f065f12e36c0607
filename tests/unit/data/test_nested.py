"""The walk over a nested batch: what every container becomes when it is moved, cast, measured and emptied."""

from __future__ import annotations

import collections
import dataclasses
import enum
import types
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.utils.data import default_collate

from hvdtrain.data.nested import LONGER, SHORTER, cast_floating, empty_from, leaves, memory_bytes, to_device
from hvdtrain.data.sample_count import SampleCount
from hvdtrain.errors import ConfigError


class Pair(NamedTuple):
    x: Any
    name: str


class Stack(list[Any]):
    """A list with a mind of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    x: Tensor
    name: str
    later: list[Tensor] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        if self.x.device.type == "meta":
            raise AssertionError("__post_init__ ran again")
        object.__setattr__(self, "later", [self.x])


class Old:
    """Moves itself, by a method of the old kind."""

    def __init__(self, where: Any = "cpu") -> None:
        self.where = where

    def to(self, device: Any) -> Old:
        return Old(device)


class New(Old):
    def to(self, device: Any, non_blocking: bool = False) -> New:
        return New((device, non_blocking))


def test_every_container_keeps_its_type_and_its_tensors_move() -> None:
    x = torch.ones(2)
    meta = torch.device("meta")
    batch = {
        "tensor": x,
        "tuple": (x, 1),
        "list": [x, "text", None],
        "named": Pair(x, "n"),
        "subclass": Stack([x]),
        "ordered": collections.OrderedDict(a=x),
        "default": collections.defaultdict(list, a=[x]),
        "proxy": types.MappingProxyType({"a": x}),
        "dataclass": Sample(x=x, name="n"),
        "packed": pack_sequence([x]),
        "own": Old(),
        "size": torch.Size([2]),
        "class": Old,
    }
    moved = to_device(batch, meta)
    assert {key: type(value) for key, value in moved.items()} == {key: type(value) for key, value in batch.items()}
    assert moved["tuple"][1:] == (1,)
    assert moved["list"][1:] == ["text", None]
    assert moved["default"].default_factory is list
    assert (moved["size"], moved["class"], moved["own"].where) == (torch.Size([2]), Old, meta)
    assert isinstance(moved["packed"], PackedSequence)
    for tensor in (
        moved["tensor"],
        moved["tuple"][0],
        moved["list"][0],
        moved["named"].x,
        moved["subclass"][0],
        moved["ordered"]["a"],
        moved["default"]["a"][0],
        moved["proxy"]["a"],
        moved["dataclass"].x,
        moved["dataclass"].later[0],
        moved["packed"].data,
    ):
        assert tensor.device == meta


def test_the_batch_itself_is_not_changed() -> None:
    x = torch.ones(2)
    batch = [x, {"a": x}, Stack([x]), collections.OrderedDict(a=x), Sample(x=x, name="n")]
    to_device(batch, "meta")
    assert batch[0] is batch[1]["a"] is batch[2][0] is batch[3]["a"] is batch[4].x is x  # type: ignore[index,attr-defined]


def test_only_those_who_know_it_are_told_not_to_block() -> None:
    assert to_device(Old(), "d", non_blocking=True).where == "d"
    assert to_device(New(), "d", non_blocking=True).where == ("d", True)
    assert to_device(New(), "d").where == ("d", False)


@pytest.mark.parametrize("value", [3, 2.5, "text", b"bytes", None, True, {1, 2}, range(3)])
def test_other_values_come_back_as_they_are(value: Any) -> None:
    assert to_device(value, "meta") is value


# -- cast -------------------------------------------------------------------------------------------------------------


class Movable:
    """An object of the user's that moves itself, and leads back to itself."""

    def __init__(self, x: Tensor, names: list[str]) -> None:
        self.x, self.names, self.me = x, names, self

    def to(self, device: Any) -> Movable:
        return Movable(self.x.to(device), self.names)


def test_floating_point_tensors_are_cast_wherever_they_are_and_nothing_else() -> None:
    whole, half, sparse = torch.tensor([1, 2]), torch.ones(2, dtype=torch.float16), torch.eye(2).to_sparse()
    batch = {
        "named": Pair(half, "n"),
        "dataclass": Sample(x=torch.ones(2), name="n"),
        "object": Movable(torch.ones(2), ["a"]),
        "packed": pack_sequence([torch.ones(2)]),
        "deque": collections.deque([torch.ones(1)]),
        "sparse": sparse,
        "rest": (
            whole,
            torch.ones(2, dtype=torch.complex64),
            torch.tensor([True]),
            np.ones(2, dtype=np.float32),
            "x",
            None,
        ),
    }
    cast = cast_floating(batch, torch.float64)
    assert {key: type(value) for key, value in cast.items()} == {key: type(value) for key, value in batch.items()}
    for tensor in (
        cast["named"].x,
        cast["dataclass"].x,
        cast["dataclass"].later[0],
        cast["object"].x,
        cast["packed"].data,
        cast["deque"][0],
        cast["sparse"],
    ):
        assert tensor.dtype == torch.float64
    assert cast["rest"] is batch["rest"]
    assert cast["packed"].batch_sizes.dtype == torch.int64
    assert batch["object"].x.dtype == torch.float32  # type: ignore[attr-defined]


def test_leaves_are_named_by_the_way_to_them_and_measured() -> None:
    batch = {"x": [torch.zeros(2, 3), np.zeros(4)], "s": Sample(x=torch.zeros(1), name="four")}
    found = dict(leaves(batch))
    assert list(found) == ["batch['x'][0]", "batch['x'][1]", "batch['s'].x", "batch['s'].name", "batch['s'].later[0]"]
    assert memory_bytes(batch) == 24 + 32 + 4 + 4 + 4


# -- empty ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Plain:
    x: Tensor
    names: list[str]

    def __post_init__(self) -> None:
        if len(self.x) == 0:
            raise AssertionError("__post_init__ ran again")
        self.mask = self.x > 0  # no field
        self.count = len(self.x)


@dataclasses.dataclass(frozen=True)
class Nested:
    inner: Plain
    scale: float = 2.0


@dataclasses.dataclass(slots=True)
class Slotted:
    x: Tensor
    names: tuple[str, ...]


class Slots:
    __slots__ = ("__hidden", "x")

    def __init__(self, x: Tensor) -> None:
        self.x, self.__hidden = x, list(x)


class Sliceable:
    """Keeps what it has where nobody can look, and can be sliced."""

    def __init__(self, rows: list[Any]) -> None:
        self._rows = lambda: rows

    def __len__(self) -> int:
        return len(self._rows())

    def __getitem__(self, index: slice) -> Sliceable:
        return Sliceable(self._rows()[index])


class Color(enum.Enum):
    RED = 1


def packed(n: int, enforce_sorted: bool = True) -> PackedSequence:
    return pack_sequence([torch.ones(3, 2)] * n, enforce_sorted=enforce_sorted)


# What a collate function makes of n samples, and how many samples are in what becomes of it without any.
x = torch.arange(60.0).reshape(10, 6)
EMPTIED: dict[str, tuple[Any, Any]] = {
    "tensor": (lambda n: x[:n], lambda e: e.shape == (0, 6)),
    "one dimension": (lambda n: x[:n, 0], lambda e: e.shape == (0,)),
    "batch second": (lambda n: x[:n].t(), lambda e: e.shape == (6, 0)),
    "pairwise": (lambda n: x[:n] @ x[:n].t(), lambda e: e.shape == (0, 0)),
    "two views of each": (lambda n: x[: 2 * n], lambda e: e.shape == (0, 6)),
    "tokens of all": (lambda n: torch.ones(n * 7), lambda e: e.shape == (0,)),
    "offsets": (lambda n: torch.arange(n + 1) * 7, lambda e: e.tolist() == [0]),
    "list of offsets": (lambda n: [x[:n], [7 * i for i in range(n + 1)]], lambda e: e[1] == [0]),
    "tuple": (lambda n: (x[:n], x[:n, 0]), lambda e: type(e) is tuple and [len(t) for t in e] == [0, 0]),
    "named tuple": (lambda n: Pair(x[:n], "all"), lambda e: type(e) is Pair and (len(e.x), e.name) == (0, "all")),
    "list of fields": (lambda n: [x[:n], x[:n]], lambda e: [len(t) for t in e] == [0, 0]),
    "as many fields as samples": (lambda n: [x[:n]] * 2 + ["text"], lambda e: len(e) == 3 and len(e[0]) == 0),
    "list of texts": (lambda n: {"x": x[:n], "t": ["a"] * n}, lambda e: e["t"] == [] and len(e["x"]) == 0),
    "tuple of texts": (lambda n: (x[:n], ("a",) * n), lambda e: e[1] == ()),
    "texts alone": (lambda n: ["a"] * n, lambda e: e == []),
    "dict of lists": (lambda n: {"a": {"b": [1] * n, "c": [None] * n}}, lambda e: e == {"a": {"b": [], "c": []}}),
    "list of dicts": (lambda n: [{"box": torch.ones(i, 4)} for i in range(n)], lambda e: e == []),
    "ragged lists": (lambda n: ([[1] * i for i in range(n)], x[:n]), lambda e: e[0] == []),
    "dict of samples": (lambda n: {i: x[i] for i in range(n)}, lambda e: e == {}),
    "deque": (lambda n: collections.deque(["a"] * n), lambda e: e == collections.deque()),
    "user list of fields": (lambda n: collections.UserList([x[:n], 3]), lambda e: len(e[0]) == 0 and e[1] == 3),
    "user dict": (
        lambda n: collections.UserDict(a=x[:n]),
        lambda e: type(e) is collections.UserDict and len(e["a"]) == 0,
    ),
    "ordered": (lambda n: collections.OrderedDict(b=x[:n], a=1), lambda e: list(e) == ["b", "a"] and len(e["b"]) == 0),
    "default": (lambda n: collections.defaultdict(list, a=[1] * n), lambda e: e["a"] == [] and e["other"] == []),
    "proxy": (lambda n: types.MappingProxyType({"a": x[:n]}), lambda e: len(e["a"]) == 0),
    "rest": (
        lambda n: (x[:n], "text", b"bytes", None, 2.5, True, 7, Color.RED, torch.float32, {1, 2}, range(3), 1j),
        lambda e: e[1:] == ("text", b"bytes", None, 2.5, True, 7, Color.RED, torch.float32, {1, 2}, range(3), 1j),
    ),
    "constant tensors": (lambda n: (x[:n], torch.ones(5), torch.tensor(7)), lambda e: e[1].shape == (5,) and e[2] == 7),
    "counts": (lambda n: (x[:n], n, torch.tensor(3 * n), np.array(n)), lambda e: [int(c) for c in e[1:]] == [0, 0, 0]),
    "mean": (lambda n: (x[:n], x[:n].mean(), n / 7), lambda e: e[1] == x[:SHORTER].mean() and e[2] == SHORTER / 7),
    "arrays": (
        lambda n: (np.ones((n, 2)), np.array(["a"] * n), np.float32(n)),
        lambda e: (len(e[0]), len(e[1])) == (0, 0),
    ),
    "dataclass": (
        lambda n: Plain(x[:n], ["a"] * n),
        lambda e: (len(e.x), e.names, len(e.mask), e.count) == (0, [], 0, 0),
    ),
    "nested dataclass": (lambda n: Nested(Plain(x[:n], ["a"] * n)), lambda e: (len(e.inner.x), e.scale) == (0, 2.0)),
    "slots": (lambda n: Slotted(x[:n], ("a",) * n), lambda e: (len(e.x), e.names) == (0, ())),
    "hidden slots": (lambda n: Slots(x[:n]), lambda e: (len(e.x), e._Slots__hidden) == (0, [])),
    "object with to": (lambda n: Movable(x[:n], ["a"] * n), lambda e: (len(e.x), e.names, type(e)) == (0, [], Movable)),
    "object without to": (lambda n: types.SimpleNamespace(x=x[:n], k=1), lambda e: (len(e.x), e.k) == (0, 1)),
    "sliceable": (lambda n: Sliceable(["a"] * n), lambda e: type(e) is Sliceable and len(e) == 0),
    "packed": (packed, lambda e: type(e) is PackedSequence and e.data.shape == (0, 2)),
    "packed unsorted": (lambda n: packed(n, False), lambda e: pad_packed_sequence(e)[0].shape == (3, 0, 2)),
    "sparse": (lambda n: x[:n].to_sparse(), lambda e: e.layout == torch.sparse_coo and e.shape == (0, 6)),
    "csr": (lambda n: x[:n].to_sparse_csr(), lambda e: e.layout == torch.sparse_csr and e.shape == (0, 6)),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("kind", EMPTIED)
def test_the_empty_batch_has_nothing_of_any_sample(kind: str) -> None:
    make, holds = EMPTIED[kind]
    shorter, longer = make(SHORTER), make(LONGER)
    assert holds(empty_from(shorter, longer))
    assert repr(shorter) == repr(make(SHORTER)) or "object at" in repr(shorter)  # and the argument is as before


def test_an_empty_packed_sequence_goes_through_a_network() -> None:
    rnn = torch.nn.LSTM(2, 3)
    outputs, (state, _) = rnn(empty_from(packed(SHORTER), packed(LONGER)))
    (outputs.data.sum() + state.sum()).backward()
    assert state.shape == (1, 0, 3)
    assert float(rnn.weight_ih_l0.grad.abs().sum()) == 0  # type: ignore[union-attr]


class Opaque:
    """Shows nothing: a closure."""

    __slots__ = ("_get",)

    def __init__(self, rows: list[Any]) -> None:
        self._get = iter(rows)


UNCLEAR: dict[str, tuple[Any, str]] = {
    "iterator": (lambda n: {"x": x[:n], "rows": iter(range(n))}, r"batch\['rows'\] is a range_iterator"),
    "inside an object": (lambda n: Opaque(["a"] * n), r"batch\._get is a list_iterator"),
    "another type": (
        lambda n: [x[:n], "one" if n == SHORTER else 2],
        r"batch\[1\] is a str, and in a longer batch a int",
    ),
    "other keys": (lambda n: {"x": x[:n], str(n): 1}, "whose parts have other names"),
    "fewer with more": (lambda n: [x[:n], [1] * (9 - n)], r"batch\[1\] is a list, with 7 parts, and with 6"),
    "other dimensions": (lambda n: x[:n] if n == SHORTER else x[:n, None], "with 2 dimensions, and with 3"),
    "samples and more by name": (
        lambda n: {"k": 1} | dict.fromkeys(range(n), 0),
        "is a dict, with 3 parts, and with 4",
    ),
    "nothing grows": (lambda n: {"x": x[:5]}, "a dict.*has no part that grows with its samples"),
}


@pytest.mark.parametrize("kind", UNCLEAR)
def test_what_does_not_show_its_samples_is_refused_with_what_to_do(kind: str) -> None:
    make, message = UNCLEAR[kind]
    with pytest.raises(ConfigError, match=f"{message}.*collate=.*dataclasses.*__getitem__ that takes a slice"):
        empty_from(make(SHORTER), make(LONGER))


def test_a_nested_tensor_is_refused() -> None:
    ragged = [torch.nested.nested_tensor([torch.ones(2)] * n, layout=torch.jagged) for n in (SHORTER, LONGER)]
    with pytest.raises(ConfigError, match="nested, and torch has no empty one"):
        empty_from(*ragged)


samples = st.recursive(
    st.sampled_from([torch.ones(()), torch.ones(2, 3), "text", 3, 2.5, np.ones(4), np.float64(1)]),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3)
        | st.lists(inner, min_size=1, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from("abc"), inner, min_size=1)
        | st.tuples(inner, st.just("name")).map(lambda pair: Pair(*pair))
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(samples)
def test_what_torch_collates_is_emptied_in_the_shape_of_a_real_batch(sample: Any) -> None:
    empty = empty_from(default_collate([sample] * SHORTER), default_collate([sample] * LONGER))
    real = default_collate([sample] * 5)
    assert type(empty) is type(real)

    def check(empty: Any, real: Any) -> None:
        if isinstance(real, Tensor):
            assert (empty.shape, empty.dtype) == ((0, *real.shape[1:]), real.dtype)
        elif isinstance(real, list | tuple) and real and isinstance(real[0], str):
            assert type(empty) is type(real)
            assert len(empty) == 0
        else:
            assert type(empty) is type(real)
            assert len(empty) == len(real)
            keys = real if isinstance(real, dict) else range(len(real))
            for key in keys:
                check(empty[key], real[key])

    check(empty, real)


# -- one walk ---------------------------------------------------------------------------------------------------------


class Two(tuple[Any, ...]):
    """A tuple that is made of two arguments, and remembers more."""

    def __new__(cls, first: Any, second: Any) -> Two:
        made = super().__new__(cls, (first, second))
        made.note = "kept"
        return made

    note: str


class Encoding(collections.UserDict[str, Any]):
    """Moves itself in place and returns itself, as Hugging Face's BatchEncoding does."""

    def to(self, device: Any) -> Encoding:
        self.data = {key: to_device(value, device) for key, value in self.data.items()}
        return self


class InPlace:
    """Moves itself and returns nothing."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def to(self, device: Any) -> None:
        self.x = to_device(self.x, device)


class Attributes(dict[str, Any]):
    """Shows its keys as attributes, and raises KeyError for others."""

    __getattr__ = dict.__getitem__


LEAVES: dict[str, Any] = {
    "tensor": lambda n: torch.ones(n, 3),
    "time first": lambda n: torch.ones(4, n, dtype=torch.float16),
    "sparse": lambda n: torch.ones(n, 3).to_sparse(),
    "packed": packed,
    "jagged": lambda n: torch.nested.nested_tensor([torch.ones(1 + i % 2) for i in range(n)], layout=torch.jagged),
    "array": lambda n: np.ones((n, 2)),
    "texts": lambda n: ["text"] * n,
    "ragged": lambda n: [torch.ones(i % 3) for i in range(n)],
    "nothing": lambda n: None,
    "text": lambda n: "text",
    "number": lambda n: np.float32(0.5),
}
NODES: dict[str, Any] = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, None, b, 1.5],  # neither two nor three: as many as there are samples is another thing
    "dict": lambda a, b: {"a": a, "b": b},
    "ordered": lambda a, b: collections.OrderedDict(b=b, a=a),
    "default": lambda a, b: collections.defaultdict(list, a=a, b=b),
    "attributes": lambda a, b: Attributes(a=a, b=b),
    "named tuple": Pair,
    "tuple of its own": Two,
    "dataclass": Nested,
    "encoding": lambda a, b: Encoding(a=a, b=b),
    "in place": lambda a, b: InPlace([a, None, b, 2]),
    "structure": lambda a, b: torch.return_types.max((a, b)),
}
trees = st.recursive(
    st.sampled_from(sorted(LEAVES)), lambda inner: st.tuples(st.sampled_from(sorted(NODES)), inner, inner), max_leaves=6
)


def grown(tree: Any, samples: int) -> Any:
    return (
        LEAVES[tree](samples) if isinstance(tree, str) else NODES[tree[0]](*(grown(part, samples) for part in tree[1:]))
    )


def outline(batch: Any) -> list[tuple[str, type]]:
    return [(path, type(leaf)) for path, leaf in leaves(batch)]


@pytest.mark.filterwarnings("ignore:.*prototype stage")
@settings(max_examples=200, deadline=None)
@given(trees, st.integers(4, 7))
def test_who_moves_casts_measures_counts_and_empties_finds_the_same_parts(tree: Any, samples: int) -> None:
    batch = grown(tree, samples)
    kind, before = type(batch), outline(batch)
    assert memory_bytes(batch) > 0
    cast = cast_floating(batch, torch.float64)
    floating = [leaf for _, leaf in leaves(cast) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    assert all(leaf.dtype == torch.float64 for leaf in floating)
    empty = empty_from(*(grown(tree, size) for size in (SHORTER, LONGER))) if shows_samples(tree) else batch
    count = SampleCount(*(grown(tree, size) for size in (SHORTER, LONGER)))
    assert count(batch) == (samples if count.place else None)
    if shows_samples(tree) and count.place:
        assert count(empty) == 0
    moved = to_device(batch, "meta", non_blocking=True)
    assert type(moved) is type(cast) is type(empty) is kind
    assert outline(moved) == outline(cast) == before
    # All but a packed sequence's batch_sizes, which torch keeps on the CPU.
    tensors = [leaf for _, leaf in leaves(moved) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    assert len(tensors) == len(floating)
    assert all(leaf.device.type == "meta" for leaf in tensors)


def shows_samples(tree: Any) -> bool:
    """Whether an empty batch can be made of it: not of nested tensors, nor where nothing grows."""
    names = set(flat(tree))
    return "jagged" not in names and bool(names - {"nothing", "text", "number"} - set(NODES))


def flat(tree: Any) -> list[str]:
    return [tree] if isinstance(tree, str) else [tree[0], *(name for part in tree[1:] for name in flat(part))]


def test_a_tuple_that_takes_other_arguments_keeps_what_it_remembers() -> None:
    moved = to_device(Two(torch.ones(2), "x"), "meta")
    assert (type(moved), moved.note, moved[0].device.type) == (Two, "kept", "meta")


def test_a_sparse_tensor_takes_what_it_keeps() -> None:
    row = torch.zeros(1, 100_000)
    row[0, 7] = 1
    assert memory_bytes(row.to_sparse()) == 2 * 8 + 4

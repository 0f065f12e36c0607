"""A plain state in JSON and safetensors comes back as it was, to the last bit, and nothing else is believed."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from hvdtrain.errors import CheckpointError
from hvdtrain.training.plain_file import Packed, from_json, pack, to_json, unpack
from hvdtrain.training.plain_state import from_plain, to_plain

NUMBERS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters())
STATES = st.recursive(
    NUMBERS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters()), inner, max_size=4)
)


def through_files(state):
    packed = pack(state, "it")
    return unpack(Packed(from_json(to_json(packed.tree), "it"), load(save(packed.tensors))), "it")


def bits(value):
    """A value that is equal only to the same one: NaN to itself, 0.0 not to -0.0 nor to 0."""
    if isinstance(value, list):
        return [bits(item) for item in value]
    if isinstance(value, dict):
        return [(key, bits(item)) for key, item in value.items()]
    if isinstance(value, float):
        return "nan" if math.isnan(value) else struct.pack("d", value)
    return (type(value), value)


@settings(max_examples=100, deadline=None)
@given(STATES)
def test_any_plain_state_comes_back(state):
    assert bits(through_files(state)) == bits(state)


@pytest.mark.parametrize("value", [{"__type__": "tensor", "name": "0"}, {"__type__": "float", "value": "3"}])
def test_a_users_dictionary_that_looks_like_ours_comes_back_as_itself(value):
    assert from_plain(through_files(to_plain({"x": value}, "it")), None, "it") == {"x": value}
    with pytest.raises(CheckpointError, match="not a plain value"):
        pack(value, "it")


DTYPES = [
    dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype) and not str(dtype).startswith("torch.q")
]


@pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:BComplex32")
@pytest.mark.parametrize("dtype", sorted({*DTYPES}, key=str), ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 3)], ids=str)
def test_a_tensor_of_every_type_and_shape_comes_back(dtype, shape):
    try:
        tensor = torch.empty(shape, dtype=dtype)
        tensor.reshape(-1).view(torch.uint8)
    except (RuntimeError, TypeError) as error:
        pytest.skip(f"torch has no such tensors: {error}")
    raw = tensor.reshape(-1).view(torch.uint8)
    raw.copy_(torch.arange(raw.numel()) % (2 if dtype == torch.bool else 251))
    back = through_files([tensor])[0]
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(back.reshape(-1).view(torch.uint8), raw)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(120.0).reshape(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.arange(6.0).reshape(2, 3).t(),
        torch.arange(24).to(torch.complex64).reshape(2, 3, 4).permute(2, 0, 1),
        torch.arange(12.0)[::2],
        torch.ones(1, 3).expand(4, 3),
        torch.ones(3, dtype=torch.complex64).conj(),
        torch.nn.Parameter(torch.ones(2)),
    ],
    ids=["channels last", "transposed", "permuted complex", "sliced", "expanded", "conjugate", "parameter"],
)
def test_a_tensor_comes_back_in_the_order_in_which_it_lay(tensor):
    back = through_files([tensor])[0]
    assert torch.equal(back, tensor.detach())
    assert not back.requires_grad
    if tensor.numel() == tensor.untyped_storage().nbytes() // tensor.element_size():
        assert back.stride() == tensor.stride()


def test_a_tensor_that_stands_in_two_places_comes_back_as_one():
    tensor = torch.ones(3)
    first, second, other = through_files([tensor, {"x": tensor}, torch.ones(3)])
    assert first is second["x"]
    assert first is not other


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: torch.ones(2, 2).to_sparse(), "sparse"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
        (lambda: torch.ones(2, device="meta"), "meta"),
    ],
    ids=["sparse", "quantized", "meta"],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_tensor_that_cannot_be_saved_is_named(make, word):
    with pytest.raises(CheckpointError, match=rf"^it\['a'\]\[0\] cannot be saved: it is a tensor that is .*{word}"):
        pack({"a": [make()]}, "it")


@pytest.mark.parametrize(
    "text", [b"", b"\xff", b"{", b'{"a":1}', b"1e999", b"NaN", b'{\n "a": 1,\n "a": 1\n}\n', b"[" * 10**5]
)
def test_json_that_is_not_ours_is_refused(text):
    with pytest.raises(CheckpointError, match="it is damaged"):
        from_json(text, "it")


@pytest.mark.parametrize(
    "tree",
    [
        {"__type__": "tensor"},
        {"__type__": "tensor", "name": "1"},
        {"__type__": "tensor", "name": ["0"]},
        {"__type__": "tensor", "name": "0", "order": [0, 0]},
        {"__type__": "tensor", "name": "0", "dtype": "save", "shape": [2]},
        {"__type__": "tensor", "name": "0", "dtype": "float64", "shape": [7]},
        {"__type__": "float", "value": "x"},
        {"__type__": "float"},
    ],
    ids=str,
)
def test_a_reference_that_fits_nothing_is_refused(tree):
    with pytest.raises(CheckpointError, match="it is no state of hvdtrain's"):
        unpack(Packed([tree], {"0": torch.ones(2)}), "it")

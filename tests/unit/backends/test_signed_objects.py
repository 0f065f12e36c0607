"""What ranks send each other as objects is unpickled only if a rank of the job has signed it."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdtrain.backends.forms import pickled, unpickled
from hvdtrain.errors import CollectiveError

KEY = b"k" * 32
ran = []


class Hostile:
    def __reduce__(self):
        return ran.append, ("it ran",)


@pytest.mark.parametrize("key", [b"", KEY])
def test_an_object_comes_back(key):
    for content in (None, {"a": [1, 2.5, "x"]}, torch.arange(3)):
        assert str(unpickled(pickled(content, key), key)) == str(content)


@pytest.mark.parametrize("key", [b"", b"other", None])
def test_what_a_stranger_sends_is_not_unpickled(key):
    if key is None:
        buffer = io.BytesIO()
        pickle.dump(Hostile(), buffer)
        data = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    else:
        data = pickled(Hostile(), key)
    with pytest.raises(CollectiveError, match="does not bear this job's signature, and was not unpickled"):
        unpickled(data, KEY)
    assert ran == []


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_changed_bit_is_unpickled(data):
    sent = pickled({"a": 1}, KEY)
    place = data.draw(st.integers(0, len(sent) - 1))
    sent[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(CollectiveError):
        unpickled(sent, KEY)


def test_nothing_is_not_unpickled_either():
    with pytest.raises(CollectiveError):
        unpickled(torch.empty(0, dtype=torch.uint8), KEY)

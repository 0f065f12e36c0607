"""Numbers inside messages: where they lie, and what they come to."""

from __future__ import annotations

import pytest
import torch

from hvdtrain.backends.communicator import Communicator
from hvdtrain.backends.wire import SelfWire
from hvdtrain.horovod import inline
from hvdtrain.horovod.reductions import Adasum, Max, Min, Product, Sum
from hvdtrain.horovod.requests import Request, form


def asked(name, tensor, op=Sum, kind="allreduce"):
    one = form(kind, name, [tensor], op=op, prescale=1.0, postscale=1.0)
    return ((kind, f"name {name}"), one)


def test_what_has_room_lies_one_after_the_other_and_aligned():
    places = inline.Places().of(
        [
            asked("one", torch.ones(1)),
            asked("three bytes", torch.ones(3, dtype=torch.uint8)),
            asked("large", torch.ones(33)),
            asked("adasum", torch.ones(1), Adasum),
            asked("rows", torch.ones(1), kind="reducescatter"),
            asked("empty", torch.ones(0)),
            asked("complex", torch.ones(2, dtype=torch.complex64)),
            asked("double", torch.ones(11, dtype=torch.float64)),
            asked("half", torch.ones(1, dtype=torch.float16)),
        ]
    )
    assert {name.removeprefix("name "): at for (_, name), at in places.items()} == {
        "one": 0,
        "three bytes": 8,
        "complex": 16,
        "double": 32,
        "half": 120,
    }


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool]
)
@pytest.mark.parametrize(
    ("op", "expected"),
    [(Sum, 6), (Min, 1), (Max, 3), (Product, 6)],
    ids=["sum", "min", "max", "product"],
)
def test_what_three_ranks_numbers_come_to(dtype, op, expected):
    communicator = Communicator(SelfWire(torch.device("cpu")))
    _, agreed = asked("x", torch.zeros(2, dtype=dtype), op)
    areas, at = [], []
    for rank in range(3):
        tensor = torch.tensor([rank + 1, 0]).to(dtype)
        request = Request(agreed, tensors=[tensor], outputs=[torch.empty_like(tensor)])
        areas.append(torch.zeros(inline.AREA_BYTES, dtype=torch.uint8))
        at.append(8 * rank)
        inline.put(areas[-1], at[-1], communicator, request)
    inline.finish(communicator, request, areas, at)
    assert request.over
    wanted = torch.tensor([expected, 0]).to(dtype)
    assert torch.equal(request.result, wanted)
    assert request.result is request.outputs[0]

"""Numbers inside messages: where they lie, and what they come to."""

from __future__ import annotations

import pytest
import torch

from hvdtrain.backends.communicator import Communicator
from hvdtrain.backends.wire import SelfWire
from hvdtrain.horovod import inline
from hvdtrain.horovod.reductions import Adasum, Average, Max, Min, Product, Sum
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.uint8])
@pytest.mark.parametrize("op", [Sum, Average])
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_the_short_way_comes_to_the_same_bits_as_the_long_one(dtype, op, ranks):
    communicator = Communicator(SelfWire(torch.device("cpu")))
    agreed = form("allreduce", "x", [torch.zeros(2, 3, dtype=dtype)], op=op, prescale=1.0, postscale=1.0)
    if op == Average and not dtype.is_floating_point:
        assert not inline.Alone.fits(agreed)
        return
    assert inline.Alone.fits(agreed)
    torch.manual_seed(0)
    heard = torch.zeros(ranks, inline.AREA_BYTES, dtype=torch.uint8)
    requests = [
        Request(agreed, [(torch.randn(2, 3) * 50).to(dtype)], [torch.empty(2, 3, dtype=dtype)]) for _ in range(ranks)
    ]
    for row, request in zip(heard, requests, strict=True):
        inline.Alone(agreed, row, heard).put(request)
        by_the_long_way = torch.zeros_like(row)
        inline.put(by_the_long_way, 0, communicator, request)
        assert torch.equal(row, by_the_long_way)
    short = Request(agreed, requests[0].tensors, [torch.empty(2, 3, dtype=dtype)])
    inline.Alone(agreed, torch.zeros(inline.AREA_BYTES, dtype=torch.uint8), heard).finish(short)
    expected = inline.added([request.tensors[0] for request in requests])
    assert torch.equal(short.result, expected / ranks if op == Average else expected)
    if op == Sum:
        inline.finish(communicator, requests[0], heard.unbind(), [0] * ranks)
        assert torch.equal(requests[0].result, short.result)


@pytest.mark.parametrize(
    ("tensor", "changed"),
    [
        (torch.ones(1), {"prescale": 0.5}),
        (torch.ones(1), {"postscale": 2.0}),
        (torch.ones(1), {"op": Max}),
        (torch.ones(1, dtype=torch.float16), {}),
        (torch.ones(1, dtype=torch.bool), {}),
        (torch.ones(0), {}),
        (torch.ones(33), {}),
    ],
)
def test_what_does_not_go_the_short_way(tensor, changed):
    said = {"op": Sum, "prescale": 1.0, "postscale": 1.0, **changed}
    assert not inline.Alone.fits(form("allreduce", "x", [tensor], **said))

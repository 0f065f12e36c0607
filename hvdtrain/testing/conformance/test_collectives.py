"""Every collective, on every dtype and shape, against the same sums done in one place."""

import operator
from functools import reduce

import pytest
import torch

from hvdtrain.backends.communicator import Communicator
from hvdtrain.errors import CollectiveError

pytestmark = pytest.mark.feature("collectives")

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [*FLOATS, torch.int32, torch.int64, torch.uint8, torch.int8, torch.int16, torch.bool]
SHAPES = {
    "vector": lambda t: t.reshape(-1)[:5].clone(),
    "scalar": lambda t: t.reshape(-1)[3].clone(),
    "empty": lambda t: t.reshape(-1)[:0].clone(),
    "transposed": lambda t: t.reshape(2, 3).t(),
}
OPS = ["sum", "mean", "min", "max", "product"]
FOLD = {"sum": operator.add, "mean": operator.add, "min": torch.minimum, "max": torch.maximum, "product": operator.mul}
BOOL_FOLD = {"sum": operator.or_, "max": operator.or_, "min": operator.and_, "product": operator.and_}


def of(rank, dtype, shape="vector"):
    """What ``rank`` brings: small whole numbers, different on each."""
    numbers = (torch.arange(6) * (rank + 2) + rank) % 5 + rank % 2
    return SHAPES[shape](numbers.to(dtype) if dtype != torch.bool else numbers % 2 == 0)


@pytest.mark.costly(60)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_reduce(backend, dtype, shape, op):
    mine = of(backend.rank, dtype, shape)
    before = mine.clone()
    if op == "mean" and dtype not in FLOATS:
        with pytest.raises(CollectiveError, match="mean"):
            backend.all_reduce(mine, op)
        return
    everyone = [of(rank, dtype, shape) for rank in range(backend.world_size)]
    if dtype == torch.bool:
        expected = reduce(BOOL_FOLD[op], everyone)
    elif dtype in FLOATS:
        expected = reduce(FOLD[op], [t.double() for t in everyone])
        expected = (
            (expected / backend.world_size if op == "mean" else expected)
            .to(torch.float32 if dtype != torch.float64 else dtype)
            .to(dtype)
        )
    else:
        expected = reduce(FOLD[op], everyone)
    for result in (backend.all_reduce(mine, op), backend.all_reduce(mine, op, async_op=True).wait()):
        assert result.dtype == dtype
        assert result.shape == mine.shape
        assert result.data_ptr() != mine.data_ptr() or mine.numel() == 0
        torch.testing.assert_close(
            result, expected.reshape(mine.shape), rtol=1e-15 if dtype == torch.float64 else 1e-6, atol=0
        )
    assert torch.equal(mine, before)
    written = backend.all_reduce_(mine, op)
    assert written is mine
    torch.testing.assert_close(
        mine, expected.reshape(mine.shape), rtol=1e-15 if dtype == torch.float64 else 1e-6, atol=0
    )


@pytest.mark.parametrize("op", ["min", "max"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("length", [7, 700])
def test_the_least_and_the_greatest_of_odd_numbers(backend, dtype, op, length):
    """NaN, infinities, subnormal numbers and both signs, whichever rank has them."""
    tiny, large = torch.finfo(dtype).smallest_normal / 4, torch.finfo(dtype).max
    odd = torch.tensor([torch.nan, -torch.inf, torch.inf, -1.5, tiny, -tiny, -large, large, 2.5, -torch.nan, 0.5])
    everyones = [
        odd.double().roll(3 * rank + 1).repeat(length)[: length * backend.world_size].to(dtype)
        for rank in range(backend.world_size)
    ]
    mine, rank = everyones[backend.rank], backend.rank
    expected = reduce(FOLD[op], everyones)
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(backend.all_reduce(mine, op), expected, **same)
    torch.testing.assert_close(backend.all_reduce(mine, op, async_op=True).wait(), expected, **same)
    torch.testing.assert_close(backend.all_reduce_(mine.clone(), op), expected, **same)
    parts = expected.view(backend.world_size, length)
    torch.testing.assert_close(backend.reduce_scatter(list(mine.split(length)), op), parts[rank], **same)
    to_one = backend.reduce(mine, backend.world_size - 1, op)
    assert (to_one is None) == (rank != backend.world_size - 1)
    if to_one is not None:
        torch.testing.assert_close(to_one, expected, **same)


def test_the_mean_of_large_halves_does_not_overflow(backend):
    assert backend.all_reduce(torch.full((3,), 60000.0, dtype=torch.float16), "mean").tolist() == [60000.0] * 3


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64], ids=str)
def test_all_gather_of_shapes_that_differ(backend, dtype):
    def brought(rank):
        return (torch.arange(6 * (rank + 1)) % 2 + rank % 2).to(dtype).reshape(rank + 1, 6)[:, ::2]

    found = backend.all_gather(brought(backend.rank))
    assert len(found) == backend.world_size
    for rank, tensor in enumerate(found):
        assert tensor.dtype == dtype
        assert torch.equal(tensor, brought(rank))


def test_all_gather_of_nothing_from_some(backend):
    found = backend.all_gather(torch.ones(backend.rank, 2))
    assert [tuple(t.shape) for t in found] == [(rank, 2) for rank in range(backend.world_size)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_broadcast_from_each_rank(backend, dtype):
    for src in range(backend.world_size):
        mine = of(backend.rank, dtype, "transposed")
        before = mine.clone()
        assert torch.equal(backend.broadcast(mine, src), of(src, dtype, "transposed"))
        assert torch.equal(mine, before)
        assert backend.broadcast_(mine, src) is mine
        assert torch.equal(mine, of(src, dtype, "transposed"))


@pytest.mark.parametrize("op", ["sum", "mean", "max"])
def test_reduce_scatter(backend, op):
    n = backend.world_size
    mine = [torch.full((2, 2), float(backend.rank + 10 * i), dtype=torch.float64) for i in range(n)]
    values = [rank + 10.0 * backend.rank for rank in range(n)]
    expected = {"sum": sum(values), "mean": sum(values) / n, "max": max(values)}[op]
    torch.testing.assert_close(backend.reduce_scatter(mine, op), torch.full((2, 2), expected, dtype=torch.float64))


def test_reduce_scatter_of_parts_that_differ_in_shape(backend):
    mine = [torch.full((i + 1,), float(backend.rank)) for i in range(backend.world_size)]
    expected = torch.full((backend.rank + 1,), float(sum(range(backend.world_size))))
    assert torch.equal(backend.reduce_scatter(mine), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_all_to_all_of_shapes_that_differ(backend, dtype):
    def sent(src, dst):
        return (torch.arange(src + 2 * dst) % 2 + (src + dst) % 2).to(dtype)

    found = backend.all_to_all([sent(backend.rank, dst) for dst in range(backend.world_size)])
    for src, tensor in enumerate(found):
        assert torch.equal(tensor, sent(src, backend.rank))


def test_objects(backend):
    mine = {"rank": backend.rank, "text": "x" * (backend.rank * 1000), "tensor": torch.ones(backend.rank)}
    found = backend.all_gather_object(mine)
    assert [o["rank"] for o in found] == list(range(backend.world_size))
    assert [len(o["text"]) for o in found] == [1000 * rank for rank in range(backend.world_size)]
    for src in range(backend.world_size):
        assert backend.broadcast_object(backend.rank, src) == src


def test_groups(backend):
    last = backend.world_size - 1
    for ranks in (list(range(backend.world_size)), [last], sorted({0, last})):
        group = backend.group(ranks)
        assert (group is None) == (backend.rank not in ranks)
        if group is not None:
            assert float(group.all_reduce(torch.tensor(float(backend.rank)))) == sum(ranks)
            assert group.all_gather_object(backend.rank) == ranks
            assert group.broadcast_object(backend.rank, len(ranks) - 1) == ranks[-1]


@pytest.mark.parametrize("ranks", [[], [0, 0], [99], [-1]])
def test_a_group_of_impossible_ranks_is_refused(backend, ranks):
    with pytest.raises(CollectiveError, match="ascending ranks"):
        backend.group(ranks)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.all_reduce("abc"), "takes a torch.Tensor"),
        (lambda b: b.all_reduce(torch.eye(2).to_sparse()), "to_dense"),
        (lambda b: b.all_reduce(torch.ones(2), "avg"), "unknown reduction"),
        (lambda b: b.broadcast(torch.ones(2), b.world_size), "no rank of this group"),
        (lambda b: b.all_to_all([torch.ones(2)] * (b.world_size + 1)), "one tensor a rank"),
        (lambda b: b.all_reduce(torch.ones(2, requires_grad=True), "max"), "detach"),
        (lambda b: b.all_reduce_(torch.ones(2, requires_grad=True)), "requires grad"),
    ],
)
def test_a_wrong_call_is_refused_at_any_world_size(backend, call, message):
    with pytest.raises(CollectiveError, match=message):
        call(backend)


@pytest.mark.parametrize("op", ["sum", "mean"])
def test_all_reduce_differentiates_as_in_torch(backend, op):
    n = backend.world_size
    x = torch.full((3,), float(backend.rank + 1), requires_grad=True)
    (backend.all_reduce(x, op) * (backend.rank + 1)).sum().backward()
    total = sum(range(1, n + 1))
    assert torch.allclose(x.grad, torch.full((3,), float(total) if op == "sum" else total / n))


def test_all_gather_differentiates_as_in_torch(backend):
    n = backend.world_size
    x = torch.full((2,), float(backend.rank + 1), requires_grad=True)
    sum((i + 1) * (backend.rank + 1) * part.sum() for i, part in enumerate(backend.all_gather(x))).backward()
    assert torch.allclose(x.grad, torch.full((2,), float((backend.rank + 1) * sum(range(1, n + 1)))))


@pytest.mark.parametrize(
    ("collective", "alone"),
    [
        (lambda b, x: b.all_reduce(x, "mean"), lambda rows: rows.mean(0)),
        (lambda b, x: torch.stack(b.all_gather(x)).mean(0), lambda rows: rows.mean(0)),
        (  # of different lengths
            lambda b, x: torch.cat(b.all_gather(x[: b.rank + 1])).mean(),
            lambda rows: torch.cat([row[: at + 1] for at, row in enumerate(rows)]).mean(),
        ),
    ],
    ids=["all_reduce", "all_gather", "all_gather of different lengths"],
)
def test_gradients_of_collectives_can_be_differentiated_again(backend, collective, alone):
    n = backend.world_size
    x = torch.full((n,), 2.0, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((collective(backend, x) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    rows = torch.full((n, n), 2.0, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(n * (alone(rows) ** 3).sum(), rows, create_graph=True)
    (expected_second,) = torch.autograd.grad(expected.square().sum(), rows)
    torch.testing.assert_close(gradient, expected[backend.rank])
    torch.testing.assert_close(second, expected_second[backend.rank])


def test_collectives_leave_the_random_numbers_alone(backend):
    before = torch.get_rng_state()
    backend.all_reduce(torch.ones(2))
    backend.all_gather_object("x")
    assert torch.equal(torch.get_rng_state(), before)


def test_with_checks_a_mismatch_names_the_ranks(backend):
    if backend.world_size == 1:
        return  # nobody to differ from
    checked = Communicator(backend.wire, None, check=True)
    with pytest.raises(CollectiveError, match=r"different collectives: rank 0.*\(2,\).*rank 1"):
        checked.all_reduce(torch.ones(2 if backend.rank == 0 else 3))
    assert float(checked.all_reduce(torch.ones(()))) == backend.world_size

"""Collectives to and from one rank: every root, dtype and layout; errors on every rank alike; groups."""

import pytest
import torch

from hvdtrain.backends.communicator import Communicator
from hvdtrain.errors import CollectiveError

pytestmark = pytest.mark.feature("collectives")

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
COMPLEX = [torch.complex64, torch.complex128]
OPS = ["sum", "mean", "min", "max", "product"]
FOLD = {"sum": torch.sum, "mean": torch.mean, "min": torch.amin, "max": torch.amax, "product": torch.prod}
BOOL_FOLD = {"sum": torch.any, "max": torch.any, "min": torch.all, "product": torch.all}
LAYOUTS = {
    "vector": lambda t: t[:5].clone(),
    "scalar": lambda t: t[2].clone(),
    "empty": lambda t: t[:0].reshape(2, 0).clone(),
    "transposed": lambda t: t.reshape(2, 3).t(),
    "strided": lambda t: t[::2],
}


def of(rank, dtype, layout="vector"):
    """What ``rank`` brings: whole numbers, different on each."""
    numbers = torch.arange(6) % 3 + rank + 1
    return LAYOUTS[layout]((numbers % 2 == 0) if dtype == torch.bool else numbers.to(dtype))


def ragged(rank, dtype):
    """A tensor whose shape depends on the rank: nothing at all from every third."""
    return (torch.arange(6 * (rank % 3)) % 2 + rank).to(dtype).reshape(rank % 3, 6)[:, ::2]


def same(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.device == expected.device
    assert torch.equal(found, expected)


def reduced(dtype, layout, op, n):
    """The reduction of what ``n`` ranks bring, in one place."""
    everyone = torch.stack([of(rank, dtype, layout) for rank in range(n)])
    if dtype == torch.bool:
        return BOOL_FOLD[op](everyone, dim=0)
    return FOLD[op](everyone.to(torch.float64 if dtype in FLOATS else torch.int64), dim=0).to(dtype)


@pytest.mark.costly(22)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reduce_to_each_rank(backend, dtype, op):
    if op == "mean" and dtype not in FLOATS:
        with pytest.raises(CollectiveError, match="mean"):
            backend.reduce(of(backend.rank, dtype), 0, op)
        return
    rtol = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6, torch.float64: 1e-15}.get(dtype, 0)
    for layout in LAYOUTS:
        mine = of(backend.rank, dtype, layout)
        before = mine.clone()
        for dst in range(backend.world_size):
            found = backend.reduce(mine, dst, op)
            assert torch.equal(mine, before)
            if backend.rank != dst:
                assert found is None
                continue
            assert (found.dtype, found.shape) == (dtype, mine.shape)
            torch.testing.assert_close(found, reduced(dtype, layout, op, backend.world_size), rtol=rtol, atol=0)
            found.zero_()
        assert torch.equal(mine, before)


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_reduce_of_complex_numbers_also_of_conjugate_views(backend, dtype):
    def brought(rank):
        return torch.tensor([1 + 2j, rank - 1j, 3j], dtype=dtype).conj()

    last = backend.world_size - 1
    total = torch.stack([brought(rank) for rank in range(backend.world_size)]).sum(0)
    for op, expected in (("sum", total), ("mean", total / backend.world_size)):
        found = backend.reduce(brought(backend.rank), last, op)
        assert (found is None) == (backend.rank != last)
        if found is not None:
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_and_scatter_carry_every_dtype_and_layout_to_and_from_each_rank(backend, layout):
    n, rank = backend.world_size, backend.rank
    for dtype in [*DTYPES, *COMPLEX]:
        mine = of(rank, dtype, layout)
        before = mine.clone()
        for root in range(n):
            found = backend.gather(mine, root)
            assert (found is None) == (rank != root)
            for src, part in enumerate(found or []):
                same(part, of(src, dtype, layout))
                part.zero_()
            parts = [of(10 * root + dst, dtype, layout) for dst in range(n)] if rank == root else None
            part = backend.scatter(parts, root)
            same(part, of(10 * root + rank, dtype, layout))
            part.zero_()
            for dst, sent in enumerate(parts or []):
                same(sent, of(10 * root + dst, dtype, layout))
        same(mine, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex128], ids=str)
def test_gather_and_scatter_of_shapes_that_differ(backend, dtype):
    n, rank = backend.world_size, backend.rank
    for root in range(n):
        for src, part in enumerate(backend.gather(ragged(rank, dtype), root) or []):
            same(part, ragged(src, dtype))
        parts = [ragged(dst + root, dtype) for dst in range(n)] if rank == root else None
        same(backend.scatter(parts, root), ragged(rank + root, dtype))


def test_gather_of_a_conjugate_view_gives_its_values(backend):
    brought = [torch.tensor([1j, 2.0 - rank * 1j]).conj() for rank in range(backend.world_size)]
    for src, part in enumerate(backend.gather(brought[backend.rank]) or []):
        same(part, brought[src].resolve_conj())
    same(backend.scatter(brought if backend.rank == 0 else None), brought[backend.rank].resolve_conj())


def test_gather_of_objects(backend):
    n, rank = backend.world_size, backend.rank
    mine = {"rank": rank, "text": "x" * (1000 * rank), "tensor": torch.ones(rank)}
    for dst in range(n):
        found = backend.gather_object(mine, dst)
        assert (found is None) == (rank != dst)
        assert [len(o["text"]) for o in found or []] == ([1000 * src for src in range(n)] if rank == dst else [])
        assert found is None or found[rank] is mine


def test_scatter_ignores_what_other_ranks_pass(backend):
    n, rank = backend.world_size, backend.rank
    parts = [torch.tensor([float(dst)]) for dst in range(n)]
    assert float(backend.scatter(parts if rank == n - 1 else "nonsense", n - 1)) == rank


def test_a_large_gather_and_scatter(backend):
    n, rank = backend.world_size, backend.rank
    length = 2_000_003
    for src, part in enumerate(backend.gather(torch.full((length + rank,), float(rank)), n - 1) or []):
        assert part.shape == (length + src,)
        assert part.eq(src).all()
    part = backend.scatter([torch.arange(length) + dst for dst in range(n)] if rank == n - 1 else None, n - 1)
    assert torch.equal(part, torch.arange(length) + rank)


def _groups(n):
    return [list(range(size)) for size in range(1, n + 1)] + [[rank] for rank in range(1, n)] + [[0, n - 1]] * (n > 2)


def test_groups_have_them_all_with_their_own_ranks(backend):
    for ranks in _groups(backend.world_size):
        group = backend.group(ranks)
        assert (group is None) == (backend.rank not in ranks)
        if group is None:
            continue
        own = ranks.index(backend.rank)
        for root in range(len(ranks)):
            total = group.reduce(torch.tensor([backend.rank + 1.0]), root)
            gathered = group.gather(torch.full((own + 1,), backend.rank), root)
            names = group.gather_object(f"rank {backend.rank}", root)
            part = group.scatter([torch.tensor(10 * rank + root) for rank in ranks] if own == root else None, root)
            assert int(part) == 10 * backend.rank + root
            if own == root:
                assert float(total) == sum(rank + 1 for rank in ranks)
                assert [t.tolist() for t in gathered] == [[rank] * (i + 1) for i, rank in enumerate(ranks)]
                assert names == [f"rank {rank}" for rank in ranks]
            else:
                assert (total, gathered, names) == (None, None, None)
        with pytest.raises(CollectiveError, match=f"no rank of this group of {len(ranks)}"):
            group.gather(torch.ones(1), len(ranks))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.reduce("abc"), "reduce takes a torch.Tensor"),
        (lambda b: b.reduce(torch.eye(2).to_sparse()), "to_dense"),
        (lambda b: b.reduce(torch.ones(2), 0, "avg"), "unknown reduction"),
        (lambda b: b.reduce(torch.ones(2), b.world_size), r"reduce: dst=\d is no rank of this group"),
        (lambda b: b.reduce(torch.ones(2), -1), "dst=-1 is no rank of this group"),
        (lambda b: b.reduce(torch.ones(2, dtype=torch.complex64), 0, "product"), "complex"),
        (lambda b: b.reduce(torch.ones(2, requires_grad=True)), r"pass tensor.detach\(\)"),
        (lambda b: b.gather(None), "gather takes a torch.Tensor"),
        (lambda b: b.gather(torch.ones([1] * 9)), "reshape"),
        (lambda b: b.gather(torch.ones(2), b.world_size), r"gather: dst=\d is no rank of this group"),
        (lambda b: b.gather(torch.ones(2, requires_grad=True)), r"pass tensor.detach\(\)"),
        (lambda b: b.gather_object("x", 99), "dst=99 is no rank of this group"),
        (lambda b: b.scatter(None, b.world_size), r"scatter: src=\d is no rank of this group"),
    ],
)
def test_a_wrong_call_is_refused_at_any_world_size(backend, call, message):
    with pytest.raises(CollectiveError, match=message):
        call(backend)
    assert int(backend.all_reduce(torch.tensor(1))) == backend.world_size


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda n: None, "got None"),
        (lambda n: [torch.ones(2)] * (n + 1), "one tensor a rank"),
        (lambda n: [], "one tensor a rank"),
        (lambda n: ["abc"] * n, "takes a torch.Tensor"),
        (lambda n: [torch.ones(2, requires_grad=True)] * n, r"pass tensor.detach\(\)"),
        (lambda n: [torch.eye(2).to_sparse()] * n, "to_dense"),
    ],
    ids=["None", "too many", "none", "text", "requires grad", "sparse"],
)
def test_what_the_source_of_a_scatter_holds_wrongly_is_an_error_on_every_rank(backend, wrong, message):
    for src in range(backend.world_size):
        with pytest.raises(CollectiveError, match=message):
            backend.scatter(wrong(backend.world_size) if backend.rank == src else None, src)
    assert int(backend.all_reduce(torch.tensor(1))) == backend.world_size


def test_a_scatter_of_dtypes_that_differ_is_an_error_on_every_rank(backend):
    n = backend.world_size
    parts = [torch.ones(1, dtype=torch.float64 if dst else torch.float32) for dst in range(n)]
    if n > 1:
        with pytest.raises(CollectiveError, match="one dtype"):
            backend.scatter(parts if backend.rank == 0 else None)
    assert int(backend.all_reduce(torch.tensor(1))) == n


@pytest.mark.parametrize("what", ["dtypes", "dst"])
def test_a_gather_that_does_not_fit_is_an_error_on_every_rank_that_names_the_ranks(backend, what):
    n = backend.world_size
    if n == 1:
        return  # nobody to differ from
    odd = backend.rank == n - 1
    dtype = torch.float64 if odd and what == "dtypes" else torch.float32
    with pytest.raises(CollectiveError, match=rf"gather: {what} differs? between ranks: rank 0.*; rank {n - 1}: "):
        backend.gather(torch.ones(2, dtype=dtype), 1 if odd and what == "dst" else 0)
    assert int(backend.all_reduce(torch.tensor(1))) == n


MISMATCHES = {
    "reduce to others": lambda c, odd: c.reduce(torch.ones(2), int(odd)),
    "reduce by others": lambda c, odd: c.reduce(torch.ones(2), 0, "max" if odd else "sum"),
    "reduce of others": lambda c, odd: c.reduce(torch.ones(3 if odd else 2)),
    "gather to others": lambda c, odd: c.gather(torch.ones(2), int(odd)),
    "scatter from others": lambda c, odd: c.scatter([torch.ones(2)] * c.wire.size, int(odd)),
    "reduce and gather": lambda c, odd: c.gather(torch.ones(2)) if odd else c.reduce(torch.ones(2)),
    "reduce and all-reduce": lambda c, odd: c.all_reduce(torch.ones(2)) if odd else c.reduce(torch.ones(2)),
}


@pytest.mark.parametrize("kind", MISMATCHES)
def test_with_checks_any_mismatch_is_an_error_on_every_rank_that_names_the_odd_one(backend, kind):
    n = backend.world_size
    checked = Communicator(backend.wire, None, check=True)
    if n > 1:
        with pytest.raises(CollectiveError, match=rf"different collectives:.*rank {n - 1}:"):
            MISMATCHES[kind](checked, backend.rank == n - 1)
    found = checked.gather(torch.tensor(backend.rank), n - 1)
    assert found is None or [int(t) for t in found] == list(range(n))
    total = checked.reduce(torch.tensor(backend.rank))
    assert total is None or int(total) == sum(range(n))
    assert int(checked.scatter([torch.tensor(dst) for dst in range(n)])) == backend.rank

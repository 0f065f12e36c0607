"""Each operation of c10d, over dtypes and shapes, against what torch computes from all ranks' tensors on one."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]
COMPLEX = [torch.complex64, torch.complex128]
EVERY = [*FLOATS, *INTEGERS, *COMPLEX, torch.bool]
SHAPES = [(), (0,), (1,), (5,), (3, 4), (2, 0, 3), (1031,)]
Op = dist.ReduceOp


def of(rank, shape, dtype):
    """A tensor that differs from rank to rank and from place to place, small enough for 8 bits and exact in 16."""
    count = torch.Size(shape).numel()
    values = (torch.arange(count) * 7 + 3 * rank) % 5 + rank % 2
    if dtype == torch.bool:
        return (values % 3 == rank % 3).reshape(shape)
    found = values.to(dtype).reshape(shape)
    return found * (1 + 0.5j) if dtype.is_complex else found


def all_of(size, shape, dtype):
    return [of(rank, shape, dtype) for rank in range(size)]


def reduced(tensors, op, dtype):
    if dtype == torch.bool:
        sums = {"SUM": torch.logical_or, "MAX": torch.logical_or, "BOR": torch.logical_or, "BXOR": torch.logical_xor}
        return functools.reduce(sums.get(op, torch.logical_and), tensors)
    wide = [t.float() if dtype in (torch.float16, torch.bfloat16) else t for t in tensors]
    functions = {
        "SUM": torch.add, "AVG": torch.add, "PRODUCT": torch.mul, "MIN": torch.minimum, "MAX": torch.maximum,
        "BAND": torch.bitwise_and, "BOR": torch.bitwise_or, "BXOR": torch.bitwise_xor,
    }  # fmt: skip
    total = functools.reduce(functions[op], wide)
    return (total / len(tensors) if op == "AVG" else total).to(dtype)


def cases():
    for dtype in EVERY:
        ops = ["SUM"]
        if not dtype.is_complex:  # torch itself refuses the others
            ops += ["PRODUCT", "MIN", "MAX"]
        if dtype.is_floating_point or dtype.is_complex:
            ops += ["AVG"]
        else:
            ops += ["BAND", "BOR", "BXOR"]
        yield from ((dtype, op) for op in ops)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "op"), list(cases()), ids=str)
def test_all_reduce(rank, size, dtype, op, shape):
    tensor = of(rank, shape, dtype)
    dist.all_reduce(tensor, getattr(Op, op))
    torch.testing.assert_close(tensor, reduced(all_of(size, shape, dtype), op, dtype))


@pytest.mark.parametrize(("dtype", "op"), [(torch.int32, "AVG"), (torch.float32, "BOR")], ids=str)
def test_what_is_not_defined_is_refused_before_anything_is_sent(dtype, op):
    with pytest.raises(TypeError, match=rf"{op} of torch\.\w+ is not defined; .* there are SUM"):
        dist.all_reduce(torch.ones(3, dtype=dtype), getattr(Op, op))
    with pytest.raises(TypeError, match=r"cannot reduce torch\.float8_e5m2; it reduces float32"):
        dist.all_reduce(torch.ones(3).to(torch.float8_e5m2))


def test_a_premultiplied_sum(rank, size):
    op = torch._C._distributed_c10d._make_nccl_premul_sum(0.5)
    for dtype in FLOATS:
        tensor = of(rank, (7,), dtype)
        dist.all_reduce(tensor, op)
        expected = sum(t.double() * 0.5 for t in all_of(size, (7,), dtype)).to(dtype)
        torch.testing.assert_close(tensor, expected)


def test_halves_are_summed_in_float32_and_rounded_once(rank, size):
    # 2049 ones of fp16 cannot be counted by adding ones: after 2048 each sum rounds back.
    tensor = torch.full((3,), 2048.0 if rank == 0 else 1.0, dtype=torch.float16)
    dist.all_reduce(tensor)
    assert tensor.tolist() == [torch.tensor(2048.0 + size - 1).half().item()] * 3
    big = torch.full((3,), 60000.0, dtype=torch.float16)
    dist.all_reduce(big, Op.AVG)
    assert big.tolist() == [torch.tensor(60000.0).half().item()] * 3


@pytest.mark.parametrize("op", ["SUM", "AVG", "PRODUCT", "MIN", "MAX"])
def test_halves_go_in_ragged_pieces(rank, size, op, monkeypatch):
    monkeypatch.setattr("hvdtrain.mpi.operations._HALVES_BYTES", 64)
    expected = reduced(all_of(size, (103,), torch.bfloat16), op, torch.bfloat16)
    tensor = of(rank, (103,), torch.bfloat16)
    dist.all_reduce(tensor, getattr(Op, op))
    torch.testing.assert_close(tensor, expected)
    tensor = of(rank, (103,), torch.bfloat16)
    dist.reduce(tensor, 0, getattr(Op, op))
    torch.testing.assert_close(tensor, of(rank, (103,), torch.bfloat16) if rank else expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("count", [2**19 - 1, 2**21 + 17])
def test_long_tensors_go_in_pieces(rank, size, dtype, count):
    tensor = of(rank, (count,), dtype)
    dist.all_reduce(tensor)
    torch.testing.assert_close(tensor, reduced(all_of(size, (count,), dtype), "SUM", dtype))
    to_one, root = of(rank, (count,), dtype), size - 1
    dist.reduce(to_one, root)
    torch.testing.assert_close(to_one, tensor if rank == root else of(rank, (count,), dtype))
    out = torch.empty(count, dtype=dtype)
    whole = torch.cat([of(rank + part, (count,), dtype) for part in range(size)])
    dist.reduce_scatter_tensor(out, whole)
    expected = reduced([of(other + rank, (count,), dtype) for other in range(size)], "SUM", dtype)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", [*EVERY, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_only_moves(rank, size, dtype, shape):
    def made(of_rank):
        return (
            of(of_rank, shape, torch.float32).to(dtype)
            if dtype.itemsize == 1 and dtype.is_floating_point
            else of(of_rank, shape, dtype)
        )

    everyone = [made(other) for other in range(size)]

    def same(found, expected):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert found.tolist() == expected.tolist()

    root = size - 1
    tensor = made(rank)
    dist.broadcast(tensor, root)
    same(tensor, everyone[root])

    outs = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(outs, made(rank))
    for out, expected in zip(outs, everyone, strict=True):
        same(out, expected)

    whole = torch.empty((size, *shape), dtype=dtype)
    dist.all_gather_into_tensor(whole, made(rank))
    for out, expected in zip(whole, everyone, strict=True):
        same(out, expected)

    outs = [torch.empty_like(tensor) for _ in range(size)] if rank == root else None
    dist.gather(made(rank), outs, dst=root)
    for out, expected in zip(outs or [], everyone, strict=False):
        same(out, expected)

    out = torch.empty_like(tensor)
    dist.scatter(out, everyone if rank == root else None, src=root)
    same(out, everyone[rank])


@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_reduce_and_reduce_scatter(rank, size, dtype):
    everyone = all_of(size, (4, 3), dtype)
    tensor = everyone[rank].clone()
    dist.reduce(tensor, dst=0)
    torch.testing.assert_close(tensor, reduced(everyone, "SUM", dtype) if rank == 0 else everyone[rank])

    out = torch.empty((4, 3), dtype=dtype)
    parts = [of(rank + part, (4, 3), dtype) for part in range(size)]
    dist.reduce_scatter(out, parts)
    expected = reduced([of(other + rank, (4, 3), dtype) for other in range(size)], "SUM", dtype)
    torch.testing.assert_close(out, expected)
    out = torch.empty((4, 3), dtype=dtype)
    dist.reduce_scatter_tensor(out, torch.stack(parts))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_all_to_all(rank, size, dtype):
    out = torch.empty((size, 3), dtype=dtype)
    dist.all_to_all_single(out, torch.stack([of(rank + 10 * to, (3,), dtype) for to in range(size)]))
    expected = torch.stack([of(other + 10 * rank, (3,), dtype) for other in range(size)])
    assert out.tolist() == expected.tolist()

    send, receive = [to + 1 for to in range(size)], [rank + 1] * size  # rank r gets r + 1 rows of everybody
    rows = torch.cat([of(rank + to, (to + 1, 2), dtype) for to in range(size)])
    out = torch.empty((sum(receive), 2), dtype=dtype)
    dist.all_to_all_single(out, rows, receive, send)
    assert out.tolist() == torch.cat([of(other + rank, (rank + 1, 2), dtype) for other in range(size)]).tolist()

    outs = [torch.empty((other + rank,), dtype=dtype) for other in range(size)]
    dist.all_to_all(outs, [of(rank, (to + rank,), dtype) for to in range(size)])
    for other, out in enumerate(outs):
        assert out.tolist() == of(other, (other + rank,), dtype).tolist()


def test_parts_of_different_sizes_are_gathered_and_scattered(rank, size):
    outs = [torch.empty(other + 1) for other in range(size)]
    dist.all_gather(outs, torch.full((rank + 1,), float(rank)))
    assert [out.tolist() for out in outs] == [[float(other)] * (other + 1) for other in range(size)]
    out = torch.empty(rank + 1)
    dist.reduce_scatter(out, [torch.full((part + 1,), float(rank)) for part in range(size)])
    assert out.tolist() == [float(sum(range(size)))] * (rank + 1)


@pytest.mark.parametrize(("dtype", "op"), list(cases()), ids=str)
def test_parts_of_different_sizes_are_reduced_and_scattered_in_pieces(rank, size, dtype, op, monkeypatch):
    monkeypatch.setattr("hvdtrain.mpi.operations.PIECE_BYTES", 40 * size)
    monkeypatch.setattr("hvdtrain.mpi.operations._HALVES_BYTES", 40 * size)
    lengths = [0 if part == 0 else 31 * part for part in range(size)]
    parts = [of(rank + part, (length,), dtype) for part, length in enumerate(lengths)]
    before = [part.clone() for part in parts]
    out = torch.empty(lengths[rank], dtype=dtype)
    dist.reduce_scatter(out, parts, getattr(Op, op))
    expected = reduced([of(other + rank, (lengths[rank],), dtype) for other in range(size)], op, dtype)
    torch.testing.assert_close(out, expected)
    assert all(torch.equal(part, old) for part, old in zip(parts, before, strict=True))


def test_coalesced_operations(rank, size):
    tensors = [torch.full((3,), float(rank)), torch.full((2, 2), rank), torch.full((5,), float(rank) + 1)]
    with dist._coalescing_manager(async_ops=True) as manager:
        for tensor in tensors:
            dist.all_reduce(tensor)
    manager.wait()
    total = sum(range(size))
    assert [t.flatten()[0].item() for t in tensors] == [total, total, total + size]
    outs = [torch.empty(size * 2), torch.empty(size * 3)]
    with dist._coalescing_manager(async_ops=True) as manager:
        for out in outs:
            dist.all_gather_into_tensor(out, torch.full((len(out) // size,), float(rank)))
    manager.wait()
    assert [out.tolist() for out in outs] == [[float(r) for r in range(size) for _ in range(n)] for n in (2, 3)]
    outs = [torch.empty(2), torch.empty(3)]
    with dist._coalescing_manager(async_ops=True) as manager:
        for out in outs:
            dist.reduce_scatter_tensor(out, torch.full((len(out) * size,), float(rank)))
    manager.wait()
    assert [out.tolist() for out in outs] == [[float(total)] * 2, [float(total)] * 3]


def test_tensors_that_are_not_contiguous(rank, size):
    base = torch.zeros(4, 6)
    view = base.t()[1:3]
    view.fill_(float(rank + 1))
    dist.all_reduce(view)
    total = size * (size + 1) / 2
    assert view.tolist() == [[total] * 4] * 2
    assert base[:, 0].tolist() == [0.0] * 4  # its neighbours are untouched
    dist.broadcast(view, 0)
    outs = [torch.empty(4, 2).t() for _ in range(size)]
    dist.all_gather(outs, view * (rank + 1))
    assert [out[0, 0].item() for out in outs] == [total * (r + 1) for r in range(size)]


def test_a_tensor_that_requires_grad_and_its_graph_are_left_alone(rank, size):
    parameter = torch.nn.Parameter(torch.ones(3))
    dist.broadcast(parameter, 0)
    dist.all_reduce(parameter)
    assert parameter.tolist() == [float(size)] * 3
    assert parameter.grad_fn is None


def test_sparse_tensors_are_summed(rank, size):
    tensor = torch.sparse_coo_tensor([[rank, rank + 1]], [1.0, 2.0], (size + 1,), check_invariants=True)
    dist.all_reduce(tensor)
    expected = torch.zeros(size + 1)
    for other in range(size):
        expected[other] += 1
        expected[other + 1] += 2
    assert tensor.to_dense().tolist() == expected.tolist()
    with pytest.raises(TypeError, match="MPI moves dense tensors"):
        dist.broadcast(tensor, 0)


def test_objects(rank, size):
    found = [None] * size
    dist.all_gather_object(found, {"rank": rank, "text": "x" * 1000 * rank})
    assert [each["rank"] for each in found] == list(range(size))
    box = [f"from {rank}"]
    dist.broadcast_object_list(box, src=size - 1)
    assert box == [f"from {size - 1}"]
    mine = [None]
    dist.scatter_object_list(mine, [f"for {r}" for r in range(size)] if rank == 0 else None, src=0)
    assert mine == [f"for {rank}"]

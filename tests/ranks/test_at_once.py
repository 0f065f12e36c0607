"""Blocking calls, which an idle group performs in the caller's own thread, beside and between those that its lane performs."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist


@pytest.mark.parametrize("count", [1, 160, 161, 5000, 300_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.float16])
def test_a_sum_is_the_same_again_and_again_and_whichever_way_it_goes(rank, size, count, dtype):
    expected = torch.full((count,), size * (size + 1) // 2, dtype=dtype)
    for turn in range(4):
        blocking, queued = (torch.full((count,), rank + 1, dtype=dtype) for _ in range(2))
        if turn == rank:
            time.sleep(0.005)  # the others hand their wait over to the lane
        dist.all_reduce(blocking)
        dist.all_reduce(queued, async_op=True).wait()
        assert torch.equal(blocking, expected)
        assert torch.equal(queued, expected)


@pytest.mark.parametrize("op", [dist.ReduceOp.AVG, dist.ReduceOp.MIN, dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_small_reductions(rank, size, op, dtype):
    if op == dist.ReduceOp.AVG and not dtype.is_floating_point:
        return
    values = torch.arange(1, size + 1)
    expected = {
        dist.ReduceOp.AVG: values.double().mean(), dist.ReduceOp.MIN: values.min(),
        dist.ReduceOp.MAX: values.max(), dist.ReduceOp.PRODUCT: values.prod(),
    }[op]  # fmt: skip
    for _ in range(3):
        tensor = torch.full((2, 3), rank + 1, dtype=dtype)
        dist.all_reduce(tensor, op)
        assert torch.equal(tensor, torch.full((2, 3), expected.item(), dtype=dtype))


def test_a_float_sum_has_the_same_bits_on_every_rank(rank, size):
    for count in (3, 5000):
        torch.manual_seed(rank)
        tensor = torch.randn(count)
        everyone = [torch.empty(count) for _ in range(size)]
        dist.all_gather(everyone, tensor)
        for _ in range(2):
            total = tensor.clone()
            dist.all_reduce(total)
            found = [torch.empty(count) for _ in range(size)]
            dist.all_gather(found, total)
            assert all(torch.equal(one, total) for one in found)
            torch.testing.assert_close(total, sum(everyone[1:], everyone[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("count", [2, 5000])
def test_what_is_not_finite_is_summed_without_a_word(rank, size, dtype, count):
    if size == 1:
        return
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
        tensor = torch.full((count,), torch.inf if rank else -torch.inf, dtype=dtype)
        tensor[0] = torch.finfo(dtype).max
        dist.all_reduce(tensor, op)
        assert tensor[1:].isnan().all()
        assert torch.isinf(tensor[0]) or dtype == torch.float16  # which is averaged in float32


def test_blocking_calls_come_after_those_that_were_queued_before(rank, size):
    for _ in range(20):
        tensor = torch.full((50_000,), float(rank + 1))
        work = dist.all_reduce(tensor, async_op=True)
        small = torch.ones(2)
        dist.all_reduce(small)
        dist.broadcast(tensor, 0)  # of the sum
        work.wait()
        total = size * (size + 1) / 2
        assert small.tolist() == [size, size]
        assert torch.equal(tensor, torch.full((50_000,), total))


def test_small_gathers(rank, size):
    for count in (1, 80, 81):
        for _ in range(3):
            out = torch.empty(size * count, dtype=torch.int64)
            dist.all_gather_into_tensor(out, torch.full((count,), rank))
            assert out.tolist() == [r for r in range(size) for _ in range(count)]


def test_what_lies_oddly_is_reduced_where_it_lies(rank, size):
    for _ in range(3):
        columns = torch.zeros(4, 3)
        dist.all_reduce(columns[:, 1].fill_(1.0))
        assert columns[:, 1].tolist() == [size] * 4
        assert columns[:, 0].tolist() == [0.0] * 4
        leaf = torch.ones(3, requires_grad=True)
        dist.all_reduce(leaf)
        assert leaf.tolist() == [size] * 3
        assert leaf._version == 0


def test_ranks_that_block_in_different_calls_are_told_so(rank, size):
    if size == 1:
        return
    for tensor in (torch.ones(2), torch.ones(3)):
        for _ in range(2):  # known, so that they go the short way
            dist.all_reduce(tensor)
    with pytest.raises(dist.DistBackendError, match=r"did not call the same operation.*\(2,\).*\(3,\)"):
        dist.all_reduce(torch.ones(3 if rank else 2))
    again = torch.ones(2)
    dist.all_reduce(again)
    assert again.tolist() == [size, size]


def test_threads_that_block_in_groups_of_their_own(rank, size):
    groups = [dist.new_group(list(range(size))) for _ in range(3)]

    def work(group: object) -> float:
        tensor = torch.ones(4)
        for _ in range(50):
            dist.all_reduce(tensor.fill_(1.0), group=group)
        return float(tensor[0])

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, groups)) == [size] * 3
    for group in groups:
        dist.destroy_process_group(group)

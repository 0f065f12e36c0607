"""What the operations give, for every dtype, shape, order and mistake."""

from __future__ import annotations

import random
import threading

import pytest
import torch

import hvdtrain.horovod as hvd

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
WHOLE = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
SHAPES = [(), (0,), (1,), (3, 4), (300_000,)]
OPS = {
    hvd.Sum: lambda t: t.sum(0),
    hvd.Min: lambda t: t.amin(0),
    hvd.Max: lambda t: t.amax(0),
    hvd.Product: lambda t: t.prod(0),
}


def of_rank(rank, shape, dtype):
    count = int(torch.tensor(shape).prod()) if shape else 1
    return ((torch.arange(count) % 5 + rank + 1).reshape(shape)).to(dtype)


def everyones(size, shape, dtype):
    return torch.stack([of_rank(rank, shape, torch.float64) for rank in range(size)])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("length", [4, 4000])
def test_a_nan_of_any_rank_is_the_least_and_the_greatest(rank, size, dtype, length):
    everyones = torch.stack([torch.arange(length) % 7 - 3.0 + each for each in range(size)]).to(dtype)
    for each in range(size):
        everyones[each, each] = torch.nan
    tensors = [everyones[rank], everyones[rank] * 2]
    for op in (hvd.Min, hvd.Max):
        expected = OPS[op](everyones)
        torch.testing.assert_close(hvd.allreduce(everyones[rank], op=op), expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(
            hvd.allreduce_(everyones[rank].clone(), op=op), expected, rtol=0, atol=0, equal_nan=True
        )
        grouped = hvd.grouped_allreduce(tensors, op=op)
        torch.testing.assert_close(grouped, [expected, expected * 2], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [*FLOATS, *WHOLE])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_allreduce_of_every_dtype_and_shape(rank, size, dtype, shape):
    mine = of_rank(rank, shape, dtype)
    for op, expected in OPS.items():
        result = hvd.allreduce(mine, op=op)
        assert result.dtype == dtype
        assert torch.equal(result, expected(everyones(size, shape, dtype)).to(dtype))
    assert torch.equal(mine, of_rank(rank, shape, dtype))
    mean = everyones(size, shape, dtype).sum(0) / size
    assert torch.allclose(
        hvd.allreduce(mine).double(),
        (mean if dtype in FLOATS else mean.trunc()),
        rtol=1e-2 if dtype == torch.bfloat16 else 1e-3,
    )
    assert hvd.allreduce_(mine, op=hvd.Sum) is mine
    assert torch.equal(mine, everyones(size, shape, dtype).sum(0).to(dtype))


def test_bool_and_complex(rank, size):
    flags = torch.tensor([rank == 0, True, False])
    assert hvd.allreduce(flags, op=hvd.Sum).tolist() == [True, True, False]
    assert hvd.allreduce(flags, op=hvd.Min).tolist() == [size == 1, True, False]
    assert hvd.allgather(flags).numel() == 3 * size
    assert torch.equal(hvd.broadcast(flags, 0), torch.tensor([True, True, False]))
    with pytest.raises(ValueError, match="bool is undefined"):
        hvd.allreduce(flags)
    assert hvd.allreduce(torch.tensor([1j * (rank + 1)]), op=hvd.Sum).tolist() == [1j * sum(range(1, size + 1))]


def test_averages_neither_overflow_nor_drift(size):
    assert hvd.allreduce(torch.full((4,), 60000.0, dtype=torch.float16)).tolist() == [60000.0] * 4
    assert hvd.allreduce(torch.full((4,), 49)).tolist() == [49] * 4
    assert hvd.allreduce(torch.full((4,), -7)).tolist() == [-7] * 4


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("count", [3, 300])  # in the message, and beside it
def test_an_average_of_integers_neither_overflows_nor_is_cut_twice(rank, size, dtype, count):
    most = torch.iinfo(dtype).max
    large, small = torch.full((count,), most - rank, dtype=dtype), torch.full((count,), 3 + rank, dtype=dtype)
    expected = int(most - (size - 1) / 2)
    for average in (hvd.allreduce(large), *hvd.grouped_allreduce([large, large]), hvd.reducescatter(large)):
        assert average.dtype == dtype
        assert set(average.tolist()) <= {expected}  # of few rows some ranks get none
    assert set(hvd.allreduce(small, postscale_factor=0.3).tolist()) == {int((3 + (size - 1) / 2) * 0.3)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [8191, 8192, 100_003])  # up to 16 KiB in float32
def test_halves_are_added_up_in_float32_and_rounded_once(rank, size, dtype, count):
    torch.manual_seed(1)
    everyone = torch.randn(size, count).mul_(300).to(dtype)
    total = everyone[0].float()
    for one in everyone[1:]:
        total += one
    mine = everyone[rank].clone()
    assert torch.equal(hvd.allreduce(mine, op=hvd.Sum), total.to(dtype)) or size > 2  # else the order is the engine's
    torch.testing.assert_close(hvd.allreduce(mine, op=hvd.Sum), total.to(dtype))
    torch.testing.assert_close(hvd.allreduce(mine, postscale_factor=2.0), (total / size * 2).to(dtype))
    torch.testing.assert_close(hvd.allreduce(mine, op=hvd.Max), everyone.amax(0), rtol=0, atol=0)
    large, small = hvd.grouped_allreduce([mine, mine[:5]], op=hvd.Sum)
    torch.testing.assert_close(large, total.to(dtype))
    torch.testing.assert_close(small, total[:5].to(dtype))
    assert torch.equal(mine, everyone[rank])
    kept = hvd.reducescatter(mine, op=hvd.Sum)
    begin = rank * (count // size) + min(rank, count % size)
    torch.testing.assert_close(kept, total[begin : begin + len(kept)].to(dtype))
    assert hvd.allreduce(torch.full((count,), 60000.0, dtype=dtype)).amin() > 59000
    assert hvd.allreduce_(mine.view(-1, 1), op=hvd.Sum).data_ptr() == mine.data_ptr()
    torch.testing.assert_close(mine, total.to(dtype))
    assert hvd.join() in range(size)


def test_a_rank_that_has_joined_adds_nothing_to_halves(rank, size):
    if rank:
        present = hvd.allreduce(torch.ones(20_000, dtype=torch.float16), op=hvd.Sum, name="halves")
        assert present.tolist() == [size - 1] * 20_000
    hvd.join()


def test_float16_halves_what_is_sent(rank, size):
    if size == 1:
        pytest.skip("nothing is sent")
    traffic = hvd.state.controller_of(hvd.global_process_set, "a test")._communicator.wire.traffic

    def sent(work):
        hvd.barrier()
        before = traffic.sent_bytes
        work()
        return traffic.sent_bytes - before

    def step(compression):
        model = torch.nn.Linear(300, 500, bias=False)
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression=compression
        )

        def work():
            model(torch.ones(2, 300)).sum().backward()
            optimizer.step()

        return work

    full = 2 * 600_000 * (size - 1) / size
    rounds = 8_000 * size  # what matching takes
    for compression, expected in ((hvd.Compression.none, full), (hvd.Compression.fp16, full / 2)):
        assert expected <= sent(step(compression)) <= expected + rounds
        tensor = torch.ones(150_000)
        assert expected <= sent(lambda c=compression, t=tensor: hvd.allreduce(t, compression=c)) <= expected + rounds
    half = hvd.Compression.fp16
    assert sent(lambda: hvd.reducescatter(torch.ones(150_000), compression=half)) <= full / 4 + rounds
    assert sent(lambda: hvd.grouped_allreduce([torch.ones(75_000)] * 2, compression=half)) <= full / 2 + rounds


def test_factors_before_and_after(rank, size):
    total = sum(range(1, size + 1))
    scaled = hvd.allreduce(torch.tensor([rank + 1.0]), op=hvd.Sum, prescale_factor=0.5, postscale_factor=4.0)
    assert scaled.tolist() == [2.0 * total]
    assert hvd.allreduce(torch.tensor([3]), op=hvd.Sum, prescale_factor=0.5).tolist() == [size]  # 1.5 is cut to 1
    assert hvd.allreduce(torch.tensor([rank + 1.0]), op=hvd.Average, postscale_factor=2.0).item() == pytest.approx(
        2 * total / size
    )


def test_layouts_that_horovod_refuses(rank, size):
    wide = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last) * (rank + 1)
    assert torch.equal(hvd.allreduce(wide, op=hvd.Max), torch.full((2, 3, 4, 5), float(size)))
    turned = torch.arange(6.0).view(2, 3).t()
    hvd.allreduce_(turned, op=hvd.Sum)
    assert torch.equal(turned, torch.arange(6.0).view(2, 3).t() * size)
    assert torch.equal(hvd.broadcast(torch.arange(6.0).view(2, 3).t() + rank, 0), torch.arange(6.0).view(2, 3).t())


def test_grouped_forms_are_one_operation(rank, size):
    tensors = [
        torch.full((n,), rank + 1.0, dtype=dtype)
        for n, dtype in ((1, torch.float32), (5, torch.float64), (3, torch.float16))
    ]
    total = sum(range(1, size + 1))
    for one in hvd.grouped_allreduce(tensors, op=hvd.Sum, name="several"):
        assert one.tolist() == [total] * one.numel()
    hvd.grouped_allreduce_(tensors, op=hvd.Sum)
    assert tensors[1].tolist() == [total] * 5
    gathered = hvd.grouped_allgather([torch.full((rank + 1,), rank), torch.full((1, 2), rank)])
    assert isinstance(gathered, tuple)
    assert gathered[0].tolist() == [r for r in range(size) for _ in range(r + 1)]
    assert gathered[1].shape == (size, 2)
    kept = hvd.grouped_reducescatter([torch.arange(2.0 * size), torch.ones(size)], op=hvd.Sum)
    assert kept[0].tolist() == [2.0 * rank * size, (2.0 * rank + 1) * size]


def test_rows_that_differ_between_ranks(rank, size):
    gathered = hvd.allgather(torch.full((rank, 2), rank))  # rank 0 has none
    assert gathered.tolist() == [[r, r] for r in range(size) for _ in range(r)]
    splits = [(rank + to) % 3 for to in range(size)]
    sent = torch.cat([torch.full((rows, 2), 10 * rank + to) for to, rows in enumerate(splits)])
    received, counts = hvd.alltoall(sent, splits=torch.tensor(splits))
    assert counts.tolist() == [(source + rank) % 3 for source in range(size)]
    assert received.tolist() == [[10 * source + rank] * 2 for source in range(size) for _ in range((source + rank) % 3)]
    mine = hvd.reducescatter(torch.arange(2.0 * size + 1) * (rank + 1), op=hvd.Sum)
    begin = 2 * rank + min(rank, 1)
    assert mine.tolist() == [i * sum(range(1, size + 1)) for i in range(begin, begin + 2 + (rank == 0))]


@pytest.mark.parametrize("wrong", ["too many", "negative", "not whole", "too large"])
def test_splits_that_do_not_fit(size, wrong):
    splits = {
        "too many": [0] * (size + 1),
        "negative": [-1] * size,
        "not whole": torch.ones(size),
        "too large": [5] * size,
    }[wrong]
    with pytest.raises(ValueError, match="splits"):
        hvd.alltoall(torch.zeros(2), splits=splits)


def test_rows_that_no_split_names_stay_here(rank, size):
    x = torch.ones(size + 2, requires_grad=True)
    received, counts = hvd.alltoall(x, splits=[1] * size)
    assert (received.numel(), counts.tolist()) == (size, [1] * size)
    received.sum().backward()
    assert x.grad.tolist() == [1.0] * size + [0.0] * 2


@pytest.mark.parametrize("operation", [hvd.allgather_async, hvd.reducescatter_async, hvd.alltoall_async])
def test_scalars_have_no_rows(operation):
    with pytest.raises(hvd.HorovodInternalError, match="got a scalar"):
        operation(torch.tensor(1.0))


def test_any_order_from_any_thread(rank, size):
    total = sum(range(1, size + 1))
    wrong = []

    def work(thread):
        order = list(range(12))
        random.Random(100 * rank + thread).shuffle(order)
        begun = []
        for i in order:
            value = torch.full((i + 1,), (rank + 1.0) * (thread + 1))
            begun.append((i, "sum", hvd.allreduce_async(value, op=hvd.Sum, name=f"sum.{thread}.{i}")))
            begun.append((i, "gather", hvd.allgather_async(value[: rank + 1], name=f"gather.{thread}.{i}")))
            begun.append((i, "broadcast", hvd.broadcast_async(value, size - 1, name=f"broadcast.{thread}.{i}")))
        random.Random(rank).shuffle(begun)
        for i, kind, handle in begun:
            result = hvd.synchronize(handle)
            if kind == "sum" and result.tolist() != [total * (thread + 1)] * (i + 1):
                wrong.append((thread, i, result))
            if kind == "broadcast" and result.tolist() != [size * (thread + 1.0)] * (i + 1):
                wrong.append((thread, i, result))
            if kind == "gather" and result.numel() != sum(min(i + 1, r + 1) for r in range(size)):
                wrong.append((thread, i, result))

    for _ in range(2):  # the second time they are known
        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert wrong == []


def test_poll_and_handles(size):
    handle = hvd.allreduce_async(torch.ones(3), op=hvd.Sum, name="polled")
    while not hvd.poll(handle):
        pass
    assert hvd.synchronize(handle).tolist() == [size] * 3
    assert hvd.synchronize(handle) is None
    with pytest.raises(ValueError, match="handle"):
        hvd.poll(handle)


@pytest.mark.parametrize(
    "different",
    {
        "shape": lambda r: hvd.allreduce(torch.ones(2 + r), name="m"),
        "dimensions": lambda r: hvd.allreduce(torch.ones((2, 3) if r else 6), name="m"),
        "dtype": lambda r: hvd.allreduce(torch.ones(2, dtype=torch.float64 if r else torch.float32), name="m"),
        "reduction": lambda r: hvd.allreduce(torch.ones(2), op=hvd.Max if r else hvd.Min, name="m"),
        "factor": lambda r: hvd.allreduce(torch.ones(2), prescale_factor=1.0 + r, name="m"),
        "root": lambda r: hvd.broadcast(torch.ones(2), r and 1, name="m"),
        "rows": lambda r: hvd.allgather(torch.ones(2, 2 + r), name="m"),
        "number": lambda r: hvd.grouped_allreduce([torch.ones(2)] * (1 + (r > 0)), name="m"),
        "dtype of rows": lambda r: hvd.alltoall(
            torch.ones(2 * hvd.size(), dtype=torch.int32 if r else torch.int64), name="m"
        ),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_what_differs_is_an_error_on_every_rank_that_says_who_said_what(rank, size, different):
    if size == 1:
        pytest.skip("nobody differs from itself")
    with pytest.raises(hvd.HorovodInternalError, match=r"'m': the ranks do not say the same: rank 0: .*; ranks? 1"):
        different[1](rank)
    assert hvd.allreduce(torch.ones(1), name="m", op=hvd.Sum).item() == size  # and work goes on


def test_a_name_that_is_in_use(rank, size):
    handle = hvd.allreduce_async(torch.ones(2), name="twice")
    with pytest.raises(ValueError, match="'twice' was asked for before"):
        hvd.allreduce_async(torch.ones(2), name="twice")
    hvd.synchronize(handle)
    hvd.allreduce(torch.ones(2), name="twice")


def test_arguments_that_exclude_each_other():
    with pytest.raises(ValueError, match="takes the place of average"):
        hvd.allreduce(torch.ones(1), average=True, op=hvd.Sum)
    with pytest.raises(ValueError, match="unknown reduction"):
        hvd.allreduce(torch.ones(1), op=17)
    with pytest.raises(ValueError, match="dense"):
        hvd.allreduce_async(torch.eye(2).to_sparse())
    with pytest.raises(hvd.HorovodInternalError, match="adds"):
        hvd.reducescatter(torch.ones(2), op=hvd.Max)
    with pytest.warns(DeprecationWarning, match="average="):
        assert hvd.allreduce(torch.ones(1), average=True).item() == 1.0


def test_ranks_may_join_at_different_moments(rank, size):
    for turn in range(3 * (rank + 1)):
        mean = hvd.allreduce(torch.ones(3), name=f"step.{turn}")
        present = sum(turn < 3 * (other + 1) for other in range(size))
        assert mean.tolist() == pytest.approx([present / size] * 3)
        most = hvd.allreduce(torch.tensor([-5]), op=hvd.Max, name=f"most.{turn}")
        assert most.tolist() == [-5]
    assert hvd.join() == size - 1
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == size  # all work on


def test_what_needs_all_ranks_fails_after_a_join(rank, size):
    if size == 1:
        pytest.skip("nobody else can join")
    if rank:
        with pytest.raises(hvd.HorovodInternalError, match=r"needs all ranks, and rank 0 called hvd.join"):
            hvd.allgather(torch.ones(1))
    hvd.join()


def test_objects(rank, size):
    class Own:
        def __init__(self, value):
            self.value = value

    assert hvd.broadcast_object(Own(rank), root_rank=size - 1).value == size - 1
    assert hvd.broadcast_object({"rank": rank}, 0, name="named") == {"rank": 0}
    assert [one(2) for one in hvd.allgather_object(lambda x, r=rank: x + r)] == [2 + r for r in range(size)]


def test_adasum_adds_what_is_orthogonal_and_averages_what_is_parallel(rank, size):
    if size & (size - 1):
        with pytest.raises(NotImplementedError, match="power of two"):
            hvd.allreduce(torch.ones(2), op=hvd.Adasum)
        return
    own = torch.zeros(size, dtype=torch.float64)
    own[rank] = rank + 1.0
    assert hvd.allreduce(own, op=hvd.Adasum).tolist() == [r + 1.0 for r in range(size)]
    parallel = hvd.allreduce(torch.full((4,), 3.0), op=hvd.Adasum)
    assert parallel.tolist() == pytest.approx([3.0] * 4)


def test_process_sets_do_not_wait_for_each_other(rank, size):
    if size == 1:
        pytest.skip("there is only one set of one rank")
    low, high = hvd.add_process_set([0]), hvd.add_process_set(range(1, size))
    mine, other = (low, high) if rank == 0 else (high, low)
    assert (mine.size(), mine.rank(), mine.included(), other.included()) == (
        1 if rank == 0 else size - 1,
        max(0, rank - 1),
        True,
        False,
    )
    for _ in range(5 if rank else 0):  # rank 0 asks for nothing meanwhile
        assert hvd.allreduce(torch.ones(2), op=hvd.Sum, process_set=mine).tolist() == [mine.size()] * 2
    root = mine.ranks[-1]
    assert hvd.broadcast(torch.tensor([rank]), root, process_set=mine).item() == root
    with pytest.raises(ValueError, match="is not in"):
        hvd.allreduce(torch.ones(2), process_set=other)
    with pytest.raises(ValueError, match="already"):
        hvd.add_process_set([0])
    assert hvd.remove_process_set(low)
    assert hvd.remove_process_set(high)
    assert not hvd.remove_process_set(high)
    assert not hvd.remove_process_set(hvd.global_process_set)
    with pytest.raises(ValueError, match="not in use"):
        hvd.barrier(mine)


def test_a_process_set_that_the_ranks_do_not_agree_on(rank, size):
    if size == 1:
        pytest.skip("nobody differs from itself")
    with pytest.raises(hvd.HorovodInternalError, match="ranks do not say the same"):
        hvd.add_process_set([0] if rank == 0 else [1])


def test_gradients_are_horovods(rank, size):
    def leaf(*shape):
        return torch.ones(*shape).mul(rank + 1).requires_grad_()

    weight, total = rank + 1.0, sum(range(1, size + 1))
    for op, expected in ((hvd.Sum, total), (hvd.Average, total / size)):
        x = leaf(3)
        (hvd.allreduce(x, op=op) * weight).sum().backward()
        assert x.grad.tolist() == pytest.approx([expected] * 3)
    x = leaf(rank + 1, 2)
    (hvd.allgather(x) * weight).sum().backward()
    assert x.grad.flatten().tolist() == pytest.approx([total / size] * 2 * (rank + 1))  # an average, as Horovod's
    x = leaf(3)
    (hvd.broadcast(x, size - 1) * weight).sum().backward()
    assert x.grad.tolist() == pytest.approx([total / size if rank == size - 1 else 0.0] * 3)
    x = leaf(2 * size)
    hvd.alltoall(x).mul(weight).sum().backward()
    assert x.grad.tolist() == [to + 1.0 for to in range(size) for _ in range(2)]
    for op, expected in ((hvd.Sum, size), (hvd.Average, 1)):
        x = leaf(size, 2)
        hvd.reducescatter(x, op=op, postscale_factor=3.0).mul(weight).sum().backward()
        assert x.grad[:, 0].tolist() == pytest.approx([3.0 * expected * (to + 1) for to in range(size)])
    x = leaf(2)
    sum(hvd.grouped_allreduce([x, x * 2], op=hvd.Sum)).sum().backward()
    assert x.grad.tolist() == [3.0 * size] * 2


@pytest.mark.parametrize(
    ("operation", "share"),
    [
        (hvd.allreduce, lambda rank, size: 1),
        (hvd.allgather, lambda rank, size: 1 / size),
        (lambda x: torch.cat(hvd.grouped_allgather([x[:1], x[1:]])), lambda rank, size: 1 / size),
        (lambda x: hvd.broadcast(x, size_of() - 1), lambda rank, size: 1 / size if rank == size - 1 else 0),
        (hvd.alltoall, lambda rank, size: 1),
        (hvd.reducescatter, lambda rank, size: 1),
        (lambda x: torch.cat(hvd.grouped_reducescatter([x, x])[:1]), lambda rank, size: 1),
    ],
    ids=[
        "allreduce",
        "allgather",
        "grouped_allgather",
        "broadcast",
        "alltoall",
        "reducescatter",
        "grouped_reducescatter",
    ],
)
def test_gradients_are_differentiated_as_horovods(rank, size, operation, share):
    x = torch.full((2 * size,), 2.0, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((operation(x) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((gradient**2).sum(), x)
    assert second.tolist() == pytest.approx([36 * 2.0**3 * share(rank, size)] * (2 * size))  # of (3 x^2)^2


def size_of():
    return hvd.size()


def test_what_begins_in_inference_mode_may_end_outside_and_the_other_way_round(rank, size):
    with torch.inference_mode():
        mine = torch.full((300,), float(rank))
        started = [
            (hvd.allreduce_async_(mine, name="in place"), mine),
            (hvd.broadcast_async_(torch.full((3, 2), float(rank)).t(), size - 1, name="root"), None),
            (hvd.grouped_allreduce_async([torch.ones(300, dtype=torch.float16), torch.ones(2)], op=hvd.Sum), None),
            (hvd.allgather_async(torch.ones(rank + 1)), None),
        ]
        while not all(hvd.poll(handle) for handle, _ in started):  # the thread performs them
            threading.Event().wait(0.01)
        results = [hvd.synchronize(handle) for handle, _ in started]
    assert results[0] is mine
    assert set(mine.tolist()) == {(size - 1) / 2}
    assert results[1].tolist() == [[size - 1.0] * 3] * 2
    assert [part[0].item() for part in results[2]] == [size, size]
    assert results[3].tolist() == [1.0] * sum(range(1, size + 1))
    gathered = hvd.allgather_async(torch.ones(3))
    with torch.inference_mode():
        hvd.allreduce(torch.ones(200))  # whose wait performs the other too
    x = torch.ones(3 * size, requires_grad=True)
    (hvd.synchronize(gathered) * x).sum().backward()
    assert x.grad.tolist() == [1.0] * 3 * size


def test_the_default_device_is_the_programs_affair(rank, size):
    ones = torch.ones(2 * size)
    with torch.device("meta"):
        assert hvd.allreduce(ones, name="default device").tolist() == [1.0] * 2 * size
        assert hvd.broadcast_object(rank) == 0
        assert hvd.allgather_object(rank) == list(range(size))
        assert hvd.alltoall(ones, [2] * size)[1].tolist() == [2] * size
        assert hvd.allgather(ones[: rank + 1]).numel() == sum(range(1, size + 1))


def test_facts(rank, size):
    assert hvd.is_initialized()
    assert hvd.init() is None  # a second time changes nothing
    assert (hvd.local_rank(), hvd.local_size(), hvd.cross_rank(), hvd.cross_size()) == (rank, size, 0, 1)
    assert hvd.is_homogeneous()
    assert isinstance(hvd.nccl_built(), int)
    assert not hvd.ddl_built()
    assert hvd.global_process_set.ranks == list(range(size))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: hvd.allreduce(torch.ones(2, device="meta")), "on the meta device"),
        (lambda: hvd.allreduce(torch.ones(2).to(torch.float8_e4m3fn)), "cannot carry torch.float8_e4m3fn"),
        (lambda: hvd.allgather(torch.ones(2, dtype=torch.uint16)), "cannot carry torch.uint16"),
        (lambda: hvd.reducescatter(torch.ones((2,) + (1,) * 8)), "up to 8 dimensions"),
        (lambda: hvd.allreduce_(torch.ones(1).expand(4)), "a place for each element"),
        (lambda: hvd.broadcast_(torch.ones(1).expand(4), 0), "a place for each element"),
    ],
)
def test_what_no_engine_carries_is_refused_at_the_call_and_nothing_is_lost(size, call, said):
    with pytest.raises(ValueError, match=said):
        call()
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == size

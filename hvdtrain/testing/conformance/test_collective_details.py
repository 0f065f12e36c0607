"""What collectives promise beyond their numbers: groups, waiting, arguments left alone, errors on every rank alike."""

import random
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hvdtrain.backends.communicator import Communicator
from hvdtrain.errors import CollectiveError

pytestmark = pytest.mark.feature("collectives")

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [*FLOATS, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.complex128]
OPS = ["sum", "mean", "min", "max", "product"]
FOLD = {"sum": torch.sum, "mean": torch.mean, "min": torch.amin, "max": torch.amax, "product": torch.prod}
# How a tensor can lie in memory; each of six whole numbers.
LAYOUTS = {
    "vector": lambda t: t[:5].clone(),
    "scalar": lambda t: t[2].clone(),
    "empty": lambda t: t[:0].reshape(2, 0).clone(),
    "transposed": lambda t: t.reshape(2, 3).t(),
    "strided": lambda t: t[::2],
}


def of(rank, dtype, layout="vector"):
    numbers = torch.arange(6) % 3 + rank + 1
    return LAYOUTS[layout]((numbers % 2 == 0) if dtype == torch.bool else numbers.to(dtype))


def same(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.device == expected.device
    assert torch.equal(found, expected)


@pytest.mark.costly(25)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moving_collectives_carry_every_dtype_and_layout_and_leave_arguments_alone(backend, dtype, layout):
    n, rank = backend.world_size, backend.rank
    mine = of(rank, dtype, layout)
    before = mine.clone()

    for src, found in enumerate(backend.all_gather(mine)):
        same(found, of(src, dtype, layout))
        found.zero_()
    for src in range(n):
        found = backend.broadcast(mine, src)
        same(found, of(src, dtype, layout))
        same(backend.broadcast(mine, src, async_op=True).wait(), found)
        found.zero_()
    for src, found in enumerate(backend.all_to_all([mine] * n)):
        same(found, of(src, dtype, layout))
        found.zero_()
    same(mine, before)

    assert backend.broadcast_(mine, n - 1) is mine
    same(mine, of(n - 1, dtype, layout))


@pytest.mark.costly(48)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32, torch.int64, torch.uint8], ids=str)
def test_reduce_scatter(backend, dtype, op, layout):
    n, rank = backend.world_size, backend.rank
    mine = [of(rank + i, dtype, layout) for i in range(n)]
    before = [t.clone() for t in mine]
    if op == "mean" and not dtype.is_floating_point:
        with pytest.raises(CollectiveError, match="mean"):
            backend.reduce_scatter(mine, op)
        return
    wide = torch.float64 if dtype.is_floating_point else torch.int64
    expected = FOLD[op](torch.stack([of(src + rank, dtype, layout).to(wide) for src in range(n)]), dim=0)
    found = backend.reduce_scatter(mine, op)
    assert found.dtype == dtype
    assert found.shape == mine[rank].shape
    rtol = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6}.get(dtype, 1e-15)
    torch.testing.assert_close(found, expected.to(dtype), rtol=rtol if dtype.is_floating_point else 0, atol=0)
    found.zero_()
    for tensor, old in zip(mine, before, strict=True):
        same(tensor, old)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_sums_and_means_also_of_conjugate_views(backend, dtype):
    def brought(rank):
        return torch.tensor([1 + 2j, rank - 1j, 3j], dtype=dtype).conj()

    total = torch.stack([brought(rank) for rank in range(backend.world_size)]).sum(0)
    mine = brought(backend.rank)
    torch.testing.assert_close(backend.all_reduce(mine), total)
    torch.testing.assert_close(backend.all_reduce(mine, "mean"), total / backend.world_size)
    for rank, found in enumerate(backend.all_gather(mine)):
        same(found, brought(rank).resolve_conj())
    same(backend.broadcast(mine, 0), brought(0).resolve_conj())
    with pytest.raises(CollectiveError, match="complex"):
        backend.all_reduce(mine, "product")


def test_several_collectives_may_be_under_way_and_are_waited_for_in_any_order(backend):
    n = backend.world_size
    pending = [backend.all_reduce(torch.full((1000,), float(i + backend.rank)), async_op=True) for i in range(8)]
    copies = [backend.broadcast(torch.tensor(10 * i + backend.rank), n - 1, async_op=True) for i in range(8)]
    for i in reversed(range(8)):
        expected = sum(i + rank for rank in range(n))
        assert pending[i].wait().eq(expected).all()
        assert pending[i].wait() is pending[i].wait()
        assert pending[i].done()
        assert int(copies[i].wait()) == 10 * i + n - 1


def test_threads_that_wait_at_once_or_later_each_in_a_group_of_its_own(backend):
    """Ranks come to the groups in different orders and at different moments; small ones and large ones, idle groups and busy ones."""
    n, turns = backend.world_size, 25
    groups = [backend.group(range(n)) for _ in range(3)]
    total = n * (n + 1) // 2

    def work(number: int) -> int:
        group, wrong = groups[number], 0
        moods, same_everywhere = random.Random(100 * backend.rank + number), random.Random(number)
        for turn in range(turns):
            if moods.random() < 0.3:
                time.sleep(0.002 * moods.random())
            pending = []
            for _ in range(same_everywhere.randrange(3)):
                count = same_everywhere.choice([1, 100, 20_000])
                pending.append((group.all_reduce(torch.full((count,), float(backend.rank + 1)), async_op=True), total))
            value = float(backend.rank + 1 + turn)
            blocking = group.all_reduce(torch.full((same_everywhere.choice([1, 3, 1000]),), value))
            wrong += not blocking.eq(total + n * turn).all()
            wrong += int(group.broadcast(torch.tensor(backend.rank * 10 + turn), turn % n)) != turn % n * 10 + turn
            if moods.random() < 0.5:
                pending.reverse()
            wrong += sum(not one.wait().eq(expected).all() for one, expected in pending)
        return wrong

    with ThreadPoolExecutor(3) as pool:
        order = list(range(3))
        random.Random(backend.rank).shuffle(order)
        found = [pool.submit(work, number) for number in order]
        assert [one.result() for one in found] == [0, 0, 0]
    backend.barrier()
    for group in groups:
        group.close()


def test_an_argument_may_be_changed_while_its_collective_is_under_way(backend):
    mine = torch.full((5,), float(backend.rank + 1))
    pending = backend.all_reduce(mine, async_op=True)
    mine.fill_(-1e9)
    assert pending.wait().tolist() == [sum(range(1, backend.world_size + 1))] * 5


def test_a_barrier_waits_for_the_last_rank(backend):
    last = backend.world_size - 1
    if backend.rank == last:
        time.sleep(0.4)
        arrived = time.time()
    else:
        arrived = 0.0
    backend.barrier()
    passed = time.time()
    if len(set(backend.all_gather_object(backend.detection.topology.node_rank))) == 1:  # one clock
        everyone = backend.all_gather_object((arrived, passed))
        assert min(p for _, p in everyone) >= everyone[last][0]


def _prefixes(n):
    return [list(range(size)) for size in range(1, n + 1)] + [[rank] for rank in range(1, n)]


def test_groups_of_every_prefix_and_of_one_do_every_collective_with_their_own_ranks(backend):
    for ranks in _prefixes(backend.world_size):
        group = backend.group(ranks)
        assert (group is not None) == (backend.rank in ranks)
        if group is None:
            continue
        k, own = len(ranks), ranks.index(backend.rank)
        mine = torch.tensor([backend.rank + 1.0, 2.0], dtype=torch.float64)
        numbers = [rank + 1.0 for rank in ranks]
        assert group.all_reduce(mine).tolist() == [sum(numbers), 2.0 * k]
        assert group.all_reduce(mine, "mean").tolist() == [sum(numbers) / k, 2.0]
        assert group.all_reduce(mine, "max").tolist() == [max(numbers), 2.0]
        assert [t.tolist() for t in group.all_gather(mine[: own + 1][:2])] == [
            [number, 2.0][: i + 1] for i, number in enumerate(numbers)
        ]
        for src in range(k):
            assert group.broadcast(mine, src).tolist() == [numbers[src], 2.0]
            assert group.broadcast_object(f"from {backend.rank}", src) == f"from {ranks[src]}"
        sent = [torch.tensor([10.0 * own + dst]) for dst in range(k)]
        assert [float(t) for t in group.all_to_all(sent)] == [10.0 * src + own for src in range(k)]
        assert float(group.reduce_scatter(sent)) == sum(10.0 * src + own for src in range(k))
        assert group.all_gather_object(backend.rank) == ranks
        group.barrier()
        with pytest.raises(CollectiveError, match="no rank of this group"):
            group.broadcast(mine, k)


def test_groups_side_by_side_do_not_disturb_each_other_or_the_world(backend):
    n = backend.world_size
    even, odd = list(range(0, n, 2)), list(range(1, n, 2))
    groups = [backend.group(ranks) for ranks in (even, odd) if ranks]
    mine = next(group for group in groups if group is not None)
    members = even if backend.rank % 2 == 0 else odd
    for step in range(5):
        assert int(mine.all_reduce(torch.tensor(backend.rank + step))) == sum(rank + step for rank in members)
        assert int(backend.all_reduce(torch.tensor(step))) == n * step


@pytest.mark.parametrize("src", [-1, 99])
def test_a_source_that_is_no_rank_is_refused(backend, src):
    for call in (backend.broadcast, backend.broadcast_):
        with pytest.raises(CollectiveError, match="no rank of this group"):
            call(torch.ones(2), src)
    with pytest.raises(CollectiveError, match="no rank of this group"):
        backend.broadcast_object("x", src)


@pytest.mark.parametrize("name", ["all_reduce", "all_reduce_", "all_gather", "broadcast", "broadcast_"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [("abc", "torch.Tensor"), (None, "torch.Tensor"), (torch.eye(2).to_sparse(), "to_dense")],
    ids=["text", "None", "sparse"],
)
def test_what_is_no_dense_tensor_is_refused_by_every_collective(backend, name, wrong, message):
    with pytest.raises(CollectiveError, match=message):
        getattr(backend, name)(wrong)


@pytest.mark.parametrize("name", ["all_to_all", "reduce_scatter"])
def test_a_list_is_refused_that_is_not_one_dense_tensor_a_rank(backend, name):
    n = backend.world_size
    for wrong in ([], [torch.ones(2)] * (n + 1), ["abc"] * n, [torch.eye(2).to_sparse()] * n):
        with pytest.raises(CollectiveError):
            getattr(backend, name)(wrong)


def test_after_a_refused_call_the_communicator_still_works(backend):
    with pytest.raises(CollectiveError):
        backend.all_reduce(torch.ones(2, dtype=torch.int64), "mean")
    assert int(backend.all_reduce(torch.tensor(1))) == backend.world_size


@pytest.mark.parametrize("name", ["all_gather", "all_to_all"])
def test_dtypes_that_differ_between_ranks_are_an_error_on_every_rank(backend, name):
    n = backend.world_size
    if n == 1:
        return  # nobody to differ from
    mine = torch.ones(2, dtype=torch.float64 if backend.rank == n - 1 else torch.float32)
    with pytest.raises(CollectiveError, match="dtypes"):
        getattr(backend, name)(mine if name == "all_gather" else [mine] * n)
    assert int(backend.all_reduce(torch.tensor(1))) == n


MISMATCHES = {
    "op": lambda c, odd: c.all_reduce(torch.ones(2), "max" if odd else "sum"),
    "dtype": lambda c, odd: c.all_reduce(torch.ones(2, dtype=torch.float64 if odd else torch.float32)),
    "source": lambda c, odd: c.broadcast(torch.ones(2), int(odd)),
    "reduce-and-broadcast": lambda c, odd: c.broadcast(torch.ones(2)) if odd else c.all_reduce(torch.ones(2)),
    "reduce-and-gather": lambda c, odd: c.all_gather(torch.ones(2)) if odd else c.all_reduce(torch.ones(2)),
    "reduce-and-objects": lambda c, odd: c.all_gather_object("x") if odd else c.all_reduce(torch.ones(2)),
    "gather-and-exchange": lambda c, odd: (
        c.all_to_all([torch.ones(2)] * c.wire.size) if odd else c.all_gather(torch.ones(2))
    ),
    "reduce-and-barrier": lambda c, odd: c.barrier() if odd else c.all_reduce(torch.ones(2)),
}


@pytest.mark.parametrize("kind", MISMATCHES)
def test_with_checks_any_mismatch_is_an_error_on_every_rank_that_names_the_odd_one(backend, kind):
    n = backend.world_size
    checked = Communicator(backend.wire, None, check=True)
    if n > 1:
        with pytest.raises(CollectiveError, match=rf"different collectives:.*rank {n - 1}:"):
            MISMATCHES[kind](checked, backend.rank == n - 1)
    assert int(checked.all_reduce(torch.tensor(1))) == n


def test_with_checks_every_collective_does_the_same(backend):
    n = backend.world_size
    checked = Communicator(backend.wire, None, check=True)
    assert int(checked.all_reduce(torch.tensor(backend.rank))) == sum(range(n))
    assert [t.numel() for t in checked.all_gather(torch.ones(backend.rank))] == list(range(n))
    assert [t.numel() for t in checked.all_to_all([torch.ones(backend.rank + i) for i in range(n)])] == [
        src + backend.rank for src in range(n)
    ]
    assert float(checked.reduce_scatter([torch.tensor(1.0)] * n)) == n
    assert checked.broadcast_object(("from", backend.rank), n - 1) == ("from", n - 1)
    assert checked.all_gather_object("x" * backend.rank) == ["x" * rank for rank in range(n)]
    checked.barrier()


def test_nothing_draws_from_the_global_random_numbers(backend):
    n = backend.world_size
    random.seed(1)
    before = torch.get_rng_state(), random.getstate()
    model = torch.nn.Linear(2, 2)
    after_model = torch.get_rng_state()
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
    replica.backward(replica.model(torch.ones(1, 2)).sum(), samples=1, total=n)
    replica.step(clip_norm=1.0)
    for _ in backend.loader(torch.utils.data.TensorDataset(torch.arange(7)), batch_size=2, shuffle=True):
        pass
    backend.all_to_all([torch.ones(1)] * n)
    backend.reduce_scatter([torch.ones(1)] * n)
    backend.broadcast_object("x")
    backend.group([0])
    backend.barrier()
    assert torch.equal(torch.get_rng_state(), after_model)
    assert random.getstate() == before[1]


def test_a_gradient_flows_through_a_collective_in_the_middle_of_a_model(backend):
    n = backend.world_size
    weights = [torch.arange(3, dtype=torch.float64) * (rank + 1) + 1 for rank in range(n)]
    x = weights[backend.rank].clone().requires_grad_()
    loss = (backend.all_reduce(x.square()) * x).sum() + (torch.stack(backend.all_gather(x)).prod(0)).sum()
    loss.backward()
    # Written out on one process: the sum of all ranks' losses, differentiated by this rank's x.
    alone = [w.clone().requires_grad_() for w in weights]
    total = sum((sum(a.square() for a in alone) * a).sum() for a in alone) + n * torch.stack(alone).prod(0).sum()
    total.backward()
    torch.testing.assert_close(x.grad, alone[backend.rank].grad, rtol=1e-12, atol=1e-12)


def test_a_single_number_travels_whatever_its_strides_are(backend):
    odd = torch.arange(2.0).add(backend.rank).reshape(1, 2).t()[:1]
    assert odd.is_contiguous()
    assert odd.reshape(-1).stride() == (2,)  # so that torch would not view it as bytes
    size = backend.world_size
    everyone = [torch.full((1, 1), float(rank)) for rank in range(size)]
    for found in (backend.all_gather(odd), backend.all_to_all([odd] * size)):
        assert torch.equal(torch.cat(list(found)), torch.cat(everyone))
    gathered = backend.gather(odd)
    assert gathered is None or torch.equal(torch.cat(list(gathered)), torch.cat(everyone))
    assert torch.equal(backend.scatter([odd] * size if backend.rank == 0 else None), everyone[0])
    assert torch.equal(backend.broadcast(odd), everyone[0])
    assert float(backend.all_reduce(odd, "sum")) == sum(range(size))


def test_a_sum_that_overflows_is_infinite_and_nothing_is_said(backend):
    big = torch.full((4,), 3e38)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        total = backend.all_reduce(big)
    assert torch.equal(total, big * backend.world_size)

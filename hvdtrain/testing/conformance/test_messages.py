"""Messages between two ranks: every pair, dtype and layout; order, size, both directions, threads, groups."""

import threading
import time

import pytest
import torch

from hvdtrain.errors import CollectiveError

pytestmark = pytest.mark.feature("collectives")

DTYPES = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip
LAYOUTS = {
    "vector": lambda t: t[:5].clone(),
    "scalar": lambda t: t[2].clone(),
    "empty": lambda t: t[:0].reshape(2, 0).clone(),
    "transposed": lambda t: t.reshape(2, -1).t(),
    "strided": lambda t: t[::2],
    "long": lambda t: t.repeat(50),
}


def of(rank, dtype, layout="vector"):
    numbers = torch.arange(6) % 3 + rank + 1
    return LAYOUTS[layout]((numbers % 2 == 0) if dtype == torch.bool else numbers.to(dtype))


def same(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.device == expected.device
    assert torch.equal(found, expected)


def pairs(n):
    return [(src, dst) for src in range(n) for dst in range(n) if src != dst]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_message_of_any_dtype_and_layout_goes_from_each_rank_to_each_other(backend, dtype):
    rank = backend.rank
    for layout in LAYOUTS:
        mine = of(rank, dtype, layout)
        before = mine.clone()
        for src, dst in pairs(backend.world_size):
            if rank == src:
                assert backend.send(mine, dst) is None
            elif rank == dst:
                found = backend.recv(src)
                same(found, of(src, dtype, layout))
                found.zero_()
        same(mine, before)


def test_a_conjugate_view_arrives_as_its_values(backend):
    if backend.rank == 0:
        for dst in range(1, backend.world_size):
            backend.send(torch.tensor([1j, 2 + 3j]).conj(), dst)
    else:
        same(backend.recv(0), torch.tensor([-1j, 2 - 3j]))


@pytest.mark.parametrize("length", [1, 424 // 4, 424 // 4 + 1, 100_000])
def test_a_shift_around_the_ring_and_an_exchange_with_each_other_rank(backend, length):
    n, rank = backend.world_size, backend.rank
    left, right = (rank - 1) % n, (rank + 1) % n
    mine = torch.full((length + rank,), float(rank))
    same(backend.sendrecv(mine, right, left), torch.full((length + left,), float(left)))
    for low, high in ((a, b) for a, b in pairs(n) if a < b):
        if rank in (low, high):
            other = low + high - rank
            same(backend.sendrecv(mine, other, other), torch.full((length + other,), float(other)))


def test_the_other_ends_of_an_exchange_may_send_and_receive(backend):
    n, rank = backend.world_size, backend.rank
    if n == 1:
        return
    big, small = torch.arange(10_000), torch.arange(3)
    for mine, theirs in ((big, small), (small, big), (big, big), (small, small)):
        if rank == 0:
            same(backend.sendrecv(mine, 1, n - 1), theirs)
        elif n == 2:
            same(backend.sendrecv(theirs, 0, 0), mine)
        elif rank == n - 1:
            backend.send(theirs, 0)
        elif rank == 1:
            same(backend.recv(0), mine)


def test_messages_arrive_in_the_order_in_which_they_were_sent(backend):
    n, rank = backend.world_size, backend.rank
    for turn in range(200):
        length = 1000 * (turn % 3)
        if rank == 0:
            for dst in range(1, n):
                backend.send(torch.full((length + 1,), turn), dst)
        else:
            same(backend.recv(0), torch.full((length + 1,), turn))


def test_a_message_waits_for_its_receiver_however_small_it_is(backend):
    if backend.world_size == 1 or backend.rank > 1:
        return
    if backend.rank == 0:
        began = time.monotonic()
        backend.send(torch.tensor(1), 1)
        assert time.monotonic() - began > 0.25
    else:
        time.sleep(0.4)
        assert int(backend.recv(0)) == 1


def test_large_messages_in_both_directions_at_once(backend):
    n, rank = backend.world_size, backend.rank
    mine = torch.full((4_000_000,), float(rank), dtype=torch.float32)
    found = backend.sendrecv(mine, (rank + 1) % n, (rank - 1) % n)
    assert found.shape == mine.shape
    assert found.eq((rank - 1) % n).all()


def test_messages_beside_collectives_do_not_disturb_each_other(backend):
    n, rank = backend.world_size, backend.rank
    for step in range(20):
        assert int(backend.all_reduce(torch.tensor(step))) == n * step
        found = backend.sendrecv(torch.tensor(100 * rank + step), (rank + 1) % n, (rank - 1) % n)
        assert int(found) == 100 * ((rank - 1) % n) + step
        pending = backend.all_reduce(torch.tensor(rank), async_op=True)
        backend.sendrecv(torch.ones(1000), (rank + 1) % n, (rank - 1) % n)
        assert int(pending.wait()) == sum(range(n))


def test_threads_may_send_and_receive_at_once(backend):
    """Two threads of rank 0 exchange long messages with two of the last rank; each message arrives whole."""
    n, rank = backend.world_size, backend.rank
    last = n - 1
    if n == 1 or rank not in (0, last):
        return
    peer, counts = last - rank, 60
    received, errors = [], []

    def sends(which):
        try:
            for turn in range(counts):
                backend.send(torch.full((1 + 997 * which,), 1000 * which + turn), peer)
        except BaseException as error:
            errors.append(error)

    def receives():
        try:
            for _ in range(counts):
                found = backend.recv(peer)
                assert found.eq(found[0]).all()
                received.append((found.numel(), int(found[0])))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=sends, args=(which,)) for which in (0, 1)]
    threads += [threading.Thread(target=receives) for _ in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(received) == sorted(
        (1 + 997 * which, 1000 * which + turn) for which in (0, 1) for turn in range(counts)
    )


def test_groups_pass_messages_with_their_own_ranks_apart_from_the_world(backend):
    n, rank = backend.world_size, backend.rank
    for ranks in [list(range(size)) for size in range(2, n + 1)] + [[0, n - 1]] * (n > 2):
        group = backend.group(ranks)
        if group is None:
            continue
        own, size = ranks.index(rank), len(ranks)
        if rank == ranks[0]:
            outcomes = []
            thread = threading.Thread(target=lambda: outcomes.append(group.send(torch.tensor(7), size - 1)))  # noqa: B023
            thread.start()
            backend.send(torch.tensor(8), ranks[-1])
            thread.join()
            assert outcomes == [None]
        elif rank == ranks[-1]:  # in the other order: what the world sends is not what the group receives
            assert int(backend.recv(ranks[0])) == 8
            assert int(group.recv(0)) == 7
        assert int(group.sendrecv(torch.tensor(rank), (own + 1) % size, (own - 1) % size)) == ranks[(own - 1) % size]
        with pytest.raises(CollectiveError, match=rf"dst={own} is this rank itself"):
            group.send(torch.tensor(1), own)
        with pytest.raises(CollectiveError, match=f"no rank of this group of {size}"):
            group.recv(size)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.send("abc", b.rank), "send takes a torch.Tensor"),
        (lambda b: b.send(torch.eye(2).to_sparse(), b.rank), "to_dense"),
        (lambda b: b.send(torch.ones([1] * 9), b.rank), "reshape"),
        (lambda b: b.send(torch.ones(2, requires_grad=True), b.rank), r"pass tensor.detach\(\)"),
        (lambda b: b.send(torch.ones(2), b.rank), r"send: dst=\d is this rank itself"),
        (lambda b: b.send(torch.ones(2), b.world_size), r"send: dst=\d is no rank of this group"),
        (lambda b: b.send(torch.ones(2), -1), "dst=-1 is no rank of this group"),
        (lambda b: b.recv(b.rank), r"recv: src=\d is this rank itself"),
        (lambda b: b.recv(99), "recv: src=99 is no rank of this group"),
        (lambda b: b.sendrecv(torch.ones(2), b.rank, 99), "is this rank itself"),
        (lambda b: b.sendrecv(torch.ones(2), 99, b.rank), "no rank of this group"),
        (lambda b: b.sendrecv(None, b.rank, b.rank), "takes a torch.Tensor"),
        (lambda b: b.sendrecv(torch.ones(2, requires_grad=True), b.rank, b.rank), r"pass tensor.detach\(\)"),
    ],
)
def test_a_wrong_call_is_refused_at_any_world_size(backend, call, message):
    with pytest.raises(CollectiveError, match=message):
        call(backend)


def test_a_ring_of_one_gets_a_copy(backend):
    mine = torch.arange(3)
    found = backend.sendrecv(mine, backend.rank, backend.rank)
    same(found, mine)
    found.zero_()
    assert mine.tolist() == [0, 1, 2]

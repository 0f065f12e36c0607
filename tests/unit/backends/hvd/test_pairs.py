"""Connections between pairs over real sockets, the ranks as threads of this process."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hvdtrain.backends.hvd.pairs import Pairs
from hvdtrain.errors import RankFailure
from hvdtrain.ranks.last_words import Failure
from hvdtrain.ranks.store import Store
from hvdtrain.ranks.watch import NullWatch


@pytest.fixture
def server():
    return Store()


class Heard(NullWatch):
    """A watch that has heard of a failure."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.words.first = Failure(rank=rank, host="here", message="planted", traceback="")

    def raise_if_failed(self) -> None:
        if self.failure.rank == 2:
            raise RankFailure("rank 2 on here failed first: planted", rank=2)


def joined(server, rank, *, timeout_s=20.0, watch=None):
    return Pairs(server, rank, timeout_s, watch or NullWatch(), one_node=True)


def run_ranks(server, bodies):
    """Run one body a rank; each gets its `Pairs`."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        futures = [pool.submit(body, joined(server, rank)) for rank, body in enumerate(bodies)]
        return [future.result(timeout=30) for future in futures]


def send(pairs, number, dst, channel=0):
    pairs.send_receive(torch.tensor([number]), dst, None, None, channel).wait()


def receive(pairs, src, channel=0):
    out = torch.zeros(1, dtype=torch.int64)
    pairs.send_receive(None, None, out, src, channel).wait()
    return int(out)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_ring_whose_connections_are_all_made_at_once(server, size):
    def body(rank):
        def shift(pairs):
            found = []
            for turn in range(3):
                out = torch.zeros(1, dtype=torch.int64)
                sent = torch.tensor([10 * turn + rank])
                pairs.send_receive(sent, (rank + 1) % size, out, (rank - 1) % size, 0).wait()
                found.append(int(out))
            return found

        return shift

    found = run_ranks(server, [body(rank) for rank in range(size)])
    assert found == [[10 * turn + (rank - 1) % size for turn in range(3)] for rank in range(size)]


def test_half_of_an_exchange_goes_on_while_the_other_half_waits_for_its_rank(server):
    """Rank 1 comes to rank 0 only after rank 2 has, which needs rank 0's receiving half first."""

    def zero(pairs):
        out = torch.zeros(1, dtype=torch.int64)
        pairs.send_receive(torch.tensor([7]), 1, out, 2, 0).wait()
        return int(out)

    def one(pairs):
        return receive(pairs, 2), receive(pairs, 0)

    def two(pairs):
        send(pairs, 8, 0)
        send(pairs, 9, 1)

    assert run_ranks(server, [zero, one, two]) == [8, (9, 7), None]


def test_channels_are_apart(server):
    def zero(pairs):
        thread = threading.Thread(target=send, args=(pairs, 1, 1, 5))
        thread.start()
        send(pairs, 2, 1, 6)
        thread.join()

    def one(pairs):
        return receive(pairs, 0, 6), receive(pairs, 0, 5)

    assert run_ranks(server, [zero, one])[1] == (2, 1)


def test_a_message_waits_for_its_receiver(server):
    def zero(pairs):
        send(pairs, 0, 1)  # connects
        began = time.monotonic()
        send(pairs, 1, 1)
        return time.monotonic() - began

    def one(pairs):
        receive(pairs, 0)
        time.sleep(0.3)
        receive(pairs, 0)

    assert run_ranks(server, [zero, one])[0] > 0.2


def test_a_rank_that_never_comes_is_waited_for_until_the_timeout(server):
    with pytest.raises(RuntimeError, match=r"the other ranks did not come within 0\.2 s"):
        receive(joined(server, 0, timeout_s=0.2), 1)


def test_a_connected_rank_that_never_sends_is_waited_for_until_the_timeout(server):
    with ThreadPoolExecutor(2) as pool:
        zero, one = joined(server, 0, timeout_s=1.0), joined(server, 1, timeout_s=1.0)
        sending = pool.submit(send, one, 3, 0)
        assert receive(zero, 1) == 3
        sending.result()
        with pytest.raises(RuntimeError, match="Timed out"):
            receive(zero, 1)


@pytest.mark.parametrize(
    ("failed", "kind"), [(2, RankFailure), (0, RuntimeError)], ids=["another rank", "this rank, for the peer has left"]
)
def test_nobody_waits_for_a_connection_once_a_failure_is_known(server, failed, kind):
    began = time.monotonic()
    with pytest.raises(kind, match="planted"):
        receive(joined(server, 0, watch=Heard(failed)), 1)
    assert time.monotonic() - began < 5

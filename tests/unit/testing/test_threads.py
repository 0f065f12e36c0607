import threading
import time

import pytest
import torch

from hvdtrain.errors import CollectiveError
from hvdtrain.testing.threads import run_ranks


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_collectives_between_threads(ranks):
    def body(communicator):
        rank = communicator.wire.rank
        return (
            float(communicator.all_reduce(torch.tensor(float(rank + 1)))),
            [t.tolist() for t in communicator.all_gather(torch.arange(rank))],
            communicator.broadcast_object({"from": rank}, src=ranks - 1),
            [t.tolist() for t in communicator.all_to_all([torch.full((to + 1,), rank) for to in range(ranks)])],
            communicator.reduce_scatter([torch.tensor(float(rank * to)) for to in range(ranks)]).item(),
        )

    found = run_ranks(ranks, body)
    total = ranks * (ranks + 1) / 2
    for rank, (summed, gathered, told, sent, scattered) in enumerate(found):
        assert summed == total
        assert gathered == [list(range(r)) for r in range(ranks)]
        assert told == {"from": ranks - 1}
        assert sent == [[r] * (rank + 1) for r in range(ranks)]
        assert scattered == sum(r * rank for r in range(ranks))


def test_messages_between_threads_wait_for_their_receiver():
    order = []

    def body(communicator):
        rank = communicator.wire.rank
        around = communicator.sendrecv(torch.arange(rank), (rank + 1) % 3, (rank - 1) % 3)
        if rank == 0:
            time.sleep(0.05)
            order.append("received")
            return around.tolist(), communicator.recv(2).tolist()
        if rank == 2:
            communicator.send(torch.tensor([5, 6]), 0)
            order.append("sent")
        return around.tolist(), None

    assert run_ranks(3, body) == [([0, 1], [5, 6]), ([], None), ([0], None)]
    assert order == ["received", "sent"]


def test_a_rank_that_waits_for_a_message_of_a_failed_one_ends():
    def body(communicator):
        if communicator.wire.rank == 1:
            raise ValueError("rank 1 had enough")
        communicator.recv(1)

    with pytest.raises(ValueError, match="had enough"):
        run_ranks(2, body)


def test_the_error_of_the_rank_that_failed_is_raised_and_the_others_end():
    def body(communicator):
        if communicator.wire.rank == 1:
            raise ValueError("rank 1 had enough")
        communicator.barrier()

    before = threading.active_count()
    with pytest.raises(ValueError, match="had enough"):
        run_ranks(3, body)
    assert threading.active_count() == before


def test_a_mismatch_is_an_error_on_every_rank():
    def body(communicator):
        with pytest.raises(CollectiveError, match="different collectives"):
            communicator.all_reduce(torch.zeros(communicator.wire.rank + 1))
        return True

    assert run_ranks(3, body, check=True) == [True] * 3

"""What is not about numbers: order, threads, futures, time-outs, mistakes, subsets, messages between two ranks."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset


def test_the_work_is_asynchronous_and_its_future_chains(rank, size):
    tensor = torch.full((1000,), float(rank))
    work = dist.all_reduce(tensor, async_op=True)
    doubled = work.get_future().then(lambda done: done.value()[0] * 2)
    assert doubled.wait()[0].item() == 2 * sum(range(size))
    assert work.wait()
    assert work.is_completed()
    assert work.is_success()
    assert work.exception() is None
    assert work.result()[0].data_ptr() == tensor.data_ptr()
    after = dist.barrier(async_op=True)
    after.wait(timedelta(seconds=30))
    assert after.get_future().wait() == []


def test_results_of_many_operations_in_flight_are_in_order(rank, size):
    tensors = [torch.full((7,), float(rank + i)) for i in range(200)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for work in reversed(works):
        work.wait()
    assert [t[0].item() for t in tensors] == [sum(r + i for r in range(size)) for i in range(200)]


def test_groups_on_subsets_and_several_threads(rank, size):
    halves = [dist.new_group([r for r in range(size) if r % 2 == part]) for part in range(min(2, size))]
    everyone = dist.new_group(range(size))
    mine = halves[rank % 2] if size > 1 else halves[0]
    failures = []

    def work_in(group, count):
        try:
            for i in range(50):
                tensor = torch.full((11,), float(i))
                dist.all_reduce(tensor, group=group)
                assert tensor[0].item() == i * count
        except Exception as error:
            failures.append(error)

    members = len([r for r in range(size) if r % 2 == rank % 2]) if size > 1 else 1
    threads = [threading.Thread(target=work_in, args=args) for args in ((mine, members), (everyone, size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert dist.get_rank(mine) == rank // 2
    for group in [*halves, everyone]:
        dist.destroy_process_group(group)


def test_messages_between_two_ranks(rank, size):
    if size == 1:
        pytest.skip("needs two ranks")
    right, left = (rank + 1) % size, (rank - 1) % size
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.complex64):
        out, sent = torch.zeros(5, dtype=dtype), torch.full((5,), rank % 2).to(dtype)
        requests = dist.batch_isend_irecv([dist.P2POp(dist.irecv, out, left), dist.P2POp(dist.isend, sent, right)])
        for request in requests:
            request.wait()
        assert out.tolist() == torch.full((5,), left % 2).to(dtype).tolist()
    if rank == 0:
        seen = {}
        for _ in range(size - 1):
            tensor = torch.zeros(2)
            source = dist.recv(tensor)
            seen[source] = tensor.tolist()
        assert seen == {other: [float(other)] * 2 for other in range(1, size)}
    else:
        dist.send(torch.full((2,), float(rank)), 0)
    if rank < 2:  # every rank receives first: messages must not queue behind each other
        view = torch.zeros(6).view(2, 3).t()
        request = dist.irecv(view, 1 - rank, tag=7)
        dist.isend(torch.full((3, 2), float(rank)), 1 - rank, tag=7).wait()
        request.wait()
        assert view.tolist() == [[float(1 - rank)] * 2] * 3


def test_a_message_of_another_size_is_an_error(rank, size):
    if size == 1:
        pytest.skip("needs two ranks")
    if rank == 0:
        dist.send(torch.ones(3), 1, tag=1)
        dist.send(torch.ones(5), 1, tag=2)
    elif rank == 1:
        with pytest.raises(dist.DistBackendError, match="12 bytes came, 16 were expected"):
            dist.recv(torch.ones(4), 0, tag=1)
        with pytest.raises(dist.DistBackendError, match=r"MPI_ERR_TRUNCATE|truncated"):
            dist.recv(torch.ones(4), 0, tag=2)


@pytest.mark.parametrize("mistake", ["size", "dtype", "operation", "op", "root"])
def test_ranks_that_call_different_things_are_told_so(rank, size, mistake):
    if size == 1:
        pytest.skip("needs two ranks")
    odd = rank == 1
    with pytest.raises(dist.DistBackendError, match=r"did not call the same operation \(ranks \[") as caught:  # noqa: PT012
        if mistake == "size":
            dist.all_reduce(torch.ones(4 if odd else 3))
        elif mistake == "dtype":
            dist.all_reduce(torch.ones(3, dtype=torch.float64 if odd else torch.float32))
        elif mistake == "operation" and odd:
            dist.barrier()
        elif mistake == "op":
            dist.all_reduce(torch.ones(3), dist.ReduceOp.MAX if odd else dist.ReduceOp.SUM)
        elif mistake == "root":
            dist.broadcast(torch.ones(3), 1 if odd else 0)
        else:
            dist.all_reduce(torch.ones(3))
    assert "ranks [1] of the group" in str(caught.value)
    tensor = torch.ones(2)  # and the group goes on
    dist.all_reduce(tensor)
    assert tensor.tolist() == [float(size)] * 2


def test_splits_that_do_not_fit_are_named(rank, size):
    if size == 1:
        pytest.skip("needs two ranks")
    wrong = [1] * size
    rows = torch.ones(size + (rank == 0), 2)
    send = [2, *wrong[1:]] if rank == 0 else wrong
    with pytest.raises(dist.DistBackendError, match="rank 0 expects 8 bytes of rank 0, which sends 16"):
        dist.all_to_all_single(torch.empty(size, 2), rows, wrong, send)


def test_a_rank_that_does_not_come_is_a_time_out_that_names_group_operation_and_size(rank, size):
    if size == 1:
        pytest.skip("needs two ranks")
    group = dist.new_group(range(size), timeout=timedelta(seconds=2))
    tensor = torch.ones(3)
    dist.all_reduce(tensor, group=group)
    if rank == 1:
        time.sleep(3)
        dist.all_reduce(torch.ones(5), group=group)  # late, but there: MPI has it complete
    else:
        began = time.monotonic()
        with pytest.raises(
            dist.DistBackendError,
            match=r"all_reduce\(op=SUM\) of torch.float32 \(5,\) over group .* timed out after 2 s.*missing: rank 1",
        ):
            dist.all_reduce(torch.ones(5), group=group)
        assert time.monotonic() - began < 10
        with pytest.raises(dist.DistBackendError, match="unusable since an earlier failure"):
            dist.all_reduce(torch.ones(5), group=group)
    dist.barrier()


def test_waiting_for_less_than_the_operation_takes(rank, size):
    if size == 1:
        pytest.skip("needs two ranks")
    if rank == 1:
        time.sleep(1)
    work = dist.all_reduce(torch.ones(3), async_op=True)
    if rank == 0:
        with pytest.raises(dist.DistBackendError, match="can be waited for again"):
            work.wait(timedelta(seconds=0.2))
    work.wait()


def test_a_destroyed_group_is_said_to_be(rank, size):
    group = dist.new_group(range(size))
    dist.barrier(group=group)
    dist.destroy_process_group(group)
    with pytest.raises(dist.DistBackendError, match="was destroyed"):
        group.allreduce([torch.ones(2)])


def test_bad_arguments_are_refused_at_once(rank, size):
    with pytest.raises(ValueError, match="must have"):
        dist.all_gather_into_tensor(torch.empty(3 * size + 1), torch.ones(3))
    with pytest.raises(ValueError, match="output splits"):
        dist.all_to_all_single(torch.empty(size), torch.empty(size), [5] * size, [1] * size)


def test_loader_processes_that_were_forked_work_and_have_no_part_in_the_group(rank, size):
    data = TensorDataset(torch.arange(20).float())
    loader = DataLoader(data, batch_size=5, num_workers=2, multiprocessing_context="fork")
    total = sum(batch.sum() for (batch,) in loader)
    dist.all_reduce(total)
    assert total.item() == 190 * size
    child = os.fork()
    if child == 0:
        try:
            dist.all_reduce(torch.ones(1))
        except dist.DistBackendError as error:
            os._exit(0 if "forked" in str(error) else 1)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_torchs_own_questions_are_answered(rank, size):
    assert dist.get_backend() == "mpi4py"
    assert dist.group.WORLD.rank() == rank
    assert dist.group.WORLD.size() == size
    assert dist.is_initialized()


def test_a_synchronous_send_is_over_when_the_receiver_takes_it(rank, size):
    if size == 1:
        pytest.skip("needs two ranks")
    if rank == 0:
        work = dist.group.WORLD.send([torch.tensor(5)], 1, synchronous=True)
        time.sleep(0.3)
        assert not work.is_completed()
        dist.send(torch.tensor(6), 1, tag=1)  # small, so that MPI takes it without the receiver
        assert work.wait()
    elif rank == 1:
        found = torch.tensor(0)
        dist.recv(found, 0, tag=1)
        dist.recv(found, 0)
        assert int(found) == 5


def test_nobody_waits_for_a_message_of_a_group_that_has_given_up(rank, size):
    if size == 1:
        pytest.skip("needs two ranks")
    group = dist.new_group(list(range(size)))
    if rank < 2:
        work = group.recv([torch.tensor(0)], 1 - rank)
        began = time.monotonic()
        group.give_up("rank 7 on elsewhere failed first")
        with pytest.raises(dist.DistBackendError, match=r"recv\(src=\d.*rank 7 on elsewhere failed first"):
            work.wait()
        assert time.monotonic() - began < 5
    dist.barrier()
    if rank < 2:
        group.send([torch.tensor(1)], 1 - rank)  # MPI still has the receive
    dist.barrier()
    dist.destroy_process_group(group)

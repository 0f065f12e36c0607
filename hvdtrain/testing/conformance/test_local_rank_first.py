"""On each node local rank 0 runs a block before the others do."""

import time

import pytest
import torch

from hvdtrain.errors import CollectiveError, HvdtrainError


def test_the_local_world_has_a_size(backend):
    assert backend.local_world_size == backend.topology.local_world_size
    assert 0 <= backend.local_rank < backend.local_world_size <= backend.world_size


def test_local_rank_zero_ends_its_block_before_the_others_begin_theirs(backend):
    for _ in range(3):
        with backend.local_rank_first():
            began = time.time()
            if backend.local_rank == 0:
                time.sleep(0.1)
            ended = time.time()
        times = backend.all_gather_object((backend.topology.node_rank, backend.local_rank, began, ended))
        for node, local_rank, start, _ in times:
            first = next(end for other, local, _, end in times if (other, local) == (node, 0))
            assert local_rank == 0 or start >= first


def test_nested_blocks_keep_their_order(backend):
    events = []
    with backend.local_rank_first():
        with backend.local_rank_first():
            events.append(time.time())
        events.append(time.time())
    with backend.local_rank_first():
        events.append(time.time())
    everyone = backend.all_gather_object((backend.topology.node_rank, backend.local_rank, events))
    for node, local_rank, own in everyone:
        first = next(stamps for other, local, stamps in everyone if (other, local) == (node, 0))
        assert local_rank == 0 or (own[0] >= first[1] and own[2] >= first[2])


def test_an_exception_that_the_first_rank_catches_is_the_others_too(backend):
    began = time.monotonic()
    kind = ValueError if backend.local_rank == 0 else CollectiveError
    with pytest.raises(kind, match="no such file"), backend.local_rank_first():
        raise ValueError("no such file")
    assert time.monotonic() - began < 15
    with backend.local_rank_first():
        pass
    assert int(backend.all_reduce(torch.tensor(1))) == backend.world_size


def test_an_exception_of_another_rank_is_its_own(backend):
    if backend.local_rank == backend.local_world_size - 1:
        with pytest.raises(ValueError, match="mine"), backend.local_rank_first():
            raise ValueError("mine")
    else:
        with backend.local_rank_first():
            pass
    assert int(backend.all_reduce(torch.tensor(1))) == backend.world_size


def test_the_wait_has_a_bound_and_names_whom_it_waited_for(backend):
    if backend.local_rank == 0:
        with backend.local_rank_first():
            time.sleep(1.5 if backend.local_world_size > 1 else 0)
    else:
        late = pytest.raises(CollectiveError, match=r"waited 0.2 s for rank \d+, the first on")
        with late, backend.local_rank_first(timeout_s=0.2):
            pass
    backend.barrier()


@pytest.mark.parametrize(
    "call",
    [
        lambda b, group: b.all_reduce(torch.ones(1)),
        lambda b, group: b.barrier(),
        lambda b, group: b.broadcast_object("x"),
        lambda b, group: b.gather(torch.ones(1)),
        lambda b, group: b.recv(99),
        lambda b, group: group.all_reduce(torch.ones(1)),
    ],
    ids=["all_reduce", "barrier", "object", "gather", "recv", "group"],
)
def test_a_collective_inside_is_refused_on_every_rank(backend, call):
    group = backend.group(list(range(backend.world_size)))
    with backend.local_rank_first():
        with backend.local_rank_first():
            pass
        with pytest.raises(HvdtrainError, match="local_rank_first"):
            call(backend, group)
    assert int(group.all_reduce(torch.tensor(1))) == backend.world_size

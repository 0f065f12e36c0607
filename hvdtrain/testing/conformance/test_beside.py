"""What ranks agree on beside the engine."""

import pytest
import torch

from hvdtrain.errors import CollectiveError


def test_every_rank_gets_every_ranks_text_time_after_time(backend):
    for number in range(5):
        texts = backend.agree_beside("a test", f"{number} from rank {backend.rank} é\n")
        assert texts == [f"{number} from rank {rank} é\n" for rank in range(backend.world_size)]


def test_long_and_empty_texts_arrive(backend):
    mine = "" if backend.rank else "x" * 100_000
    assert backend.agree_beside("a test", mine) == ["x" * 100_000, *[""] * (backend.world_size - 1)]


def test_an_operation_under_way_is_not_disturbed(backend):
    pending = backend.all_reduce(torch.full((1000,), float(backend.rank)), async_op=True)
    texts = backend.agree_beside("a test", str(backend.rank))
    assert texts == [str(rank) for rank in range(backend.world_size)]
    assert torch.equal(pending.wait(), torch.full((1000,), float(sum(range(backend.world_size)))))


def test_a_region_names_the_engines_failure_and_leaves_the_users_alone(backend):
    with (
        pytest.raises(CollectiveError, match=rf"a test failed on rank {backend.rank}.*: NCCL is unwell") as caught,
        backend.region("tests", "a test"),
    ):
        raise RuntimeError("NCCL is unwell")
    assert isinstance(caught.value.__cause__, RuntimeError)
    for own in (RuntimeError("shapes cannot be multiplied"), ValueError("NCCL"), CollectiveError("as it is")):
        with pytest.raises(type(own)) as kept, backend.region("tests", "a test"):
            raise own
        assert kept.value is own
    backend.barrier()


def test_groups_know_their_place(backend):
    members = list(range(0, backend.world_size, 2))
    group = backend.group(members)
    assert (group is None) is (backend.rank not in members)
    if group is not None:
        assert (group.world_size, group.ranks[group.rank]) == (len(members), backend.rank)
        assert group.ranks == tuple(members)
    assert backend.ranks == tuple(range(backend.world_size))

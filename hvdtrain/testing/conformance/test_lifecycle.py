"""A running backend and its place in the job."""

import pytest
import torch

from hvdtrain.errors import HvdtrainError


def test_starting_twice_is_refused_and_harmless(backend):
    with pytest.raises(HvdtrainError, match="already running"):
        backend.start()
    assert int(backend.all_reduce(torch.tensor(1))) == backend.world_size


def test_the_topology_is_the_same_story_on_every_rank(backend):
    everyone = backend.all_gather_object(backend.topology)
    assert [t.rank for t in everyone] == list(range(backend.world_size))
    assert {t.world_size for t in everyone} == {backend.world_size}
    places = {(t.node_rank, t.local_rank) for t in everyone}
    assert len(places) == backend.world_size
    assert len(set(backend.all_gather_object(backend.detection.job_id))) == 1

"""A backend ends without a trace, and begins again if it says that it can. The plugin runs this last."""

import threading
import warnings

import pytest
import torch

from hvdtrain.errors import CollectiveError, HvdtrainError


def test_stop_leaves_nothing_behind_and_starting_again_is_as_declared(backend):
    for round_number in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            backend.stop()
        assert [t.name for t in threading.enumerate() if t.name.startswith("hvdtrain")] == []
        assert not (torch.distributed.is_available() and torch.distributed.is_initialized())
        with pytest.raises(CollectiveError, match="not running"):
            backend.barrier()
        backend.stop()  # again changes nothing
        if not backend.restartable:
            with pytest.raises(HvdtrainError, match="second time"):
                backend.start()
            return
        backend.start()
        found = backend.all_gather_object((backend.rank, round_number))
        assert found == [(rank, round_number) for rank in range(backend.world_size)]

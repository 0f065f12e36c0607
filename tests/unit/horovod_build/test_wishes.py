"""The flags of install-horovod are checked before anything is looked at."""

from __future__ import annotations

import pytest

from hvdtrain.errors import ConfigError
from hvdtrain.horovod_build.wishes import Wishes


def test_the_defaults_choose_by_what_is_there():
    wishes = Wishes()
    assert (wishes.mpi, wishes.gloo, wishes.nccl, wishes.capabilities, wishes.source) == (None, True, "auto", (), None)


def test_capabilities_are_sorted_by_number_and_given_once():
    assert Wishes(cuda_arch="10.0, 9.0,8.0,9.0").capabilities == ("8.0", "9.0", "10.0")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mpi": False, "gloo": False}, "--no-mpi with --no-gloo leaves Horovod nothing to talk over"),
        ({"cuda_arch": "sm_80"}, "--cuda-arch 'sm_80': write compute capabilities as in 8.0,9.0"),
        ({"cuda_arch": "80"}, "--cuda-arch '80'"),
        ({"cuda_arch": "8.0", "nccl": "off"}, "--nccl off compiles nothing"),
        ({"nccl": "yes"}, "--nccl must be one of auto, on, off, got 'yes'"),
        ({"jobs": 0}, "--jobs must be at least 1, got 0"),
    ],
)
def test_what_cannot_work_is_refused(values, message):
    with pytest.raises(ConfigError) as caught:
        Wishes(**values)
    assert message in str(caught.value)

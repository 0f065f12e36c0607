"""What Horovod finds in its environment for each setting, and which settings are refused for these ranks; no Horovod is needed."""

from __future__ import annotations

from dataclasses import fields

import pytest

from hvdtrain.backends.hvd import settings
from hvdtrain.errors import ConfigError
from hvdtrain.settings.horovod_config import HorovodConfig

NO_GROUPS = {"process_sets": False}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {}),
        ({"fusion_threshold_mb": 0}, {"HOROVOD_FUSION_THRESHOLD": "0"}),
        ({"fusion_threshold_mb": 1.5}, {"HOROVOD_FUSION_THRESHOLD": str(3 * 2**19)}),
        ({"cycle_time_ms": 2.5}, {"HOROVOD_CYCLE_TIME": "2.5"}),
        ({"cache_capacity": 0}, {"HOROVOD_CACHE_CAPACITY": "0"}),
        ({"autotune": True, "autotune_log": "a.csv"}, {"HOROVOD_AUTOTUNE": "1", "HOROVOD_AUTOTUNE_LOG": "a.csv"}),
        ({"hierarchical_allreduce": True}, {"HOROVOD_HIERARCHICAL_ALLREDUCE": "1"}),
        ({"hierarchical_allgather": True}, {"HOROVOD_HIERARCHICAL_ALLGATHER": "1"}),
        ({"timeline": "t", "timeline_mark_cycles": True}, {"HOROVOD_TIMELINE": "t", "HOROVOD_TIMELINE_MARK_CYCLES": "1"}),
        ({"stall_check_s": 0}, {"HOROVOD_STALL_CHECK_DISABLE": "1"}),
        ({"stall_check_s": 2.1}, {"HOROVOD_STALL_CHECK_TIME_SECONDS": "3"}),
        ({"stall_shutdown_s": 0}, {}),
        ({"stall_shutdown_s": 90}, {"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "90"}),
        ({"process_sets": True}, {"HOROVOD_DYNAMIC_PROCESS_SETS": "1"}),
        ({"compression": "fp16", "op": "adasum", "gradient_predivide_factor": 1.0, "num_groups": 3}, {}),  # no variables
    ],
    ids=str,
)  # fmt: skip
def test_each_setting_is_said_to_horovod_in_its_own_words(options, expected):
    assert settings.variables(HorovodConfig(**{**NO_GROUPS, **options})) == expected


def test_every_field_is_a_variable_or_known_to_be_none():
    here = {field for _, field, _ in settings._VARIABLES}
    without = {"compression", "op", "gradient_predivide_factor", "num_groups"}  # the replica's own
    assert here | without == {field.name for field in fields(HorovodConfig)} == set(settings.NAMES)
    assert not here & without


@pytest.mark.parametrize(
    ("options", "fuses_nothing"), [({}, True), ({"num_groups": 0}, False), ({"autotune": True}, False)], ids=str
)
def test_horovod_fuses_nothing_unless_it_is_left_to_it(options, fuses_nothing):
    assert (settings.defaults(HorovodConfig(**options)) == {"HOROVOD_FUSION_THRESHOLD": "0"}) is fuses_nothing


@pytest.mark.parametrize(
    ("options", "world_size", "mpi", "nccl", "words"),
    [
        ({"op": "adasum"}, 3, True, False, "power of two of ranks, got 3"),
        ({"op": "adasum"}, 4, False, True, "needs a Horovod with MPI"),
        ({"op": "adasum"}, 4, True, False, None),
        ({"hierarchical_allreduce": True}, 2, True, False, "no NCCL"),
        ({"hierarchical_allreduce": True}, 2, False, True, None),
        ({"hierarchical_allgather": True}, 2, False, True, "needs a Horovod with MPI"),
        ({"hierarchical_allgather": True}, 2, True, False, None),
    ],
    ids=str,
)
def test_what_these_ranks_or_this_horovod_cannot_do_is_refused(options, world_size, mpi, nccl, words):
    config = HorovodConfig(**options)
    if words is None:
        settings.check(config, world_size, mpi=mpi, nccl=nccl)
        return
    with pytest.raises(ConfigError, match=words):
        settings.check(config, world_size, mpi=mpi, nccl=nccl)

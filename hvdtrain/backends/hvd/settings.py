"""Each of Horovod's settings once: its flag and what it may be are `HorovodConfig`'s fields, its variable stands here.

What depends on the ranks or on how Horovod was built is checked here; nothing is set.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from hvdtrain.errors import ConfigError
from hvdtrain.settings.horovod_config import HorovodConfig

NAMES = tuple(field.name for field in fields(HorovodConfig))


def _one_if(value: Any) -> int | None:
    return 1 if value else None


def _whole_seconds(value: float | None) -> int | None:
    return math.ceil(value) if value else None


# Variable, the field that it comes from, and its value; None leaves it unset.
_VARIABLES: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    ("HOROVOD_FUSION_THRESHOLD", "fusion_threshold_mb", lambda mib: None if mib is None else int(mib * 2**20)),
    ("HOROVOD_CYCLE_TIME", "cycle_time_ms", lambda ms: ms),
    ("HOROVOD_CACHE_CAPACITY", "cache_capacity", lambda count: count),
    ("HOROVOD_AUTOTUNE", "autotune", _one_if),
    ("HOROVOD_AUTOTUNE_LOG", "autotune_log", lambda file: file),
    ("HOROVOD_HIERARCHICAL_ALLREDUCE", "hierarchical_allreduce", _one_if),
    ("HOROVOD_HIERARCHICAL_ALLGATHER", "hierarchical_allgather", _one_if),
    ("HOROVOD_TIMELINE", "timeline", lambda file: file),
    ("HOROVOD_TIMELINE_MARK_CYCLES", "timeline_mark_cycles", _one_if),
    ("HOROVOD_STALL_CHECK_TIME_SECONDS", "stall_check_s", _whole_seconds),
    ("HOROVOD_STALL_CHECK_DISABLE", "stall_check_s", lambda seconds: 1 if seconds == 0 else None),
    ("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "stall_shutdown_s", _whole_seconds),
    ("HOROVOD_DYNAMIC_PROCESS_SETS", "process_sets", _one_if),
)


def variables(config: HorovodConfig) -> dict[str, str]:
    """What Horovod must find in the environment when it starts."""
    values = {name: text(getattr(config, field)) for name, field, text in _VARIABLES}
    return {name: str(value) for name, value in values.items() if value is not None}


def defaults(config: HorovodConfig) -> dict[str, str]:
    """Settings that serve packs better than Horovod's own (docs/performance.md), where nobody has chosen any."""
    if config.num_groups is None and not config.autotune:
        # Packs are fused already. Fusing them again copies, and makes the order of a sum a matter of timing.
        return {"HOROVOD_FUSION_THRESHOLD": "0"}
    return {}


def check(config: HorovodConfig, world_size: int, *, mpi: bool, nccl: bool) -> None:
    """Refuse what these ranks, or this Horovod, cannot do.

    Args:
        config: What is asked.
        world_size: The number of ranks.
        mpi: Whether Horovod was built with MPI.
        nccl: Whether it was built with NCCL.

    Raises:
        ConfigError: Names the setting and the remedy.
    """
    if config.op == "adasum":
        if world_size & (world_size - 1):
            raise ConfigError(
                f"--horovod.op adasum needs a power of two of ranks, got {world_size}; start 2, 4, 8, ..."
            )
        if not mpi:
            raise ConfigError("--horovod.op adasum needs a Horovod with MPI: hvdtrain install-horovod --mpi --force")
    if config.hierarchical_allreduce and not nccl:
        raise ConfigError(
            "--horovod.hierarchical-allreduce is an algorithm of Horovod's NCCL operations, and this Horovod has no NCCL: "
            "hvdtrain install-horovod --nccl on --force, or leave it out"
        )
    if config.hierarchical_allgather and not mpi:
        raise ConfigError("--horovod.hierarchical-allgather needs a Horovod with MPI")

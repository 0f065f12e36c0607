"""Whether loader processes have room to hand their batches over: they do it in ``/dev/shm``, which is small in containers."""

from __future__ import annotations

import os
from typing import Any

from hvdtrain.data.loader import look_at_samples
from hvdtrain.data.nested import memory_bytes
from hvdtrain.errors import ConfigError

_PREFETCH = 2  # torch's DataLoader keeps so many batches ready for each process
_FOLDER = "/dev/shm"


def check_shared_memory(
    dataset: Any,
    *,
    batch_size: int,
    workers: int,
    ranks: int,
    folder: str = _FOLDER,
    index: Any = 0,
    prefetch_factor: int | None = None,
    **processes: Any,
) -> None:
    """Refuse loader processes whose batches would not fit; they would die of SIGBUS in the middle of an epoch.

    Args:
        dataset: One sample is loaded, to see how large it is.
        batch_size: Samples of a rank's batch.
        workers: Loader processes of a rank.
        ranks: On this node.
        folder: Where shared memory lies.
        index: Of the sample that is loaded.
        prefetch_factor: Batches ahead of each process.
        processes: Their further arguments for `hvdtrain.data.loader.make_loader`.

    Raises:
        ConfigError: There is less free than the batches on their way need; says how much, and what to do.
    """
    if not workers or len(dataset) == 0 or not os.path.isdir(folder):
        return
    batch_size = min(batch_size, len(dataset))
    (one,) = look_at_samples(dataset, [index], memory_bytes, workers=workers, **processes)
    ahead = prefetch_factor or _PREFETCH
    needed = one * batch_size * workers * ahead * ranks
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise ConfigError(
            f"--workers {workers}: the batches on their way from loader processes need about {_mib(needed)} MiB in {folder} "
            f"({ranks} ranks on this host x {workers} processes x {ahead} batches of {batch_size} samples), and "
            f"{_mib(free)} MiB are free. In Docker: --shm-size {max(1, -(-needed // 2**30))}g (or --ipc=host); in Kubernetes an "
            "emptyDir of medium Memory at /dev/shm; or fewer --workers, or a smaller batch"
        )


def _mib(size: int) -> int:
    return -(-size // 2**20)

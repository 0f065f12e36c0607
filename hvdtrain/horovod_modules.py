"""Which module of Horovod is which of ours: the one table of ``hvdtrain migrate`` and of the way in."""

from __future__ import annotations

OURS = "hvdtrain.horovod"
OUR_ELASTIC = "hvdtrain.horovod.elastic"
MODULES = {
    "horovod": OURS,
    "horovod.runner": OURS,
    "horovod.torch": OURS,
    "horovod.torch.compression": OURS,
    "horovod.torch.functions": OURS,
    "horovod.torch.mpi_ops": OURS,
    "horovod.torch.optimizer": OURS,
    "horovod.torch.sync_batch_norm": OURS,
    "horovod.torch.elastic": OUR_ELASTIC,
    "horovod.torch.elastic.sampler": OUR_ELASTIC,
    "horovod.torch.elastic.state": OUR_ELASTIC,
    "horovod.common": OURS,
    "horovod.common.elastic": OUR_ELASTIC,
    "horovod.common.exceptions": OUR_ELASTIC,
    "horovod.common.process_sets": OURS,
}
"""Horovod's module, and the one of ours that has its public names."""

_OPERATIONS = """
    init shutdown is_initialized start_timeline stop_timeline size local_size cross_size rank local_rank cross_rank
    mpi_threads_supported mpi_enabled mpi_built gloo_enabled gloo_built nccl_built ddl_built ccl_built cuda_built rocm_built
    allreduce allreduce_ allreduce_async allreduce_async_
    grouped_allreduce grouped_allreduce_ grouped_allreduce_async grouped_allreduce_async_ sparse_allreduce_async
    allgather allgather_async grouped_allgather grouped_allgather_async
    broadcast broadcast_ broadcast_async broadcast_async_ alltoall alltoall_async
    reducescatter reducescatter_async grouped_reducescatter grouped_reducescatter_async
    join barrier poll synchronize ProcessSet global_process_set add_process_set remove_process_set
    Average Sum Adasum Min Max Product HorovodInternalError Compression DistributedOptimizer SyncBatchNorm
    allgather_object broadcast_object broadcast_optimizer_state broadcast_parameters elastic
"""
OPERATIONS = frozenset(_OPERATIONS.split())
"""The public names of horovod.torch 0.28.1."""

NAMES = {
    OURS: OPERATIONS | {"run"},
    OUR_ELASTIC: frozenset(
        {"TorchState", "ObjectState", "State", "ElasticSampler", "run", "HorovodInternalError", "HostsUpdatedInterrupt"}
    ),
}
"""What our two modules have, of what Horovod's have."""

_REFUSED = {
    "tensorflow": "TensorFlow",
    "keras": "Keras",
    "_keras": "Keras",
    "mxnet": "MXNet",
    "spark": "Spark",
    "ray": "Ray",
}


def why_not_offered(module: str) -> str:
    """Why a module of Horovod has no counterpart here, in one sentence; "" if it has one."""
    if module in MODULES:
        return ""
    part = module.split(".")[1]
    if part in _REFUSED:
        what = _REFUSED[part]
        if part in ("spark", "ray"):
            return (
                f"{module}: hvdtrain starts no ranks through {what}; start them with torchrun, mpirun, srun or "
                "hvdtrain.spawn (docs/clusters.md), or stay with Horovod for this script"
            )
        return f"{module}: hvdtrain is for PyTorch, and has nothing for {what}; this script stays with Horovod"
    return f"{module} is an inner part of Horovod that hvdtrain does not offer; horovod.torch has its public names"

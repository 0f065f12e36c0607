"""Horovod's API for PyTorch on every engine: ``import hvdtrain.horovod as hvd`` in the place of ``import horovod.torch as hvd``.

The engine is the one that fits the launcher: Gloo or NCCL under torchrun, MPI under mpirun, Horovod itself under horovodrun where
it is installed, none for a single process. Names and arguments are those of Horovod 0.28.1; docs/horovod_scripts.md says where
results differ, and why.
"""

from __future__ import annotations

import importlib
from typing import Any

from hvdtrain.errors import HorovodInternalError as HorovodInternalError
from hvdtrain.horovod.compression import Compression as Compression
from hvdtrain.horovod.features import ccl_built as ccl_built
from hvdtrain.horovod.features import cuda_built as cuda_built
from hvdtrain.horovod.features import ddl_built as ddl_built
from hvdtrain.horovod.features import gloo_built as gloo_built
from hvdtrain.horovod.features import gloo_enabled as gloo_enabled
from hvdtrain.horovod.features import mpi_built as mpi_built
from hvdtrain.horovod.features import mpi_enabled as mpi_enabled
from hvdtrain.horovod.features import mpi_threads_supported as mpi_threads_supported
from hvdtrain.horovod.features import nccl_built as nccl_built
from hvdtrain.horovod.features import rocm_built as rocm_built
from hvdtrain.horovod.functions import allgather_object as allgather_object
from hvdtrain.horovod.functions import broadcast_object as broadcast_object
from hvdtrain.horovod.functions import broadcast_optimizer_state as broadcast_optimizer_state
from hvdtrain.horovod.functions import broadcast_parameters as broadcast_parameters
from hvdtrain.horovod.gradients import allgather as allgather
from hvdtrain.horovod.gradients import allreduce as allreduce
from hvdtrain.horovod.gradients import alltoall as alltoall
from hvdtrain.horovod.gradients import broadcast as broadcast
from hvdtrain.horovod.gradients import grouped_allgather as grouped_allgather
from hvdtrain.horovod.gradients import grouped_allreduce as grouped_allreduce
from hvdtrain.horovod.gradients import grouped_reducescatter as grouped_reducescatter
from hvdtrain.horovod.gradients import reducescatter as reducescatter
from hvdtrain.horovod.handles import poll as poll
from hvdtrain.horovod.handles import synchronize as synchronize
from hvdtrain.horovod.importing import VERSION as VERSION
from hvdtrain.horovod.operations import allgather_async as allgather_async
from hvdtrain.horovod.operations import allreduce_ as allreduce_
from hvdtrain.horovod.operations import allreduce_async as allreduce_async
from hvdtrain.horovod.operations import allreduce_async_ as allreduce_async_
from hvdtrain.horovod.operations import alltoall_async as alltoall_async
from hvdtrain.horovod.operations import barrier as barrier
from hvdtrain.horovod.operations import broadcast_ as broadcast_
from hvdtrain.horovod.operations import broadcast_async as broadcast_async
from hvdtrain.horovod.operations import broadcast_async_ as broadcast_async_
from hvdtrain.horovod.operations import grouped_allgather_async as grouped_allgather_async
from hvdtrain.horovod.operations import grouped_allreduce_ as grouped_allreduce_
from hvdtrain.horovod.operations import grouped_allreduce_async as grouped_allreduce_async
from hvdtrain.horovod.operations import grouped_allreduce_async_ as grouped_allreduce_async_
from hvdtrain.horovod.operations import grouped_reducescatter_async as grouped_reducescatter_async
from hvdtrain.horovod.operations import join as join
from hvdtrain.horovod.operations import reducescatter_async as reducescatter_async
from hvdtrain.horovod.operations import sparse_allreduce_async as sparse_allreduce_async
from hvdtrain.horovod.optimizer import DistributedOptimizer as DistributedOptimizer
from hvdtrain.horovod.process_sets import ProcessSet as ProcessSet
from hvdtrain.horovod.process_sets import global_process_set as global_process_set
from hvdtrain.horovod.reductions import Adasum as Adasum
from hvdtrain.horovod.reductions import Average as Average
from hvdtrain.horovod.reductions import Max as Max
from hvdtrain.horovod.reductions import Min as Min
from hvdtrain.horovod.reductions import Product as Product
from hvdtrain.horovod.reductions import Sum as Sum
from hvdtrain.horovod.running import run as run
from hvdtrain.horovod.state import add_process_set as add_process_set
from hvdtrain.horovod.state import cross_rank as cross_rank
from hvdtrain.horovod.state import cross_size as cross_size
from hvdtrain.horovod.state import init as init
from hvdtrain.horovod.state import is_homogeneous as is_homogeneous
from hvdtrain.horovod.state import is_initialized as is_initialized
from hvdtrain.horovod.state import local_rank as local_rank
from hvdtrain.horovod.state import local_size as local_size
from hvdtrain.horovod.state import rank as rank
from hvdtrain.horovod.state import remove_process_set as remove_process_set
from hvdtrain.horovod.state import shutdown as shutdown
from hvdtrain.horovod.state import size as size
from hvdtrain.horovod.sync_batch_norm import SyncBatchNorm as SyncBatchNorm
from hvdtrain.horovod.tracing import start_timeline as start_timeline
from hvdtrain.horovod.tracing import stop_timeline as stop_timeline
from hvdtrain.horovod_modules import NAMES

__all__ = sorted({*NAMES[__name__], "is_homogeneous"})  # noqa: PLE0605 - what a script with `import *` is given, elastic too

__version__ = VERSION
"""Of the Horovod whose API this is."""


def __getattr__(name: str) -> Any:
    """``hvd.elastic``, loaded when it is first used."""
    if name == "elastic":
        return importlib.import_module("hvdtrain.horovod.elastic")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""What this build and this job have, in the words of Horovod's API."""

from __future__ import annotations

import importlib.util

import torch
import torch.distributed as dist

from hvdtrain.horovod.passing_through import by_engine
from hvdtrain.horovod.state import job, real


def _engine() -> str:
    return job().backend.engine if job().backend.name == "torch" else job().backend.name


@by_engine(real)
def mpi_built() -> bool:
    """Whether MPI can carry the bytes here: mpi4py is installed."""
    return importlib.util.find_spec("mpi4py") is not None


@by_engine(real)
def mpi_enabled() -> bool:
    """Whether MPI carries this job's bytes."""
    return _engine() == "mpi"


@by_engine(real)
def mpi_threads_supported() -> bool:
    """Whether MPI may be called from several threads: the engine sees to it.

    Raises:
        ValueError: MPI does not carry this job's bytes.
    """
    if not mpi_enabled():
        raise ValueError(f"MPI does not carry this job's bytes, {_engine()} does; start it with mpirun")
    return True


@by_engine(real)
def gloo_built() -> bool:
    """Whether this torch has Gloo."""
    return dist.is_available() and dist.is_gloo_available()


@by_engine(real)
def gloo_enabled() -> bool:
    """Whether Gloo carries this job's bytes."""
    return _engine() == "gloo"


@by_engine(real)
def nccl_built() -> int:
    """NCCL's version as one number, 22703 for 2.27.3, where it can be used; else 0."""
    if not (torch.cuda.is_available() and dist.is_available() and dist.is_nccl_available()):
        return 0
    major, minor, patch = torch.cuda.nccl.version()[:3]
    return int(major * 10000 + minor * 100 + patch)


@by_engine(real)
def cuda_built() -> bool:
    """Whether this torch was built for CUDA."""
    return torch.version.cuda is not None


@by_engine(real)
def rocm_built() -> bool:
    """Whether this torch was built for ROCm."""
    return torch.version.hip is not None


@by_engine(real)
def ddl_built() -> bool:
    """IBM's DDL is not offered."""
    return False


@by_engine(real)
def ccl_built() -> bool:
    """Intel's oneCCL is not offered."""
    return False

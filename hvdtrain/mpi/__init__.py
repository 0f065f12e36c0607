"""An MPI process group for the PyTorch that you have, usable alone::

    import hvdtrain.mpi
    torch.distributed.init_process_group("mpi4py")     # under mpirun or srun; no MASTER_ADDR to set

PyTorch's own `mpi` backend needs a PyTorch built from source. This one is Python over mpi4py; see docs/mpi.md.
"""

from hvdtrain.mpi.registration import Options, give_up, register, shut_down

__all__ = ["Options", "give_up", "register", "shut_down"]

register()

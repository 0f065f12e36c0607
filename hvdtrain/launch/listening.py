"""What engines are told so that ranks of one node listen to no other host, and to as few others of the node as can be.

Nothing is said between nodes, where they must be reached.
"""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

from hvdtrain.launch.environment import given, not_given
from hvdtrain.topology import Topology

_BTL = "OMPI_MCA_btl"
_OPENIB = "^openib"  # what `horovodrun --mpi` sets; nobody's choice
_SEGMENT_BYTES = 16 * 2**20  # Open MPI 5's part of the shared memory for each rank; 4 takes 4 MiB
_LOOPBACKS = ("lo", "lo0")  # Linux, BSD and macOS


def mpi(topology: Topology, shared_memory: Path = Path("/dev/shm")) -> dict[str, str]:
    """The variable that keeps Open MPI from opening TCP ports on one node, where memory is shared.

    A rank that has been sent fewer bytes than Open MPI's greeting is long waits for the rest inside MPI, without a bound
    (seen with 5.0.11): whoever reaches the port could make it stand still. Where the shared memory has no room for all
    ranks of the node (64 MB in a container, as Docker has it), TCP is what the ranks have, and stays.

    Args:
        topology: Of the job.
        shared_memory: Where Open MPI puts its files; another folder only in tests.
    """
    if topology.num_nodes > 1 or _free_bytes(shared_memory) < topology.world_size * _SEGMENT_BYTES:
        return {}
    if given(_BTL) == _OPENIB:
        return {_BTL: f"{_OPENIB},tcp"}
    return not_given({_BTL: "^tcp"})


def gloo(topology: Topology) -> dict[str, str]:
    """The variable that binds Gloo to the loopback interface on one node: it binds to what the host's name resolves to."""
    if topology.num_nodes > 1:
        return {}
    loopback = _loopback()
    return not_given({"GLOO_SOCKET_IFNAME": loopback}) if loopback else {}


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _loopback() -> str:
    """The name of the loopback interface, "" if it cannot be used here."""
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError:
        return ""
    present = {name for _, name in socket.if_nameindex()}
    return next((name for name in _LOOPBACKS if name in present), "")

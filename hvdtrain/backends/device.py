"""Which device a rank computes on."""

from __future__ import annotations

import torch

from hvdtrain.errors import BackendUnavailable, ConfigError, LaunchError
from hvdtrain.launch.environment import given
from hvdtrain.topology import Topology


def choose_device(wanted: str, topology: Topology) -> torch.device:
    """Return this rank's device; a GPU is made the current one.

    Args:
        wanted: "auto" for a GPU where there is one, "cpu", "cuda" for the one that belongs to this rank, "cuda:1" for another.
        topology: Says how many ranks share this node.

    Raises:
        ConfigError: There is no such device.
        BackendUnavailable: A GPU was asked for, and this process sees none.
        LaunchError: There are more ranks on this node than GPUs.
    """
    try:
        device = torch.device(
            "cuda" if wanted == "auto" and torch.cuda.is_available() else wanted.replace("auto", "cpu")
        )
    except RuntimeError as error:
        raise ConfigError(f"--device {wanted}: {error}") from error
    if device.type != "cuda":
        return device
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if present == 0:
        raise BackendUnavailable(
            f"--device {wanted}: this process sees no CUDA GPU (torch {torch.__version__}, CUDA_VISIBLE_DEVICES="
            f"{given('CUDA_VISIBLE_DEVICES') or 'unset'}); use --device cpu, or start the container with its GPU runtime"
        )
    if device.index is not None:
        if device.index >= present:
            raise ConfigError(f"--device {wanted}: this process sees {present} GPU(s), numbered from 0")
    elif topology.local_world_size == 1:
        device = torch.device("cuda", 0)
    elif topology.local_world_size > present:
        raise LaunchError(
            f"{topology.local_world_size} ranks were started on this node, which shows {present} GPU(s); start at "
            f"most {present} ranks a node, or use --device cpu"
        )
    else:
        device = torch.device("cuda", topology.local_rank)
    torch.cuda.set_device(device)
    return device

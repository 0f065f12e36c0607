"""Where a run runs: what a report says beside its curves."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from hvdtrain.launch.machine import this_machine
from hvdtrain.version import __version__

_MOST_PLACES = 64


def place_of(device: torch.device) -> str:
    """This process's host, and what it computes on there."""
    machine = this_machine()
    computes = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{machine.processor}, {machine.cpus} CPUs"
    )
    return f"{machine.host}: {computes}"


def surroundings(places: Sequence[str], **more: Any) -> dict[str, Any]:
    """What there is to know of a run's software and machines, as JSON has it.

    Args:
        places: From `place_of`, of all ranks.
        more: What else there is to say, first.
    """
    counted = Counter(places)
    said = [f"{count} x {place}" for place, count in counted.most_common(_MOST_PLACES)]
    rest = len(counted) - len(said)
    return {
        **more,
        "hvdtrain": __version__,
        "torch": str(torch.__version__),
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "threads": torch.get_num_threads(),
        "places": [*said, *([f"and {rest} others"] if rest > 0 else [])],
    }

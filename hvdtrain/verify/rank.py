"""What each process of a comparison runs: ``python -m hvdtrain.verify.rank CONFIG FOLDER``."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from hvdtrain.launch.detect import detect
from hvdtrain.run import run_training
from hvdtrain.settings.config import TrainConfig
from hvdtrain.settings.flags import build, read_flags
from hvdtrain.settings.options import Component


def main() -> int:
    """Train as configured, and note it."""
    file, folder = sys.argv[1:]
    sys.path.append(os.getcwd())
    config: TrainConfig = build(TrainConfig, read_flags(TrainConfig, ["--config", file]))
    assert config.task is not None
    detection = detect()
    topology = detection.topology
    given = {
        "name": config.task.name, "args": dict(config.task.args), "folder": folder, "rank": topology.rank,
        "world_size": topology.world_size,
    }  # fmt: skip
    run_training(replace(config, task=Component("hvdtrain.verify.watching.Watched", given)), detection)
    return 0


if __name__ == "__main__":
    sys.exit(main())

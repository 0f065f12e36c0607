"""Python's logging as the command line sets it up: every line says which rank of which host it comes from."""

from __future__ import annotations

import logging

from hvdtrain.topology import Topology


def configure(topology: Topology | None, host: str, level: int = logging.WARNING) -> None:
    """Let log lines go to the standard error, unless somebody has set up logging already.

    Args:
        topology: This process's place; in a world of one, or where it is not known, lines name no rank.
        host: This machine's name.
        level: Of the least important lines.
    """
    logging.basicConfig(level=level, format=line_format(topology, host))


def line_format(topology: Topology | None, host: str) -> str:
    """The format of a line: ``WARNING rank 1 on node-a hvdtrain.run: ...``."""
    if topology is None or topology.world_size == 1:
        return "%(levelname)s %(name)s: %(message)s"
    where = f"rank {topology.rank} on {host}".replace("%", "%%")
    return f"%(levelname)s {where} %(name)s: %(message)s"

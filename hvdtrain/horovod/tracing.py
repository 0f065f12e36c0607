"""``hvd.start_timeline`` and ``hvd.stop_timeline``."""

from __future__ import annotations

import atexit
import os

from hvdtrain.horovod import timeline
from hvdtrain.horovod.passing_through import by_engine
from hvdtrain.horovod.state import rank, real


@by_engine(real)
def start_timeline(file_path: str | os.PathLike[str], mark_cycles: bool = False) -> None:
    """Record the operations of rank 0 into a Chrome trace, until `stop_timeline` or the program's end.

    Args:
        file_path: Replaced if it is there; on other ranks than 0 nothing is written.
        mark_cycles: Mark each batch of operations that were performed together.

    Raises:
        ValueError: ``hvd.init()`` has not been called, or a trace is being recorded.
        OutputError: The file cannot be written.
    """
    if rank() != 0:
        return
    timeline.begin(os.fspath(file_path), mark_cycles=mark_cycles)
    atexit.register(timeline.end)


@by_engine(real)
def stop_timeline() -> None:
    """Complete the trace that is being recorded, if one is.

    Raises:
        ValueError: ``hvd.init()`` has not been called.
        OutputError: The trace could not be written.
    """
    rank()
    atexit.unregister(timeline.end)
    timeline.end()

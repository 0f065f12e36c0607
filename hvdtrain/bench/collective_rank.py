"""What each rank of ``hvdtrain bench collectives`` runs: ``python -m hvdtrain.bench.collective_rank WISH CONTENDER FOLDER``.

WISH is a JSON file. Every call is timed by itself; a rank writes all its times into FOLDER.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import hvdtrain
from hvdtrain.bench.bandwidth import whole_size
from hvdtrain.bench.calls import BackendCalls, Calls, Copy
from hvdtrain.bench.collectives import COPY, RAW
from hvdtrain.bench.gathered import write_own

_WARM_UP = 3
_FEWEST, _MOST = 5, 500


def main() -> int:
    """Time every collective at every size."""
    file, contender, folder = sys.argv[1:]
    wish = json.loads(Path(file).read_text())
    torch.set_num_threads(1)
    with _calls(contender, wish) as calls:
        found = {
            collective: {
                str(size): _timed(calls, calls.prepared(collective, whole), wish["seconds"])
                for size in wish["sizes"]
                if (whole := whole_size(collective, size, calls.size))
            }
            for collective in ([COPY] if contender == COPY else wish["collectives"])
        }
    write_own(Path(folder), calls.rank, found)
    return 0


@contextmanager
def _calls(contender: str, wish: dict[str, Any]) -> Iterator[Calls]:
    if contender == COPY:
        yield Copy()
    elif contender == RAW:
        from hvdtrain.bench.raw_mpi import RawMpi  # noqa: PLC0415  (starts MPI, which only this contender may)

        yield RawMpi()
    else:
        with hvdtrain.init(contender, device=wish["device"]) as backend:
            yield BackendCalls(backend)


def _timed(calls: Calls, call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call, as many as fit into ``seconds`` on the slowest rank."""
    for _ in range(_WARM_UP):
        began = time.perf_counter()
        call()
        last = time.perf_counter() - began
    count = int(min(max(seconds / calls.most(last), _FEWEST), _MOST))
    times = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return times


if __name__ == "__main__":
    sys.exit(main())

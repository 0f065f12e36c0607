"""Are all ranks here, with the same software, and of one mind? Answered through the store, beside the engine.

For what is rare and small: a start, a change of structure. It asks the store again and again instead of blocking in it, so
that it may share the watch's connection, and so that a rank that failed, left or stays away is named.
"""

from __future__ import annotations

import json
import platform
import socket
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from hvdtrain.errors import CollectiveError, HvdtrainError, LaunchError
from hvdtrain.ranks.store import Store, StoreLost
from hvdtrain.ranks.watch import NullWatch
from hvdtrain.version import __version__

if TYPE_CHECKING:
    import torch.distributed as dist

_LABEL = "beside the engine"  # how the watch counts exchanges
_LOOK_S = 0.5  # how often a waiting rank looks what the others do instead
_LONGEST_PAUSE_S = 0.05


def exchange(
    store: Store | dist.Store,
    watch: NullWatch,
    key: str,
    mine: str,
    *,
    rank: int,
    world_size: int,
    timeout_s: float,
    what: str,
    failure: type[HvdtrainError] = CollectiveError,
    look: Callable[[list[int]], None] | None = None,
) -> list[str]:
    """Collect one small text of every rank on every rank; all of them must call it.

    Rank 0 collects, so that the store's work grows with the number of ranks and not with its square.

    Args:
        store: Connected with all ranks; nothing that blocks is asked of it.
        watch: Told what this rank waits for, and asked whether it is in vain.
        key: Different for every exchange over this store.
        mine: This rank's text.
        rank: This rank.
        world_size: Number of ranks.
        timeout_s: How long to wait for the others, in seconds.
        what: The occasion, for messages: "the start", "the agreement on the model's structure".
        failure: What is raised when ranks do not come.
        look: Called now and then with the ranks that have not come; raises if one of them never will.

    Returns:
        The texts, in rank order.

    Raises:
        RankFailure: Another rank reported a failure meanwhile.
        HvdtrainError: A ``failure``: some rank left, waits for this one in another operation, or did not come in time;
            names it.
    """
    if world_size == 1:
        return [mine]
    everyone = range(world_size)
    keys = [f"{key}/{other}" for other in everyone]
    together = f"{key}/all"
    awaited = keys if rank == 0 else [together]
    with watch.region(_LABEL, what, everyone):
        try:
            store.set(keys[rank], mine)
            end, pause = time.monotonic() + timeout_s, 0.001
            next_look = time.monotonic() + _LOOK_S
            while not store.check(awaited):
                watch.raise_if_failed()
                if watch.failure is not None:  # this rank's own: it has found one that left
                    raise failure(watch.failure.message)
                if time.monotonic() > next_look:
                    next_look = time.monotonic() + _LOOK_S
                    elsewhere = watch.elsewhere(_LABEL)
                    if elsewhere:
                        raise failure(f"rank {rank} is at {what}, and {elsewhere}")
                    if look is not None:
                        look([other for other in everyone if not store.check([keys[other]])])
                if time.monotonic() > end:
                    absent = [other for other in everyone if not store.check([keys[other]])] or [0]
                    raise failure(
                        f"rank {rank} waited {timeout_s:g} s for {_named(absent)} in {what}{watch.missing(_LABEL, absent)}"
                    )
                time.sleep(pause)
                pause = min(_LONGEST_PAUSE_S, pause * 1.5)
            if rank == 0:
                store.set(together, json.dumps([store.get(each).decode() for each in keys]))
            texts: list[str] = json.loads(store.get(together))
        except (StoreLost, RuntimeError) as error:
            raise failure(f"rank {rank} lost the ranks' store in {what}: {error}") from error
    return texts


def software() -> dict[str, str]:
    """What must be the same on every host: what one rank pickles or expects the other may not understand."""
    return {
        "Python": platform.python_version().rpartition(".")[0],
        "torch": str(torch.__version__).partition("+")[0],
        "hvdtrain": __version__,
    }


def assemble(
    store: Store,
    watch: NullWatch,
    mine: Mapping[str, str],
    *,
    rank: int,
    world_size: int,
    timeout_s: float,
    look: Callable[[list[int]], None] | None = None,
) -> None:
    """Return when all ranks are here with the same software.

    Args:
        store: Connected with all ranks.
        watch: Of these ranks.
        mine: Names and versions on this rank.
        rank: This rank.
        world_size: Number of ranks.
        timeout_s: How long to wait for the others, in seconds.
        look: As for `exchange`.

    Raises:
        LaunchError: A rank did not come, or has other versions; names it and what it has.
    """
    texts = exchange(
        store, watch, "software", json.dumps([socket.gethostname(), mine]),
        rank=rank, world_size=world_size, timeout_s=timeout_s, what="the start", failure=LaunchError, look=look,
    )  # fmt: skip
    # Rank 0 compares itself with all, and the others with rank 0: so that whoever differs knows, and rank 0 too.
    here = socket.gethostname()
    for other in range(1, world_size) if rank == 0 else (0,):
        there, theirs = json.loads(texts[other])
        for name, version in mine.items():
            if theirs.get(name) != version:
                raise LaunchError(
                    f"rank {other} on {there} has {name} {theirs.get(name)}, and rank {rank} on {here} has {name} {version}: "
                    "install the same on every host"
                )


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"

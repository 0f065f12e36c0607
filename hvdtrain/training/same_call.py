"""Whether every rank calls `Trainer.fit` alike: other numbers of steps would leave the ranks waiting for each other."""

from __future__ import annotations

from typing import Any

from hvdtrain.backends.communicator import Communicator
from hvdtrain.errors import ConfigError


def check_same_call(communicator: Communicator, what: str, arguments: dict[str, Any]) -> None:
    """Compare arguments over the ranks; every rank must call it.

    Args:
        communicator: All ranks.
        what: What is called, for the message.
        arguments: By name; whatever has a telling ``repr``.

    Raises:
        ConfigError: On every rank; names each argument that differs, with its values and their ranks.
    """
    if communicator.wire.size == 1:
        return
    everyone = communicator.all_gather_object({name: repr(value) for name, value in arguments.items()})
    differing = []
    for name in arguments:
        ranks: dict[str, list[int]] = {}
        for rank, theirs in enumerate(everyone):
            ranks.setdefault(theirs.get(name, "missing"), []).append(rank)
        if len(ranks) > 1:
            said = [f"{value} on rank{'s' * (len(who) > 1)} {', '.join(map(str, who))}" for value, who in ranks.items()]
            differing.append(f"{name} is {' and '.join(said)}")
    if differing:
        raise ConfigError(f"the ranks called {what} differently: {'; '.join(differing)}. Every rank must give the same")

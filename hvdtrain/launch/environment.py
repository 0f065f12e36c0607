"""The environment as libraries read it when they start: the one place that changes it, and asks what the user has set.

What launchers say of a process is read by `hvdtrain.launch.detect` alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables within the context only: processes that this one starts later must not inherit them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def settle(values: Mapping[str, str]) -> None:
    """Set variables for good, for a library that reads them when it first needs them."""
    os.environ.update(values)


def given(name: str) -> str | None:
    """What a variable of a library, or of our own, was set to; None if it was not."""
    return os.environ.get(name)


def given_like(prefix: str) -> bool:
    """Whether any variable was set whose name begins so."""
    return any(name.startswith(prefix) for name in os.environ)


def not_given(values: Mapping[str, str]) -> dict[str, str]:
    """Those of our own choices that nobody has made already."""
    return {name: value for name, value in values.items() if name not in os.environ}


def address_given() -> bool:
    """Whether MASTER_ADDR or MASTER_PORT says where torch's rank 0 is to be found."""
    return any(name in os.environ for name in _ADDRESS)


def give_address(host: str, port: int, *, rank: int, world_size: int, local_rank: int) -> None:
    """Say to torch's ``env://`` where rank 0 is, and who this is, in so far as nobody has."""
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local_rank}
    settle(not_given({"MASTER_ADDR": host, "MASTER_PORT": str(port), **{k: str(v) for k, v in place.items()}}))

"""Messages between two ranks beside an engine that has none: one two-rank Gloo connection a pair.

A connection is made when its two ranks pass their first message, over the store by which the ranks met, and only they
take part. Nothing waits without a bound, and nothing for a rank after another has failed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from hvdtrain.backends.wire import Together, Work
from hvdtrain.launch.environment import given
from hvdtrain.ranks.engine_store import EngineStore
from hvdtrain.ranks.store import Store
from hvdtrain.ranks.watch import NullWatch


class Pairs:
    """This rank's connections to others.

    Args:
        store: By which the ranks met.
        rank: This rank in the world.
        timeout_s: Bound of each wait, in seconds.
        watch: Knows when another rank has failed.
        one_node: Whether all ranks are on this node.
    """

    def __init__(self, store: Store, rank: int, timeout_s: float, watch: NullWatch, *, one_node: bool) -> None:
        self._store = store.under("pairs")
        self._rank = rank
        self._timeout_s = timeout_s
        self._watch = watch
        self._one_node = one_node
        self._made: dict[int, Any] = {}
        self._stores: list[EngineStore] = []
        self._turns: dict[int, threading.Lock] = {}

    def send_receive(
        self, sent: Tensor | None, dst: int | None, out: Tensor | None, src: int | None, channel: int
    ) -> Work:
        """Do what `Wire.send_receive` does, between ranks of the world.

        Args:
            sent: Sent to ``dst``.
            dst: A rank of the world.
            out: Received from ``src``.
            src: A rank of the world.
            channel: Messages of one channel match those of no other: each group has its own.
        """
        works: list[Work] = []
        if out is not None and src is not None:
            works.append(self._begin(src, lambda pair: pair.recv([out], 1 - _place(self._rank, src), channel)))
        if sent is not None and dst is not None:
            works.append(self._begin(dst, lambda pair: pair.send([sent], 1 - _place(self._rank, dst), channel)))
        return Together(works)

    def close(self) -> None:
        """Close all connections; the other ranks are done with them."""
        self._made.clear()

    def _begin(self, peer: int, start: Callable[[Any], Work]) -> Work:
        made = self._made.get(peer)
        # To connect takes both ranks' time, and the other half of an exchange must not wait for it.
        return start(made) if made is not None else _Aside(lambda: start(self._connection(peer)).wait())

    def _connection(self, peer: int) -> Any:
        with self._turns.setdefault(peer, threading.Lock()):
            if peer not in self._made:
                self._made[peer] = self._connect(peer)
            return self._made[peer]

    def _connect(self, peer: int) -> Any:
        low, high = sorted((self._rank, peer))
        store = EngineStore(self._store.under(f"{low}-{high}"), self._timeout_s, self._look)
        store.set(f"here/{self._rank}", b"")
        store.wait([f"here/{peer}"])
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = timedelta(seconds=self._timeout_s)
        options._devices = [self._device()]
        group = gloo(store, _place(self._rank, peer), 2, options)
        self._stores.append(store)  # the group holds only the half of it that is C++
        return group

    def _look(self) -> None:
        self._watch.raise_if_failed()
        if self._watch.failure is not None:  # this rank's own words: the peer has left the program
            raise RuntimeError(self._watch.failure.message)

    def _device(self) -> Any:
        make = dist.ProcessGroupGloo.create_device
        if self._one_node:
            return make(hostname="127.0.0.1")
        interface = given("GLOO_SOCKET_IFNAME") or given("HOROVOD_GLOO_IFACE")
        return make(interface=interface) if interface else dist.ProcessGroupGloo.create_default_device()


class _Aside:
    """An operation in a thread of its own; it ends by itself."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="hvdtrain-pair", daemon=True)
        self._thread.start()

    def wait(self) -> object:
        """Block until it is over; raise what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return None

    def is_completed(self) -> bool:
        """Say whether `wait` would return at once."""
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error


def _place(rank: int, peer: int) -> int:
    """The rank of ``rank`` among itself and ``peer``."""
    return int(rank > peer)

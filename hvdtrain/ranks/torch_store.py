"""torch's own store, for what cannot do with the ranks': torch's rendezvous, and engines that ask it from threads in C++.

It has no secret. On one node it is opened for this node alone; the launcher's is as the launcher opened it.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from hvdtrain.errors import LaunchError
from hvdtrain.launch.detect import Detection
from hvdtrain.ranks.addresses import listens, own_addresses
from hvdtrain.ranks.store import Store


def torch_server(timeout_s: float, *, one_node: bool, multi_tenant: bool = False) -> dist.TCPStore:
    """Open a store of torch's own on a free port. It has no secret: on one node it is not to be reached from elsewhere.

    Args:
        timeout_s: Of what is asked of the store, in seconds.
        one_node: All ranks are on this node.
        multi_tenant: Whoever opens a store at the same port in this process gets this one.
    """
    more: dict[str, Any] = {}
    port = 0
    if one_node:
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        port = listener.getsockname()[1]
        more["master_listen_fd"] = listener.detach()
    return dist.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s),
        multi_tenant=multi_tenant, **more,
    )  # fmt: skip


def torch_store(detection: Detection, store: Store, timeout_s: float) -> tuple[dist.Store, object]:
    """A store of torch's own that all ranks are connected to, for an engine that asks it from threads in C++.

    Returns:
        The store, and what must be kept as long.

    Raises:
        LaunchError: It could not be reached.
    """
    topology = detection.topology
    one_node = topology.num_nodes == 1
    if topology.world_size == 1:
        return dist.HashStore(), None
    if detection.address is not None:
        return within(lambda: env_store(detection, timedelta(seconds=timeout_s)), timeout_s, topology.rank), None
    if topology.rank == 0:
        server = torch_server(timeout_s, one_node=one_node)
        hosts = ["127.0.0.1"] if one_node else own_addresses()
        store.set("torch", json.dumps([hosts, server.port, socket.gethostname()]))
        return server, server
    end = time.monotonic() + timeout_s
    while not store.check(["torch"]):
        if time.monotonic() > end:
            raise LaunchError(f"rank {topology.rank} waited {timeout_s:g} s for rank 0 to open torch's store")
        time.sleep(0.01)
    hosts, port, of = json.loads(store.get("torch"))
    return within(lambda: torch_client(hosts, port, of, timeout_s), timeout_s, topology.rank), None


def torch_client(hosts: list[str], port: int, of: str, timeout_s: float) -> dist.TCPStore:
    """Connect to a store of torch's own, at the first of some hosts where something answers."""
    end = time.monotonic() + min(timeout_s, 60.0)
    while time.monotonic() < end:
        # From another host 127.0.0.1 is not rank 0's.
        for host in [*(["127.0.0.1"] if of == socket.gethostname() else []), *hosts]:
            if listens(host, port):
                left = timedelta(seconds=timeout_s)
                return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=left)
        time.sleep(0.1)
    raise LaunchError(
        f"torch's store on {of} answers at none of {', '.join(hosts)} port {port}: open the ports between the hosts"
    )


def within(call: Callable[[], Any], timeout_s: float, rank: int) -> Any:
    """What a call returns that waits without a bound for a server that is stopped.

    Raises:
        LaunchError: It did not return in time.
    """
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="hvdtrain-rendezvous", daemon=True)
    thread.start()
    thread.join(timeout_s + 5.0)  # it has a bound of its own for a server that does not come
    if errors:
        raise errors[0]
    if not results:
        raise LaunchError(
            f"rank {rank} waited {timeout_s:g} s for the launcher's store, which does not answer; is its host alive?"
        )
    return results[0]


def env_store(detection: Detection, timeout: timedelta) -> dist.Store:
    """The store that MASTER_ADDR and MASTER_PORT name.

    Raises:
        LaunchError: It could not be opened or reached.
    """
    topology = detection.topology
    try:
        store: dist.Store = next(
            dist.rendezvous("env://", rank=topology.rank, world_size=topology.world_size, timeout=timeout)
        )[0]
    except (dist.DistError, RuntimeError, ValueError, OSError) as error:
        role = "open" if topology.rank == 0 else "reach"
        raise LaunchError(
            f"rank {topology.rank} could not {role} the store at {detection.address} (MASTER_ADDR:MASTER_PORT) within "
            f"{timeout.total_seconds():g} s: {error}. Check that rank 0 runs on that host, that the port is free there and "
            "that no firewall is between them"
        ) from error
    return store

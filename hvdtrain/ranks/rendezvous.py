"""How ranks find each other: one key-value store that every rank is connected to.

Where the environment names an address (torchrun, Kubernetes, plain MASTER_ADDR and MASTER_PORT) torch's own rendezvous
is used. Elsewhere (mpirun, srun, horovodrun, spawn) nobody has chosen a port, and guessing one fails as soon as two jobs
share a machine: rank 0 binds a free port first and then tells the others. On one node it does so through a small file in
a private folder of the temporary directory; across nodes through the engine if that can carry a message by then (MPI,
horovodrun's own rendezvous), or else through a file in a folder that all nodes share.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import secrets
import socket
import struct
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hvdtrain.errors import LaunchError
from hvdtrain.launch.detect import Detection
from hvdtrain.launch.environment import given

_log = logging.getLogger(__name__)

_announcements = itertools.count()  # over horovodrun's server, of this process; every rank counts alike
_meetings = itertools.count()  # of this process; every rank counts alike

DIRECTORY_VARIABLE = "HVDTRAIN_RENDEZVOUS_DIR"
Place = dict[str, Any]
"""Where rank 0's store is: "hosts", names and addresses to be tried; "port"; "of", rank 0's host; "nonce", by which the
store is known."""
Announce = Callable[[Place | None], Place]
"""Given the place on rank 0, and None elsewhere, returns it on every rank; raises LaunchError if it cannot."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """What `meet` returns.

    Attributes:
        engine: For the engine's own rendezvous.
        watch: A connection of its own, for the watch thread.
        server: Keeps rank 0's server alive; None elsewhere.
        file: In which the others read where rank 0 is, to be removed when the job ends; None where there was none.
    """

    engine: dist.Store
    watch: dist.Store
    server: dist.Store | None
    file: Path | None


def meet(detection: Detection, timeout_s: float, announce: Announce | None = None) -> Meeting:
    """Connect this rank with all others.

    Args:
        detection: The topology, and what the environment says about an address.
        timeout_s: How long to wait for rank 0, in seconds.
        announce: How rank 0's address comes to the others without a shared folder; None for a file.

    Raises:
        LaunchError: Rank 0 could not be reached; the message says where it was looked for.
    """
    topology = detection.topology
    timeout = timedelta(seconds=timeout_s)
    server: dist.Store | None = None
    file: Path | None = None
    if detection.address is not None:
        base = _env_store(detection, timeout)
        host, port = _endpoint(base)
    elif topology.rank == 0:
        server, place = serve(timeout_s, one_node=topology.num_nodes == 1)
        base, host, port = server, "127.0.0.1", place["port"]
        if topology.world_size > 1 and announce is not None:
            announce(place)
        elif topology.world_size > 1:
            file = _rendezvous_file(detection)
            _write(file, place)
    elif announce is not None:
        base, host, port = dial(announce(None), topology.rank, timeout_s)
    else:
        base, host, port = _follow(_rendezvous_file(detection), detection, timeout_s)
    second = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    prefix = f"hvdtrain/{detection.job_id}/{next(_meetings)}"  # a store that outlives one meeting still knows its keys
    return Meeting(
        dist.PrefixStore(f"{prefix}/engine", base), dist.PrefixStore(f"{prefix}/watch", second), server, file
    )


def needs_announcement(detection: Detection) -> bool:
    """Whether rank 0 must tell hosts that no address, no folder and no file of theirs tells where it is."""
    return detection.topology.num_nodes > 1 and detection.address is None and given(DIRECTORY_VARIABLE) is None


def serve(timeout_s: float, *, one_node: bool = False, multi_tenant: bool = False) -> tuple[dist.TCPStore, Place]:
    """Open rank 0's store on a free port.

    Args:
        timeout_s: Of what is asked of the store, in seconds.
        one_node: All ranks are on this node.
        multi_tenant: Whoever opens a store at the same port in this process gets this one.

    Returns:
        The store, which must be kept, and where the others find it.
    """
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s),
        multi_tenant=multi_tenant,
    )  # fmt: skip
    nonce = secrets.token_hex(8)
    store.set("nonce", nonce)
    hosts = ["127.0.0.1"] if one_node else _own_addresses()
    return store, {"hosts": hosts, "port": store.port, "nonce": nonce, "of": socket.gethostname()}


def _env_store(detection: Detection, timeout: timedelta) -> dist.Store:
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


def _endpoint(store: dist.Store) -> tuple[str, int]:
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        raise LaunchError(f"the rendezvous gave a {type(store).__name__}; hvdtrain needs torch's TCPStore")
    return str(store.host), int(store.port)


def _rendezvous_file(detection: Detection) -> Path:
    chosen = given(DIRECTORY_VARIABLE)
    if chosen:
        folder = Path(chosen)
        folder.mkdir(parents=True, exist_ok=True)
    elif detection.topology.num_nodes > 1:
        folder = Path.cwd() / ".hvdtrain-rendezvous"  # a job's working directory is on the shared file system
        folder.mkdir(mode=0o700, exist_ok=True)
    else:
        folder = Path(tempfile.gettempdir()) / f"hvdtrain-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise LaunchError(
                f"{folder} must belong to you and be private (mode 0700); remove it, or set {DIRECTORY_VARIABLE} to a private folder"
            )
    return folder / f"{detection.job_id}.json"


def _write(file: Path, content: object) -> None:
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content))
    temporary.replace(file)


def _follow(file: Path, detection: Detection, timeout_s: float) -> tuple[dist.Store, str, int]:
    """Read rank 0's file and connect; a stale file of an earlier job is known by its nonce, and read again."""
    end = time.monotonic() + timeout_s
    seen = "it did not appear"
    while time.monotonic() < end:
        try:
            place = json.loads(file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            time.sleep(0.02)
            continue
        seen = f"it names {', '.join(place['hosts'])} port {place['port']}, where rank 0's store does not answer"
        reached = _try(place, end)
        if reached is not None:
            return reached
        time.sleep(0.1)
    topology = detection.topology
    shared = (
        f" The nodes must share that folder: set {DIRECTORY_VARIABLE} to one that they do share, or set MASTER_ADDR and MASTER_PORT."
        if topology.num_nodes > 1
        else ""
    )
    raise LaunchError(
        f"rank {topology.rank} waited {timeout_s:g} s for rank 0's address in {file}: {seen}. Did rank 0 start?{shared}"
    )


def dial(place: Place, rank: int, timeout_s: float) -> tuple[dist.Store, str, int]:
    """Connect this rank to where rank 0 said it is.

    Returns:
        The store, and host and port under which it was reached.

    Raises:
        LaunchError: Nothing there is rank 0's store; names the addresses that were tried.
    """
    end = time.monotonic() + min(timeout_s, 60.0)  # it listens before it says so
    while time.monotonic() < end:
        reached = _try(place, end)
        if reached is not None:
            return reached
        time.sleep(0.1)
    raise LaunchError(
        f"rank {rank} on {socket.gethostname()} reaches rank 0 on {place['of']} at none of "
        f"{', '.join(place['hosts'])} port {place['port']}: open the ports between the hosts, or set MASTER_ADDR and "
        "MASTER_PORT to an address of rank 0's host and a free port that the others reach"
    )


def _try(place: Place, end: float) -> tuple[dist.Store, str, int] | None:
    port = int(place["port"])
    # From another host 127.0.0.1 is not rank 0's; what answers there is known by its nonce.
    local = ["127.0.0.1"] if place.get("of") == socket.gethostname() else []
    for host in [*local, *place["hosts"]]:
        if not _listens(host, port):
            continue
        try:
            timeout = timedelta(seconds=max(1.0, end - time.monotonic()))
            store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
            if store.check(["nonce"]) and store.get("nonce").decode() == place["nonce"]:
                return store, host, port
        except (dist.DistError, RuntimeError) as error:
            _log.debug("store at %s:%d: %s", host, port, error)
    return None


def announce_by_horovodrun(server: str, rank: int, job: str, timeout_s: float) -> Announce:
    """Through the key-value server over HTTP that ``horovodrun --gloo`` runs for its ranks.

    Args:
        server: Its "host:port", `Detection.horovodrun_server`.
        rank: This rank.
        job: A name that no other job of that server has.
        timeout_s: How long to wait for rank 0, in seconds.
    """
    # The server is on the launcher's own network: no proxy that the environment names leads there.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    url = f"http://{server}/hvdtrain/{job}-{next(_announcements)}"

    def announce(place: Place | None) -> Place:
        end = time.monotonic() + timeout_s
        while True:
            try:
                if place is not None:
                    request = urllib.request.Request(url, data=json.dumps(place).encode(), method="PUT")
                    opener.open(request, timeout=10).close()
                    return place
                with opener.open(url, timeout=10) as answer:
                    said: Place = json.loads(answer.read())
                    return said
            except OSError as error:  # 404 until rank 0 has said it
                if time.monotonic() > end:
                    raise LaunchError(
                        f"rank {rank} waited {timeout_s:g} s for rank 0's address from horovodrun at {server}: "
                        f"{error}. Did rank 0 start?"
                    ) from error
                time.sleep(0.05)

    return announce


def _listens(host: str, port: int) -> bool:
    """Whether something accepts connections there; waits two seconds at most."""
    try:
        with socket.create_connection((host, port), timeout=2):
            return True
    except OSError:
        return False


def _own_addresses() -> list[str]:
    """The names and IPv4 addresses under which other nodes may reach this one, the host name first."""
    addresses = [socket.gethostname()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, interface in socket.if_nameindex():
            try:
                packed = fcntl.ioctl(
                    probe.fileno(), 0x8915, struct.pack("256s", interface.encode()[:15])
                )  # SIOCGIFADDR
            except OSError:
                continue  # an interface without an IPv4 address
            address = socket.inet_ntoa(packed[20:24])
            if not address.startswith("127."):
                addresses.append(address)
    return addresses

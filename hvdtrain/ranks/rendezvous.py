"""How ranks find each other: rank 0 opens the ranks' store, and tells the others where it is and the job's secret.

On one node the store is a Unix socket, and the word is a small file beside it, in a private folder of the temporary
directory. Across nodes it is a port of rank 0's host, and the word travels through the engine if that can carry one by
then (MPI, Horovod), horovodrun's own rendezvous, the launcher's store where MASTER_ADDR and MASTER_PORT name one (torchrun,
Kubernetes), or else through a file in a folder that all nodes share. Where that way is open to others, HVDTRAIN_SECRET
closes it: the secret then does not travel at all.
"""

from __future__ import annotations

import itertools
import json
import logging
import secrets
import socket
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hvdtrain.errors import LaunchError
from hvdtrain.launch.detect import Detection
from hvdtrain.launch.environment import given
from hvdtrain.ranks.addresses import listens, own_addresses
from hvdtrain.ranks.describing import described
from hvdtrain.ranks.frames import proof
from hvdtrain.ranks.rendezvous_file import DIRECTORY_VARIABLE, private_folder, read, rendezvous_file, sweep, write
from hvdtrain.ranks.store import Address, RemoteStore, Store, StoreLost, StoreProcess
from hvdtrain.ranks.torch_store import env_store, within

_log = logging.getLogger(__name__)

_announcements = itertools.count()  # over horovodrun's server, of this process; every rank counts alike
_meetings = itertools.count()  # of this process; every rank counts alike

SECRET_VARIABLE = "HVDTRAIN_SECRET"
_LONGEST_PATH = 100  # of a Unix socket: the kernel has room for 107 characters
_LOOK_S = 0.5  # how often a rank that waits for rank 0 looks whether it is still there
Place = dict[str, Any]
"""Where rank 0's store is: "path" of a Unix socket, or "hosts", names and addresses to be tried, and "port"; "of", rank 0's
host; "secret", in hexadecimal, "" where the ranks have it from HVDTRAIN_SECRET."""
Announce = Callable[[Place | None], Place]
"""Given the place on rank 0, and None elsewhere, returns it on every rank; raises LaunchError if it cannot."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """What `meet` returns.

    Attributes:
        store: This rank's connection.
        process: That of the store, on rank 0; None elsewhere.
        files: By which the others found the store, to be removed when they have.
        one_node: Whether all ranks are on this node.
    """

    store: Store
    process: StoreProcess | None = None
    files: tuple[Path, ...] = ()
    one_node: bool = True

    def all_met(self) -> None:
        """Remove what says where to meet: every rank has read it, or never will."""
        for file in self.files:
            file.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the store, as all ranks do now."""
        self.store.close()
        if self.process is not None:
            self.process.wait(2.0)


def meet(
    detection: Detection,
    timeout_s: float,
    announce: Announce | None = None,
    look: Callable[[], None] = lambda: None,
) -> Meeting:
    """Connect this rank with all others.

    Args:
        detection: The topology, and what the environment says about an address.
        timeout_s: How long to wait for rank 0, and then for each answer of the store, in seconds.
        announce: How rank 0's address comes to the others without a shared folder; None for a file.
        look: Called while this rank waits for rank 0; raises if that is in vain.

    Raises:
        LaunchError: Rank 0 could not be reached; the message says where it was looked for.
    """
    topology = detection.topology
    meeting = next(_meetings)
    if topology.world_size == 1:
        return Meeting(Store())
    one_node = topology.num_nodes == 1
    file: Path | None = None
    if not one_node and announce is None and detection.address is not None and given(DIRECTORY_VARIABLE) is None:
        announce = _announce_by_address(detection, meeting, timeout_s)
    if one_node or announce is None:
        announce, file = None, rendezvous_file(detection)
    if topology.rank != 0:
        if announce is not None:
            store = dial(announce(None), detection.job_id, topology.rank, timeout_s)
        else:
            assert file is not None
            store = _follow(file, detection, timeout_s, look)
        return Meeting(store, one_node=one_node)
    process, place = serve(one_node=one_node, job=detection.job_id, file=file)
    if announce is not None:
        announce(place)
    elif file is not None:
        write(file, place)
    store = dial(place, detection.job_id, 0, timeout_s)
    files = tuple(each for each in (file, Path(place["path"]) if place["path"] else None) if each is not None)
    return Meeting(store, process, files, one_node)


def needs_announcement(detection: Detection) -> bool:
    """Whether rank 0 must tell hosts that no address, no folder and no file of theirs tells where it is."""
    return detection.topology.num_nodes > 1 and detection.address is None and given(DIRECTORY_VARIABLE) is None


def serve(*, one_node: bool, job: str, file: Path | None = None) -> tuple[StoreProcess, Place]:
    """Start the process of the ranks' store.

    Args:
        one_node: All ranks are on this node: nobody outside it can connect, and no other user.
        job: Its name, with which HVDTRAIN_SECRET makes the secret.
        file: In which the others will find it; removed with the store.

    Returns:
        The process, and where the others find the store.
    """
    listener, path = _listen(one_node)
    known = given(SECRET_VARIABLE)
    secret = secrets.token_bytes(32)
    place = {
        "path": path,
        "hosts": [] if path else ["127.0.0.1"] if one_node else own_addresses(),
        "port": 0 if path else listener.getsockname()[1],
        "of": socket.gethostname(),
        "secret": "" if known else secret.hex(),
    }
    return StoreProcess(listener, _secret(place, job), file), place


def dial(place: Place, job: str, rank: int, timeout_s: float) -> RemoteStore:
    """Connect this rank to where rank 0 said it is.

    Args:
        place: What rank 0 said.
        job: The job's name.
        rank: This rank.
        timeout_s: Of each answer of the store, in seconds.

    Raises:
        LaunchError: Nothing there is rank 0's store; names the addresses that were tried.
    """
    end = time.monotonic() + min(timeout_s, 60.0)  # it listens before it says so
    reasons: list[str] = []
    while time.monotonic() < end:
        store = _try(place, job, rank, timeout_s, reasons)
        if store is not None:
            return store
        time.sleep(0.1)
    raise LaunchError(
        f"rank {rank} on {socket.gethostname()} reaches rank 0 on {place['of']} at none of {_where(place)}: open the ports "
        "between the hosts, or set MASTER_ADDR and MASTER_PORT to an address of rank 0's host and a free port that the "
        f"others reach{_secrets_differ(reasons)}"
    )


# -- how the word travels ----------------------------------------------------------------------------------------------


def _announce_by_address(detection: Detection, meeting: int, timeout_s: float) -> Announce:
    """Through the store that MASTER_ADDR and MASTER_PORT name, which is open to whoever reaches it."""
    rank = detection.topology.rank
    key = f"hvdtrain/{detection.job_id}/{meeting}/place"  # the store may outlive this meeting

    def announce(place: Place | None) -> Place:
        def run() -> Place:
            store = env_store(detection, timedelta(seconds=timeout_s))
            _kept.append(store)  # rank 0's may be the one that serves the others
            if place is not None:
                store.set(key, json.dumps(place))
                return place
            said: Place = json.loads(store.get(key))
            return said

        if place is not None and place["secret"]:
            _warn_open(f"the store at {detection.address} (MASTER_ADDR:MASTER_PORT)")
        try:
            said: Place = within(run, timeout_s, rank)
        except (RuntimeError, ValueError) as error:
            raise LaunchError(
                f"rank {rank} waited for rank 0's word in the store at {detection.address}: {error}. Did rank 0 start?"
            ) from error
        return said

    return announce


_kept: list[dist.Store] = []


def _warn_open(way: str) -> None:
    _log.warning(
        "the ranks' secret travels through %s, which whoever reaches that port can read; set %s to the same secret on every "
        "host to close that",
        way,
        SECRET_VARIABLE,
    )


def _follow(file: Path, detection: Detection, timeout_s: float, look: Callable[[], None]) -> RemoteStore:
    """Read rank 0's file and connect; in a stale file of an earlier job nothing answers, and it is read again."""
    topology = detection.topology
    end = time.monotonic() + timeout_s
    next_look = time.monotonic() + _LOOK_S
    seen = "it did not appear"
    reasons: list[str] = []
    while time.monotonic() < end:
        if time.monotonic() > next_look:
            look()
            next_look = time.monotonic() + _LOOK_S
        try:
            place = read(file)
            store = _try(place, detection.job_id, topology.rank, timeout_s, reasons)
        except FileNotFoundError:
            time.sleep(0.02)
            continue
        except (OSError, ValueError, KeyError) as error:
            seen = f"it cannot be read: {described(error)}"
            time.sleep(0.1)
            continue
        if store is not None:
            return store
        seen = f"it names {_where(place)}, where rank 0's store does not answer"
        time.sleep(0.1)
    shared = (
        f" The nodes must share that folder: set {DIRECTORY_VARIABLE} to one that they do share, or set MASTER_ADDR and MASTER_PORT."
        if topology.num_nodes > 1
        else ""
    )
    raise LaunchError(
        f"rank {topology.rank} waited {timeout_s:g} s for rank 0's address in {file}: {seen}. Did rank 0 start?{shared}"
        f"{_secrets_differ(reasons)}"
    )


# -- inside ------------------------------------------------------------------------------------------------------------


def _listen(one_node: bool) -> tuple[socket.socket, str]:
    """A listening socket, and its path if it has one."""
    if not one_node:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024), ""
        return socket.create_server(("", 0), backlog=1024), ""
    folder = private_folder()
    sweep(folder)
    path = str(folder / f"{secrets.token_hex(6)}.store")
    if len(path) <= _LONGEST_PATH:
        listener = socket.socket(socket.AF_UNIX)
        with suppress(OSError):  # a file system without sockets
            listener.bind(path)
            listener.listen(1024)
            return listener, path
        listener.close()
    return socket.create_server(("127.0.0.1", 0), backlog=1024), ""


def _secret(place: Place, job: str) -> bytes:
    if place["secret"]:
        return bytes.fromhex(place["secret"])
    known = given(SECRET_VARIABLE)
    if not known:
        raise LaunchError(f"rank 0 on {place['of']} has {SECRET_VARIABLE}, and this rank has not: set it on every host")
    return proof(known.encode(), "job", job.encode())


def _try(place: Place, job: str, rank: int, timeout_s: float, reasons: list[str]) -> RemoteStore | None:
    secret = _secret(place, job)
    port = int(place["port"])
    # From another host 127.0.0.1 is not rank 0's; what answers there does not know the secret.
    local = ["127.0.0.1"] if place["of"] == socket.gethostname() else []
    hosts = [] if place["path"] else list(dict.fromkeys([*local, *place["hosts"]]))
    addresses = [Address(path=place["path"])] if place["path"] else [Address(host=host, port=port) for host in hosts]
    for address in addresses:
        if address.host and not listens(address.host, port):
            continue
        try:
            return RemoteStore(address, secret, rank, answer_s=timeout_s, connect_s=min(timeout_s, 20.0))
        except StoreLost as error:
            reasons.append(str(error))
            _log.debug("%s", error)
    return None


def _where(place: Place) -> str:
    return str(place["path"] or f"{', '.join(place['hosts'])} port {place['port']}")


def _secrets_differ(reasons: list[str]) -> str:
    if given(SECRET_VARIABLE) and any("closed" in reason for reason in reasons):
        return f". Something answers there, but does not accept this rank: is {SECRET_VARIABLE} the same on every host?"
    return ""


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
        if place is not None and place["secret"]:
            _warn_open(f"horovodrun's server at {server}")
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

"""How `torch.distributed.init_process_group("mpi4py")` comes to an `MpiProcessGroup`.

Importing this starts no MPI. When a process group is made and no MASTER_ADDR is set, MPI itself tells the ranks where
rank 0's store is: rank 0 binds a free port first, nobody guesses one.
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
import sys
import threading
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, ClassVar

import torch.distributed as dist

from hvdtrain.backends.rendezvous import listens, own_addresses
from hvdtrain.backends.watch import NullWatch, Watch
from hvdtrain.errors import HvdtrainError, LaunchError, RankFailure
from hvdtrain.launch.detect import detect
from hvdtrain.mpi import library

_log = logging.getLogger(__name__)

NAME = "mpi4py"
CHECK_VARIABLE = "HVDTRAIN_MPI_CHECK"
_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
_DEFAULT_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """For ``init_process_group(..., pg_options=Options(...))``.

    Args:
        watch: Let the ranks watch each other beside MPI, so that a rank that failed or left is named and ends all.
            Whoever has such a watch already turns it off.
        check: Compare each operation over the ranks before any byte moves: ranks that call different operations, or the
            same with other shapes, get an error instead of garbage. Costs a tiny all-reduce.
        all_reduce: "hierarchical" reduces within each node first; "auto" leaves the algorithm to the MPI library.
    """

    watch: bool = True
    check: bool = os.environ.get(CHECK_VARIABLE, "1") != "0"
    all_reduce: str = "auto"


class _State:
    """What the default group leaves for the groups made from it."""

    world_ranks: list[int] | None = None  # of MPI's world, by torch's rank
    groups: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()
    watch: NullWatch = NullWatch()
    server: Any = None
    options: Options = Options()


def register() -> None:
    """Make ``mpi4py`` known to torch.distributed, and teach ``env://`` where rank 0 is if the environment does not say."""
    if NAME.upper() in dist.Backend._plugins:
        return
    dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu", "cuda"])
    # PyTorch >= 2.15 hooks its flight recorder to groups of other backends than these, which fails on groups of Python.
    recorded = getattr(sys.modules["torch.distributed.distributed_c10d"], "_FR_SELF_RECORDING_BACKENDS", None)
    if isinstance(recorded, set):
        recorded.add(NAME)
    handlers = sys.modules["torch.distributed.rendezvous"]._rendezvous_handlers
    torchs_own = handlers["env"]

    def env(*args: Any, **kwargs: Any) -> Any:
        if not any(name in os.environ for name in ("MASTER_ADDR", "MASTER_PORT")):
            _tell_where_rank_zero_is()
        return torchs_own(*args, **kwargs)

    handlers["env"] = env


def _tell_where_rank_zero_is() -> None:
    try:
        detection = detect()
    except LaunchError as error:
        _log.debug("no launcher: %s", error)
        return
    if detection.topology.launcher not in ("mpirun", "srun", "horovodrun", "none") or detection.address is not None:
        return
    topology = detection.topology
    tell = library.tell(detection, _DEFAULT_TIMEOUT_S)
    world = library.load().COMM_WORLD
    content = None
    if world.rank == 0:
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        _State.server = server  # torch's env:// finds it by its port, as a second tenant
        content = (socket.gethostname(), own_addresses(), server.port)
    host0, addresses, port = tell(content)
    if host0 == socket.gethostname():
        address = "127.0.0.1"
    else:
        address = next((each for each in addresses if listens(each, port)), "")
        if not address:
            raise LaunchError(
                f"rank {world.rank} on {socket.gethostname()} reaches rank 0 at none of {', '.join(addresses)} port {port}; "
                "open the ports between the hosts, or set MASTER_ADDR and MASTER_PORT"
            )
    values = {"MASTER_ADDR": address, "MASTER_PORT": port, "RANK": world.rank, "WORLD_SIZE": world.size}
    for name, value in values.items():
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("LOCAL_RANK", str(topology.local_rank))


def _create(options: Any, backend_options: Any) -> Any:
    """What torch.distributed calls for a new group on each of its ranks."""
    ranks = list(options.global_ranks_in_group)
    own = backend_options if isinstance(backend_options, Options) else None
    detection = detect()
    mpi = library.load(detection)
    timeout: timedelta = options.timeout
    is_world = not ranks
    if is_world:
        library.check_world(detection, options.group_rank, options.group_size)
        _State.options = own or Options()
        _State.world_ranks = _exchange(
            options.store, options.group_rank, options.group_size, mpi.COMM_WORLD.rank, timeout.total_seconds()
        )
        ranks = list(range(options.group_size))
        _State.watch = _begin_watch(options, timeout) if _State.options.watch else NullWatch()
    else:
        own = own or replace(_State.options, watch=False)
    assert _State.world_ranks is not None
    members = [_State.world_ranks[rank] for rank in ranks]
    chosen = own or _State.options
    comm, levels = _communicator(
        mpi, members, str(options.group_id), timeout.total_seconds(), levels=chosen.all_reduce == "hierarchical"
    )
    from hvdtrain.mpi.group import MpiProcessGroup  # noqa: PLC0415 - needs MPI, which was loaded just now

    label = "world" if is_world else f"group {ranks}"
    group = MpiProcessGroup(comm, label, timeout, _State.watch, ranks, check=chosen.check, levels=levels)
    _State.groups.add(group)
    if is_world:
        _Exit.group = group
        if _State.options.watch:
            library.abort_on_exception()
        atexit.register(_Exit.leave)
    return group


def give_up(reason: str) -> None:
    """Let every wait in every group fail, because of what is known from elsewhere."""
    for group in list(_State.groups):
        group.give_up(reason)


def shut_down() -> None:
    """Shut down what ``destroy_process_group()`` has left: older versions of torch (seen with 2.4) leave Python groups as
    they are. Every rank must call it."""
    for group in sorted(_State.groups, key=lambda one: one.order):
        group.shutdown()


def _exchange(store: Any, rank: int, size: int, mine: int, timeout_s: float) -> list[int]:
    """Every rank's number in MPI's world; waits with a bound until all ranks are here."""
    store.set(f"mpi/{rank}", str(mine))
    found = []
    for other in range(size):
        try:
            store.wait([f"mpi/{other}"], timedelta(seconds=timeout_s))
        except (RuntimeError, dist.DistError) as error:
            raise LaunchError(
                f"rank {rank} waited {timeout_s:g} s for rank {other} to join the mpi4py group"
            ) from error
        found.append(int(store.get(f"mpi/{other}")))
    if len(set(found)) != size:
        raise LaunchError(
            f"the {size} ranks are only {sorted(set(found))} in MPI's world: mpi4py and the launcher belong to different MPI libraries"
        )
    return found


def _communicator(
    mpi: Any, members: Sequence[int], name: str, timeout_s: float, *, levels: bool
) -> tuple[Any, tuple[Any, Any] | None]:
    """A communicator of its own for a group, and with ``levels`` one of the node and one of the nodes' first ranks (None
    elsewhere). Only its members call."""
    box: list[Any] = []

    def run() -> None:
        group = mpi.COMM_WORLD.Get_group()
        part = group.Incl(list(members))
        comm = mpi.COMM_WORLD.Create_group(part, zlib.crc32(name.encode()) % 32768)
        found = None
        if levels:
            node = comm.Split_type(mpi.COMM_TYPE_SHARED, comm.rank)
            first = comm.Split(0 if node.rank == 0 else mpi.UNDEFINED, comm.rank)
            found = (node, first if node.rank == 0 else None)
        box.append((comm, found))
        part.Free()
        group.Free()

    thread = threading.Thread(target=run, name="hvdtrain-mpi-create", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not box:
        library.end_hard(1)
        raise LaunchError(
            f"waited {timeout_s:g} s for the ranks {list(members)} to make the group {name!r}; all of them must"
        )
    made: tuple[Any, tuple[Any, Any] | None] = box[0]
    return made


def _begin_watch(options: Any, timeout: timedelta) -> NullWatch:
    store = options.store
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if options.group_size == 1 or not isinstance(store, dist.TCPStore):
        return NullWatch()
    own = dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False, timeout=timeout)
    watch = Watch(dist.PrefixStore(f"hvdtrain-mpi/{options.group_id}", own), options.group_rank, options.group_size)
    watch.on_failure.append(give_up)
    watch.start()
    return watch


class _Exit:
    """The end of a program that did, or did not, destroy its groups."""

    group: Any = None

    @staticmethod
    def leave() -> None:
        """Say goodbye to the other ranks, so that none waits for this one, and never wait for ever in MPI_Finalize."""
        group, watch = _Exit.group, _State.watch
        _Exit.group, _State.watch = None, NullWatch()
        if group is None:
            return
        failed = library.ending() or group.stuck
        if failed:
            if isinstance(watch, Watch):
                watch.close()
            library.end_hard(1)
            return
        try:
            watch.leave(group._timeout_s)
        except (RankFailure, RuntimeError) as error:
            print(f"hvdtrain: {error}", file=sys.stderr, flush=True)  # noqa: T201 - last words
            library.end_hard(HvdtrainError.exit_code)

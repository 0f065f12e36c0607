"""How `torch.distributed.init_process_group("mpi4py")` comes to an `MpiProcessGroup`.

Importing this starts no MPI. When a process group is made and no MASTER_ADDR is set, MPI itself tells the ranks where
rank 0's store is: rank 0 binds a free port first, nobody guesses one.
"""

from __future__ import annotations

import logging
import socket
import sys
import threading
import weakref
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import torch.distributed as dist

from hvdtrain.errors import LaunchError
from hvdtrain.launch.detect import Detection, detect
from hvdtrain.launch.environment import address_given, give_address, given
from hvdtrain.launch.launchers import may_join_by_mpi
from hvdtrain.mpi import library
from hvdtrain.ranks.addresses import own_addresses
from hvdtrain.ranks.everyone import exchange
from hvdtrain.ranks.exit import Goodbye, bound_end, end_all_on_exception, end_hard
from hvdtrain.ranks.rendezvous import Meeting, dial, serve
from hvdtrain.ranks.torch_store import torch_client, torch_server
from hvdtrain.ranks.watch import NullWatch, Watch

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

    from hvdtrain.mpi.group import MpiProcessGroup
    from hvdtrain.mpi.operations import Levels

_log = logging.getLogger(__name__)

NAME = "mpi4py"
CHECK_VARIABLE = "HVDTRAIN_MPI_CHECK"
_DEFAULT_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """For ``init_process_group(..., pg_options=Options(...))``.

    Args:
        watch: Let the ranks watch each other beside MPI, so that a rank that failed or left is named and ends all.
            Whoever has such a watch already turns it off.
        check: Compare each operation over the ranks before any byte moves: ranks that call different operations, or the
            same with other shapes, get an error instead of garbage. Costs a tiny all-reduce.
        end: Ends the process, for a reason, when its main thread is inside an MPI call that will not return; the watch's own by
            default.
        all_reduce: "hierarchical" reduces within each node first; "auto" leaves the algorithm to the MPI library.
    """

    watch: bool = True
    check: bool = given(CHECK_VARIABLE) != "0"
    end: Callable[[str], None] | None = None
    all_reduce: str = "auto"


class _State:
    """What the default group leaves for the groups made from it."""

    world_ranks: list[int] | None = None  # of MPI's world, by torch's rank
    groups: ClassVar[weakref.WeakSet[MpiProcessGroup]] = weakref.WeakSet()
    watch: NullWatch = NullWatch()
    goodbye: Goodbye | None = None
    server: dist.TCPStore | None = None
    meeting: Meeting | None = None
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
        if not address_given():
            _find_rank_zero()
        return torchs_own(*args, **kwargs)

    handlers["env"] = env


def _find_rank_zero() -> None:
    """Give torch's ``env://`` the address that it asks for: rank 0 opens its store and says through MPI where."""
    try:
        detection = detect()
    except LaunchError as error:
        _log.debug("no launcher: %s", error)
        return
    topology = detection.topology
    if not (may_join_by_mpi(topology.launcher) or topology.launcher == "none") or detection.address is not None:
        return
    announce = library.announce(detection, _DEFAULT_TIMEOUT_S)
    world = library.load().COMM_WORLD
    one_node = topology.num_nodes == 1
    if world.rank == 0:
        # torch's env:// finds this store by its port, as a second tenant.
        _State.server = torch_server(_DEFAULT_TIMEOUT_S, one_node=one_node, multi_tenant=True)
        hosts = ["127.0.0.1"] if one_node else own_addresses()
        host, port = "127.0.0.1", _State.server.port
        announce({"hosts": hosts, "port": port, "of": socket.gethostname()})
    else:
        place = announce(None)
        found = torch_client(place["hosts"], place["port"], place["of"], _DEFAULT_TIMEOUT_S)
        host, port = found.host, found.port
    give_address(host, port, rank=world.rank, world_size=world.size, local_rank=topology.local_rank)


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
        # Of MPI_Finalize, which waits for mpirun; Python's own end, seconds on a busy machine, counts too.
        bound_end(timeout.total_seconds() + 10)
        _State.options = own or Options()
        _State.world_ranks = _ranks_in_mpi(
            options.store, options.group_rank, options.group_size, mpi.COMM_WORLD.rank, timeout.total_seconds()
        )
        ranks = list(range(options.group_size))
    else:
        own = own or replace(_State.options, watch=False)
    assert _State.world_ranks is not None
    members = [_State.world_ranks[rank] for rank in ranks]
    chosen = own or _State.options
    comm, levels = _communicator(
        mpi, members, str(options.group_id), timeout.total_seconds(), levels=chosen.all_reduce == "hierarchical"
    )
    if is_world:
        _State.watch = _begin_watch(comm, detection, timeout.total_seconds()) if _State.options.watch else NullWatch()
    from hvdtrain.mpi.group import MpiProcessGroup  # noqa: PLC0415 - needs MPI, which was loaded just now

    label = "world" if is_world else f"group {ranks}"
    group = MpiProcessGroup(
        comm, label, timeout, _State.watch, ranks, check=chosen.check, levels=levels, end=chosen.end or _State.watch.end
    )
    _State.groups.add(group)
    if is_world:
        if _State.options.watch:
            end_all_on_exception()
        if _State.goodbye is not None:
            _State.goodbye.never()
        _State.goodbye = Goodbye(_State.watch, timeout.total_seconds(), lambda: group.stuck)
        _State.goodbye.at_exit()
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


def _ranks_in_mpi(store: dist.Store, rank: int, size: int, mine: int, timeout_s: float) -> list[int]:
    """Every rank's number in MPI's world; waits with a bound until all ranks are here."""
    texts = exchange(
        store, NullWatch(), "mpi", str(mine),
        rank=rank, world_size=size, timeout_s=timeout_s, what="joining the mpi4py group", failure=LaunchError,
    )  # fmt: skip
    numbers = [int(text) for text in texts]
    if len(set(numbers)) != size:
        raise LaunchError(
            f"the {size} ranks are only {sorted(set(numbers))} in MPI's world: mpi4py and the launcher belong to different MPI libraries"
        )
    return numbers


def _communicator(
    mpi: ModuleType, members: Sequence[int], name: str, timeout_s: float, *, levels: bool
) -> tuple[Intracomm, Levels | None]:
    """A communicator of its own for a group, and with ``levels`` one of the node and one of the nodes' first ranks (None
    elsewhere). Only its members call."""
    box: list[tuple[Intracomm, Levels | None]] = []

    def run() -> None:
        group = mpi.COMM_WORLD.Get_group()
        part = group.Incl(list(members))
        comm = mpi.COMM_WORLD.Create_group(part, zlib.crc32(name.encode()) % 32768)
        both = None
        if levels:
            node = comm.Split_type(mpi.COMM_TYPE_SHARED, comm.rank)
            first = comm.Split(0 if node.rank == 0 else mpi.UNDEFINED, comm.rank)
            both = (node, first if node.rank == 0 else None)
        box.append((comm, both))
        part.Free()
        group.Free()

    thread = threading.Thread(target=run, name="hvdtrain-mpi-create", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not box:
        end_hard(1)
        raise LaunchError(
            f"waited {timeout_s:g} s for the ranks {list(members)} to make the group {name!r}; all of them must"
        )
    return box[0]


def _begin_watch(comm: Intracomm, detection: Detection, timeout_s: float) -> NullWatch:
    """A watch over a store whose secret MPI itself has carried."""
    if comm.size == 1:
        return NullWatch()
    job = detection.job_id
    one_node = detection.topology.num_nodes == 1
    process, place = serve(one_node=one_node, job=job) if comm.rank == 0 else (None, None)
    said = library.tell(comm, place, timeout_s)
    store = dial(said, job, comm.rank, timeout_s)
    files = (Path(said["path"]),) if process is not None and said["path"] else ()
    _State.meeting = Meeting(store, process, files, one_node)
    watch = Watch(store, comm.rank, comm.size)
    watch.on_failure.append(give_up)
    watch.start()
    exchange(
        store, watch, "watch", "",
        rank=comm.rank, world_size=comm.size, timeout_s=timeout_s, what="joining the mpi4py group", failure=LaunchError,
    )  # fmt: skip
    _State.meeting.all_met()
    return watch

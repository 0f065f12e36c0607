"""This process's place in the job, as Horovod's API tells it: begun by `init`, ended by `shutdown` or the program's end.

The engine is the one that `hvdtrain.init` would choose under this launcher, or the one that ``python -m hvdtrain.horovod
--backend`` or the variable HVDTRAIN_BACKEND names. HVDTRAIN_TIMEOUT_S bounds every wait for other ranks, in seconds.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from hvdtrain.backends import choose, create
from hvdtrain.backends.base import DEFAULT_TIMEOUT_S, Backend
from hvdtrain.backends.group import Group
from hvdtrain.errors import ConfigError, HvdtrainError, OutputError
from hvdtrain.horovod import timeline
from hvdtrain.horovod.channel import JOINED, LEFT
from hvdtrain.horovod.channels import Channels
from hvdtrain.horovod.controller import Controller
from hvdtrain.horovod.passing_through import real_horovod
from hvdtrain.horovod.process_sets import ProcessSet, global_process_set
from hvdtrain.horovod.requests import Request, form
from hvdtrain.horovod.surroundings import heed_variables, refuse_the_real
from hvdtrain.launch.detect import detect
from hvdtrain.launch.environment import given

_log = logging.getLogger(__name__)

_NOT_YET = "hvd.init() has not been called (or hvd.shutdown() has); call it first, on every rank"
_FORKED = (
    "{what}: this process was forked from a rank after hvd.init(), and is none itself: only facts such as hvd.rank() can be asked "
    "for here"
)

_LEAVING_S = 5.0  # when all ranks are leaving
_JOINS_TOLD_APART, _MOST_NUMBERS = 2**7, 2**24  # a number travels in 31 bits


@dataclass(slots=True)
class Job:
    """What runs between `init` and `shutdown`.

    Attributes:
        backend: The engine.
        real: The real Horovod, if that is the engine.
        controllers: By the number of their process set.
        sets: Process sets by number.
        channels: Of optimizers over all ranks; None where Horovod itself is the engine.
    """

    backend: Backend
    real: Any = None
    controllers: dict[int, Controller] = field(default_factory=dict)
    groups: dict[int, Group] = field(default_factory=dict)
    sets: dict[int, ProcessSet] = field(default_factory=dict)
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    counts: dict[tuple[int, str], itertools.count[int]] = field(default_factory=dict)
    joins: int = 0
    channels: Channels | None = None


@dataclass(slots=True)
class _Process:
    job: Job | None = None
    wanted: str | None = None
    shows: Any = None
    forked: bool = False
    optimizers: itertools.count[int] = field(default_factory=itertools.count)


_process = _Process()
_beginning = threading.Lock()  # threads that call `init` at once


def want_backend(name: str) -> None:
    """Let `init` use this engine, whatever HVDTRAIN_BACKEND says."""
    _process.wanted = name


def job() -> Job:
    """What runs now.

    Raises:
        ValueError: Nothing does.
    """
    if _process.job is None:
        raise ValueError(_NOT_YET)
    return _process.job


def job_or_none() -> Job | None:
    """What runs now, if anything does."""
    return _process.job


def real() -> Any:
    """The real Horovod, where it is the engine; else None."""
    return None if _process.job is None else _process.job.real


# -- life ---------------------------------------------------------------------------------------------------------------------


def init(comm: Sequence[int] | None = None, process_sets: Sequence[ProcessSet] | str | None = None) -> None:
    """Join the other ranks; every rank must call it. A second call changes nothing.

    Args:
        comm: None, or the list of all ranks.
        process_sets: Sets to make now, the same on every rank. "dynamic" is accepted; sets can always be made later.

    Raises:
        ConfigError: ``comm`` names some of the ranks only; start the job with those instead. Or the real Horovod is in use beside. Or a
            second call has process sets that the first had not.
        LaunchError, BackendUnavailable: As `hvdtrain.init`.
    """
    with _beginning:
        if _process.job is not None:
            _take_again(_process.job, process_sets)
            return
        _init(comm, process_sets)


def _take_again(running: Job, process_sets: Sequence[ProcessSet] | str | None) -> None:
    """At a second `init`, which makes nothing: other objects for the sets that there are take their place, as with Horovod."""
    for process_set in process_sets if process_sets is not None and not isinstance(process_sets, str) else ():
        number = next((each for each, one in running.sets.items() if one.ranks == process_set.ranks), 0)
        if number == 0:
            raise ConfigError(
                f"hvd.init() was called before, without the process set of the ranks {process_set.ranks}; give it to "
                "hvd.add_process_set, on every rank"
            )
        older, running.sets[number] = running.sets[number], process_set
        process_set.own_rank, process_set.real = older.own_rank, older.real
        older.process_set_id = None
        process_set.process_set_id = number


def _init(comm: Sequence[int] | None, process_sets: Sequence[ProcessSet] | str | None) -> None:
    detection = detect()
    if comm is not None and (
        not isinstance(comm, Sequence) or sorted(comm) not in ([], list(range(detection.topology.world_size)))
    ):
        raise ConfigError(
            f"hvd.init(comm={comm!r}): a job is all the ranks that were started; start fewer, or use hvd.ProcessSet for some of them"
        )
    wanted = _process.wanted or given("HVDTRAIN_BACKEND") or "auto"
    name = choose(detection, wanted)[0]
    if name != "horovod":
        refuse_the_real(sys.modules, is_initialized)
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= detection.topology.local_world_size
    backend = create(
        wanted,
        detection=detection,
        device="auto" if enough else "cpu",
        timeout_s=_timeout_s(),
    )
    backend.start()
    started = _process.job = Job(backend)
    atexit.register(shutdown)
    if _process.shows is None:
        _process.shows = sys.excepthook
        sys.excepthook = _end_all
    global_process_set.ranks = list(range(backend.world_size))
    global_process_set.own_rank = backend.rank
    global_process_set.process_set_id = 0
    started.sets[0] = global_process_set
    if name == "horovod":
        started.real = real_horovod()
        global_process_set.real = started.real.global_process_set
    else:
        _begin(started, global_process_set)
        if backend.rank == 0:
            heed_variables()
    for process_set in process_sets if process_sets is not None and not isinstance(process_sets, str) else ():
        add_process_set(process_set)


def shutdown() -> None:
    """Leave together with the other ranks; what they still wait for fails. May be called again."""
    ending = _process.job
    if ending is None or _process.forked:
        return
    try:
        if ending.real is None and not _failed(ending):
            if ending.channels is not None:
                ending.channels.serve(LEFT)
            for number in sorted(ending.controllers, reverse=True):
                request = Request(form("shutdown", None, []))
                ending.controllers[number].leave(request)
            if ending.channels is not None:
                ending.channels.served(_LEAVING_S)
    except HvdtrainError:
        pass  # the others have failed; the backend says how
    finally:
        _forget(ending)
        ending.backend.stop()


def is_initialized() -> bool:
    """Whether `init` has been called, and `shutdown` has not since."""
    return _process.job is not None


# -- facts --------------------------------------------------------------------------------------------------------------------


def rank() -> int:
    """This process's rank."""
    return job().backend.rank


def size() -> int:
    """The number of ranks."""
    return job().backend.world_size


def local_rank() -> int:
    """This process's rank among those of its node."""
    return job().backend.local_rank


def local_size() -> int:
    """The number of ranks on this node."""
    return job().backend.local_world_size


def cross_rank() -> int:
    """The number of this node among those of the job."""
    return job().backend.topology.node_rank


def cross_size() -> int:
    """The number of nodes of the job."""
    return job().backend.topology.num_nodes


def is_homogeneous() -> bool:
    """Whether every node has the same number of ranks."""
    topology = job().backend.topology
    return topology.local_world_size * topology.num_nodes == topology.world_size


# -- process sets -------------------------------------------------------------------------------------------------------------


def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Make a process set usable; every rank of the world must call it, with the same ranks.

    Raises:
        ValueError: There is one of these ranks already, or a rank is none of the job.
        HorovodInternalError: The ranks do not say the same, or some of them never call it.
    """
    running = job()
    made = process_set if isinstance(process_set, ProcessSet) else ProcessSet(process_set)
    members = made.ranks or []
    if not members or members != sorted(set(members)) or members[-1] >= running.backend.world_size or members[0] < 0:
        raise ValueError(
            f"a process set needs different ranks between 0 and {running.backend.world_size - 1}, got {members}"
        )
    for other in running.sets.values():
        if other.ranks == members:
            raise ValueError(f"there is a process set of the ranks {members} already: {other}")

    def enter() -> None:
        made.process_set_id = next(running.numbers)
        made.own_rank = running.backend.rank
        running.sets[made.process_set_id] = made
        if running.real is None:
            _begin(running, made)

    if running.real is not None:
        made.real = running.real.add_process_set(members)
        enter()
    else:
        _agree("add_process_set", members, enter)
    return made


def remove_process_set(process_set: ProcessSet) -> bool:
    """End a process set; every rank of the world must call it.

    Returns:
        Whether there was one to be ended.
    """
    running = job()
    number = process_set.process_set_id
    if number is None or number == 0 or number not in running.sets:
        return False
    if running.real is not None:
        running.real.remove_process_set(process_set.real)
    else:
        _agree("remove_process_set", process_set.ranks or [])
        if number in running.controllers:
            running.controllers.pop(number).leave(Request(form("shutdown", None, [])))
            running.groups.pop(number).close()
    del running.sets[number]
    process_set.process_set_id = None
    return True


def controller_of(process_set: ProcessSet, what: str) -> Controller:
    """Who performs operations of a process set.

    Raises:
        ValueError: It cannot be used (yet, or any more), or this rank is not in it.
    """
    running = job()
    if _process.forked:
        raise ValueError(_FORKED.format(what=what))
    number = process_set.process_set_id
    if number is None or number not in running.sets:
        raise ValueError(
            f"{what}: {process_set} is not in use; give it to hvd.init or hvd.add_process_set first, on every rank"
        )
    if number not in running.controllers:
        raise ValueError(f"{what}: rank {running.backend.rank} is not in {process_set}")
    return running.controllers[number]


def next_number(process_set: ProcessSet, kind: str) -> int:
    """The number of a call without a name: counted by kind in each process set, and anew after each `hvd.join`."""
    running = job()
    key = (process_set.process_set_id or 0, kind)
    count = next(running.counts.setdefault(key, itertools.count(1)))
    return (running.joins % _JOINS_TOLD_APART) * _MOST_NUMBERS + count % _MOST_NUMBERS


def count_anew() -> None:
    """All ranks have joined, and some of them have made calls that others have not."""
    running = job()
    running.joins += 1
    for key in [key for key in running.counts if key[0] == 0]:
        del running.counts[key]


def join(request: Request) -> int:
    """Take part with nothing in what the other ranks still do; the rank that joined last, once all have."""
    controller, channels = controller_of(global_process_set, "hvd.join"), job().channels
    assert channels is not None
    request.number = channels.windows
    channels.serve(JOINED)
    last = controller.join(request)
    channels.served()
    channels.windows = 0
    return last


def next_optimizer() -> int:
    """A number for a DistributedOptimizer: ranks make theirs in the same order."""
    return next(_process.optimizers)


# -- inside -------------------------------------------------------------------------------------------------------------------


def _begin(running: Job, process_set: ProcessSet) -> None:
    ranks, number = process_set.ranks or [], process_set.process_set_id or 0
    group = running.backend.group(ranks)
    if group is not None:
        running.groups[number] = group
        name = f"all {len(ranks)} ranks" if number == 0 else f"the ranks {ranks}"
        running.controllers[number] = Controller(group, running.backend.timeout_s, name)
        if number == 0:
            running.channels = Channels(lambda: running.backend.group(ranks), group)


def _agree(what: str, ranks: list[int], act: Callable[[], None] | None = None) -> None:
    """Wait until all ranks say the same; ``act`` is done then, in one order on all of them."""
    controller = controller_of(global_process_set, what)
    request = Request(
        form("agreement", None, [], what=what, ranks=ranks),
        number=next_number(global_process_set, "agreement"),
        act=act,
    )
    controller.submit(request, waited_for=True)
    controller.wait(request)


def _timeout_s() -> float:
    said = given("HVDTRAIN_TIMEOUT_S")
    if said is None:
        return DEFAULT_TIMEOUT_S
    try:
        return float(said)
    except ValueError as error:
        raise ConfigError(f"HVDTRAIN_TIMEOUT_S={said!r} is no number of seconds") from error


def _failed(running: Job) -> bool:
    return not running.backend.running


def _forget(ending: Job) -> None:
    atexit.unregister(shutdown)
    if ending.channels is not None:
        ending.channels.close()
    for group in ending.groups.values():
        group.close()
    for process_set in ending.sets.values():
        process_set.process_set_id = 0 if process_set is global_process_set else None
        process_set.own_rank = process_set.real = None
    global_process_set.ranks = []
    try:
        timeline.end()
    except OutputError as error:
        _log.warning("%s", error)
    _process.job = None
    _process.optimizers = itertools.count()


def _end_all(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An exception that nobody caught ends all ranks, and the first rank's is what the user reads."""
    ending = _process.job
    if ending is None or _process.forked:
        _process.shows(kind, error, trace)
        return
    atexit.unregister(shutdown)
    _process.job = None
    victim = ending.backend.abort(error)
    if victim is None or victim.rank is None:
        _process.shows(kind, error, trace)


def _in_child() -> None:
    """A forked process, as loaders make them, knows the facts and is no rank: it must say nothing in the rank's name."""
    if _process.job is not None:
        _process.forked = True


os.register_at_fork(after_in_child=_in_child)

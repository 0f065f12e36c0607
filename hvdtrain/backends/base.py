"""The seam: `Backend` hides which library moves the gradients.

A backend is one engine joined to one launcher's ranks. It is a `Communicator` over all ranks, it makes `Replica` objects,
and it ends well or badly but never hangs. Nothing here knows an engine, and nothing above knows which one it has.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from hvdtrain.backends.ahead import Ahead
from hvdtrain.backends.alone import LocalReplica
from hvdtrain.backends.communicator import Communicator
from hvdtrain.backends.compressed import CompressedReplica
from hvdtrain.backends.device import choose_device
from hvdtrain.backends.exclusions import not_by
from hvdtrain.backends.group import Group
from hvdtrain.backends.group import settle as settle_groups
from hvdtrain.backends.group import turn as groups_turn
from hvdtrain.backends.hooked import HookedReplica
from hvdtrain.backends.local_first import LocalFirst
from hvdtrain.backends.replica import Replica
from hvdtrain.backends.replica_options import ReplicaOptions, options_of
from hvdtrain.backends.seldom import SeldomOfGroups, SeldomReplica
from hvdtrain.backends.traffic import Traffic
from hvdtrain.backends.units import units_of
from hvdtrain.compression.base import Compression
from hvdtrain.data.rank_batches import RankBatches
from hvdtrain.data.rank_stream import RankStream, batches_of
from hvdtrain.data.source import source_of
from hvdtrain.errors import (
    CollectiveError,
    ConfigError,
    HvdtrainError,
    LaunchError,
    Preempted,
    RankFailure,
)
from hvdtrain.launch import guard, leash, once
from hvdtrain.launch.algorithms import FAMILIES
from hvdtrain.launch.detect import Detection
from hvdtrain.launch.stuck import end_if_stuck
from hvdtrain.memory import keep_freed_memory
from hvdtrain.ranks import last_words
from hvdtrain.ranks.arrival import Arrival
from hvdtrain.ranks.clocks import ClockOffset, clock_offset
from hvdtrain.ranks.everyone import exchange, software
from hvdtrain.ranks.exit import end_anyway, prepare
from hvdtrain.ranks.rendezvous import Announce, Meeting, needs_announcement
from hvdtrain.ranks.watch import ALL_THE_SAME, NullWatch
from hvdtrain.settings.options import MOST_SECONDS
from hvdtrain.settings.sync import Sync
from hvdtrain.settings.wording import shown

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.utils.data import DataLoader, Dataset

_log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 600.0
_ABORT_S = 40.0  # what a rank does that ends takes some seconds; an engine may hold it up


class Backend(Communicator):
    """One engine and this rank's place in it. Use it as a context manager, or call `start` and `stop`.

    Args:
        detection: What the launcher's environment says.
        device: "auto" (a GPU where there is one), "cpu", "cuda" (this rank's own GPU) or "cuda:N".
        timeout_s: Bound of every wait for other ranks, in seconds.
        check_collectives: Compare each collective over the ranks first (see `Communicator`).
        all_reduce: Family of algorithms for all-reduce, see `hvdtrain.launch.algorithms`; what the engine cannot be told
            is refused.
    """

    name: ClassVar[str]
    shards_models: ClassVar[bool] = False
    """Whether `replicate` can cut a model over the ranks."""
    restartable: ClassVar[bool] = True
    """Whether `start` works again after `stop`, in one process."""

    def __init__(
        self,
        detection: Detection,
        *,
        device: str = "auto",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        check_collectives: bool = False,
        all_reduce: str = "auto",
    ) -> None:
        super().__init__(check=check_collectives)
        if all_reduce not in FAMILIES:
            raise ConfigError(f"--all-reduce {all_reduce}: use {', '.join(FAMILIES)}")
        self.all_reduce_family = all_reduce
        number = isinstance(timeout_s, int | float)
        if not number or not 0 < timeout_s <= MOST_SECONDS:  # NaN is in no bounds
            wrong = "be positive" if number and timeout_s <= 0 else f"be seconds, at most {MOST_SECONDS}"
            raise ConfigError(f"the timeout must {wrong}, got {shown(timeout_s)} s")
        refusal = self.refuses(detection)
        if refusal:
            raise LaunchError(refusal)
        self.detection = detection
        self.topology = detection.topology
        self.timeout_s = float(timeout_s)
        self.device = choose_device(device, self.topology)
        self.traffic = Traffic()
        """What this rank has sent."""
        self.replica_numbers = itertools.count(1)  # every rank makes its replicas in the same order
        self._running = False
        self._process = 0  # in which it was started
        self._ended = False
        self._meeting: Meeting | None = None
        self._local_first: LocalFirst | None = None
        self._launcher_freed = False
        self._agreements = itertools.count()
        self._ahead: Ahead | None = None
        self._lasting: dict[tuple[int, ...], Group | None] = {}

    # -- facts --------------------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """This process's rank, 0 <= rank < world_size."""
        return self.topology.rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.topology.world_size

    @property
    def ranks(self) -> tuple[int, ...]:
        """All ranks of the world."""
        return tuple(range(self.world_size))

    @property
    def local_rank(self) -> int:
        """This process's rank among those on its node."""
        return self.topology.local_rank

    @property
    def local_world_size(self) -> int:
        """The number of ranks on this process's node."""
        return self.topology.local_world_size

    @classmethod
    def unusable(cls) -> str:
        """Why this engine cannot be used in this Python environment, with the command that mends it; "" if it can."""
        return ""

    @classmethod
    def refuses(cls, detection: Detection) -> str:
        """Why this engine cannot serve ranks started like this, with the command that would; "" if it can."""
        return ""

    @property
    def engine(self) -> str:
        """What carries the bytes, for people: "gloo", "nccl", ..."""
        return self.name

    @property
    def running(self) -> bool:
        """Whether it has been started and not yet stopped."""
        return self._running

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connect with the other ranks; every rank must call it.

        Raises:
            LaunchError: The other ranks could not be reached within the timeout.
            CollectiveError: The engine failed.
        """
        if self._running:
            raise HvdtrainError("the backend is already running")
        if self._ended and not self.restartable:
            raise HvdtrainError(
                f"backend {self.name!r} cannot start a second time in one process; keep one `with` block around all work, or "
                "start a new process"
            )
        once.begin(self.topology.rank, self.topology.world_size)
        if self.device.type == "cpu":
            keep_freed_memory()
        leash.hold(self.topology.launcher)
        self._arrival = Arrival(self.detection, self.timeout_s)
        try:
            self._connect()
        except BaseException as error:
            self._arrival.give_up(error)
            raise
        self._count(self)
        self._running, self._process = True, os.getpid()
        prepare()
        atexit.register(self._leave_at_exit)

    def stop(self) -> None:
        """Leave together with the other ranks and release everything; may be called again.

        Raises:
            RankFailure: Another rank failed, or did not come within the timeout.
        """
        if not self._running or self._in_child():
            return
        self._watch.leave(self.timeout_s)
        self._running, self._ended = False, True
        for group in self._lasting.values():
            if group is not None:
                group.close()
        self._lasting = {}
        settle_groups()
        with groups_turn:
            self._disconnect()
        leash.release()
        if self._meeting is not None:
            self._meeting.close()
        self._wire, self._watch, self._meeting, self._local_first = None, NullWatch(), None, None
        atexit.unregister(self._leave_at_exit)

    def abort(self, error: BaseException) -> RankFailure | None:
        """End all ranks because of ``error`` on this one.

        Returns:
            None if this rank is the first that failed (its traceback is what the user should read); otherwise the
            failure of the rank that was, and this rank should end quietly.
        """
        if not self._running or self._in_child():
            return None
        self._running, self._ended = False, True
        atexit.unregister(self._leave_at_exit)
        self._free_launcher()
        with end_anyway(_ABORT_S, f"rank {self.rank}"):
            try:
                return last_words.conclude(error, self._watch)
            finally:
                self._kill(error)

    def __enter__(self) -> Backend:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        agreed = isinstance(error, Preempted)  # all ranks raise it at the same step
        if error is None or agreed or (isinstance(error, SystemExit) and error.code in (None, 0)):
            if agreed:
                guard.tell_saved()
            try:
                self.stop()
                return
            except RankFailure as failure:
                error = failure
        victim_of = self.abort(error)
        if victim_of is not None:
            last_words.end_as_victim(victim_of)
        if isinstance(error, HvdtrainError):
            error.first = True
        last_words.leave_for_launcher(error, self.detection.error_file)

    # -- work ---------------------------------------------------------------------------------------------------------

    def replicate(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        bucket_bytes: int | None = None,
        reduce_dtype: str | None = None,
        compression: str | Compression | None = None,
        sync: str | Sync | None = None,
        sync_group: str | int | None = None,
        shard_modules: str | None = None,
    ) -> Replica:
        """Make this rank's copy of a model that is trained on all ranks; every rank must call it.

        Parameters, buffers and the optimizer's state are overwritten with rank 0's.

        Args:
            model: On `device`, built the same way on every rank.
            optimizer: Over parameters of ``model``. It stays yours: schedulers, hooks and state_dict work as ever. None to
                use the averaged gradients yourself, between `Replica.reduce_gradients` and `Replica.clear`.
            find_unused_parameters: See `ReplicaOptions`.
            static_graph: See `ReplicaOptions`.
            bucket_bytes: See `ReplicaOptions`.
            reduce_dtype: The type in which gradients travel: "fp32", "bf16" or "fp16"; None for their own.
            compression: For slow networks, send less of the gradients: "powersgd:2", "topk:0.01", "randomk:0.01", "int8",
                "fp8", "1bit", "fp16", "bf16" (the last two are ``reduce_dtype``), a `hvdtrain.Compression` or the import path of
                one; "powersgd:2,after=100" begins once a parameter's gradient was exchanged so often as it is; None or "none"
                for all of them. With ``sync`` of the weights' way from the last common ones.
            sync: For slow networks, exchange weights every so many steps instead of gradients in each: "local-sgd:8",
                "diloco:100", "diloco:100,delay=10,fragments=4", or a `hvdtrain.Sync`; None or "every-step" for gradients in each.
            sync_group: With ``sync`` or ``compression``: inside each "node", or each so many ranks that follow one another,
                gradients are exchanged in every step and as they are; groups send less to each other. None or "none" for no groups.
            shard_modules: Cut parameters, gradients and the optimizer's state over the ranks (torch's FSDP2): a regular
                expression for the names of the modules that are gathered one at a time, such as ``"layers[.][^.]+"``. The
                whole name must match. The optimizer's groups then hold this rank's parts.

        Raises:
            ModelMismatch: The ranks hold different models; names the first difference and the ranks.
            ConfigError: The model is on another device, the optimizer holds foreign parameters, or gradients do not fit into
                ``reduce_dtype``.
        """
        options = options_of(
            optimizer,
            self.name,
            find_unused_parameters=find_unused_parameters,
            static_graph=static_graph,
            bucket_bytes=bucket_bytes,
            reduce_dtype=reduce_dtype,
            compression=compression,
            sync=sync,
            sync_group=sync_group,
            shard_modules=shard_modules,
        )
        if options.sends_less:
            self._check_exchange("compression= (--compression)")
        if shard_modules is not None:
            if not self.shards_models:
                raise ConfigError(not_by("shard_modules", self.name))
            units_of(model, shard_modules)
        if options.sync is not None:
            self._check_exchange("sync= (--sync)")
            kind = SeldomReplica if options.sync_group is None else SeldomOfGroups
            return kind(self, model, optimizer, options)
        if self.world_size == 1:
            return self._replicate_alone(model, optimizer, options)
        if options.compression is not None:
            return CompressedReplica(self, model, optimizer, options)
        return self._replicate(model, optimizer, options)

    def loader(
        self,
        dataset: Dataset[Any] | DataLoader[Any] | Iterable[Any] | Callable[[], Iterable[Any]],
        *,
        batch_size: int | None = None,
        global_batch_size: int | None = None,
        shuffle: bool | None = None,
        seed: int = 0,
        workers: int = 0,
        collate: Callable[[list[Any]], Any] | None = None,
        sampler: Iterable[Any] | None = None,
        drop_last: bool = False,
        last_batch: str = "keep",
        partition: str | None = None,
        pin_memory: bool | None = None,
        persistent_workers: bool | None = None,
    ) -> RankBatches | RankStream:
        """Iterate over this rank's share of a data set, batch by batch, already on `device`.

        The global batch is ``batch_size * world_size`` samples, the last one as many as are left; each rank gets its
        share, sizes differing by at most one. When fewer samples are left than there are ranks, some ranks get a batch
        of length 0, so that all ranks make the same number of steps and no sample is lost or doubled.

        Args:
            dataset: With ``__len__`` and ``__getitem__``. Or a `torch.utils.data.DataLoader`, which says what the
                arguments below leave open: its data set, batch size, shuffling or sampler, drop_last, collate function,
                loader processes and what they are told. Its own random numbers (generator, a DistributedSampler's seed)
                play no part, ``seed`` does; a DistributedSampler is not cut a second time. Or a stream: an IterableDataset,
                what has ``__iter__`` alone, or a function that returns such; it has its own order and no length.
            batch_size: Samples per rank and step; or
            global_batch_size: samples per step over all ranks, which gives the same steps at every world size.
            shuffle: A new order each epoch (each iteration over the loader is the next epoch), the same for every
                world size. None: as the DataLoader does; in the data set's order without one.
            seed: Of the order, and of augmentation in loader processes.
            workers: Loader processes per rank.
            collate: Makes a batch out of a list of samples, as DataLoader's ``collate_fn``.
            sampler: Gives the order of the whole data set in each epoch, for all ranks together, and every rank the
                same: its random numbers depend on ``seed`` and the epoch, and the ranks compare its orders, for which
                all must begin each epoch.
            drop_last: DataLoader's word for ``last_batch="drop"``.
            last_batch: What becomes of samples that do not fill a last global batch: "keep", "drop", or "merge" with
                the one before.
            partition: "batch" (the default) cuts each global batch over the ranks. "sample", "sample-strided" and "sample-node"
                cut the data set once, and each epoch shuffles within the parts: rank r reads the r-th contiguous part alone,
                every world-size-th sample, or with the other ranks of its node a contiguous part for all of them. With
                "sample-own" each rank gives a data set of its own, of any length. (With the last two every rank must call
                this.)
            pin_memory: None for yes where the device is a GPU.
            persistent_workers: Loader processes outlive an epoch; None for yes.

        Raises:
            ConfigError: Arguments exclude each other, the data cannot be cut (batches made elsewhere), or loader
                processes have no room.
        """
        source = source_of(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            sampler=sampler,
            last_batch=last_batch,
            drop_last=drop_last,
            partition=partition,
            collate=collate,
            workers=workers,
            pin_memory=pin_memory,
            persistent_workers=persistent_workers,
        )
        if batch_size is not None and global_batch_size is not None:
            raise ConfigError(
                "give either batch_size= (samples per rank and step) or global_batch_size= (over all ranks)"
            )
        if source.batch_size is None and global_batch_size is None:
            raise ConfigError(
                "give batch_size=, the samples per rank and step, or global_batch_size=, those over all ranks"
            )
        return batches_of(source, self, global_batch_size=global_batch_size, seed=seed)

    def group(self, ranks: Sequence[int]) -> Group | None:
        """Make a communicator for some of the ranks; every rank of the world must call it with the same list.

        Args:
            ranks: World ranks in ascending order; the i-th has rank i in the group.

        Returns:
            The communicator; None on ranks that are not members. `Group.close`, the end of a `with` block or its garbage
            collection frees what it holds (Horovod keeps a process set for each list of ranks).
        """
        ranks = list(ranks)
        if not ranks or sorted(set(ranks)) != ranks or ranks[0] < 0 or ranks[-1] >= self.world_size:
            raise CollectiveError(f"a group needs ascending ranks between 0 and {self.world_size - 1}, got {ranks}")
        with groups_turn:
            group = self._group(ranks)
        if group is not None:
            group._forbidden, group._key = self._forbidden, self._key
            self._count(group)
        return group

    def lasting_group(self, ranks: Sequence[int]) -> Group | None:
        """A group as of `group`, one for each list of ranks, that is there until `stop`; every rank must call it alike."""
        key = tuple(ranks)
        if key not in self._lasting:
            self._lasting[key] = self.group(ranks)
        return self._lasting[key]

    def beside(self) -> Communicator:
        """All ranks once more, for messages that are under way for long and must not keep others waiting; as `lasting_group`."""
        return self if self.world_size == 1 else self.lasting_group(self.ranks) or self

    @contextmanager
    def local_rank_first(self, *, timeout_s: float | None = None) -> Iterator[None]:
        """Let local rank 0 of each node run the block first, and the node's other ranks when it is done.

        For what one rank prepares for its node: a download, a cache. Every rank of a node must enter; ranks of different
        nodes do not wait for each other. Collectives and messages are refused inside, since the ranks are not in it
        together. Blocks may be nested.

        Args:
            timeout_s: How long the others wait, in seconds; None for the backend's own.

        Raises:
            RankFailure: On the others: the first rank's block raised, and that ended the job.
            CollectiveError: On the others: the first rank's block raised and the exception was caught there, or it did not
                end in time.
        """
        if not self._running:
            self.wire  # noqa: B018 - says that it is not
        limit = self.timeout_s if timeout_s is None else timeout_s
        turn = nullcontext() if self._local_first is None else self._local_first.block(limit)
        reason = (
            "no collective and no message works inside `with backend.local_rank_first():`, which the ranks enter one after "
            "the other; move it behind the block"
        )
        with turn, self._without_engine(reason):
            yield

    def agree_beside(self, what: str, mine: str, *, timeout_s: float | None = None) -> list[str]:
        """Collect one small text of every rank on every rank, beside the engine; every rank must call it.

        For what is rare: it costs some messages through rank 0's store, some milliseconds, and disturbs no operation of
        the engine that is under way.

        Args:
            what: The occasion, for messages: "the agreement on the model's structure".
            mine: This rank's text.
            timeout_s: Longest wait, in seconds; None for the backend's.

        Returns:
            The texts, in rank order.

        Raises:
            CollectiveError: A rank left, waits for this one in another operation, or did not come within the timeout; names
                it and what it does instead.
            RankFailure: Another rank failed meanwhile.
        """
        if self.world_size == 1:
            return [mine]
        if self._meeting is None:
            raise CollectiveError("the backend is not running: use it inside `with hvdtrain.init() as backend:`")
        number, store = next(self._agreements), self._meeting.store
        texts = exchange(
            store, self._watch, f"agreement/{number}", mine,
            rank=self.rank, world_size=self.world_size, timeout_s=timeout_s or self.timeout_s, what=what,
        )  # fmt: skip
        for name in (str(self.rank), *(["all"] if self.rank == 0 else [])):  # everybody is through the one before
            store.delete_key(f"agreement/{number - 1}/{name}")
        return texts

    def assemble(self, what: str) -> None:
        """Return once every rank is here; every rank must call it, with the same words.

        Beside the engine, which would take the first collective of a rank that is elsewhere for an answer. For the
        beginning of work that people are tempted to do on one rank alone.

        Args:
            what: Names the work, in messages: "an evaluation after step 120".

        Raises:
            CollectiveError: A rank does something else, has left, or did not come in time; says which, and what it does.
        """
        texts = self.agree_beside(what, what)
        for rank, theirs in enumerate(texts):
            if theirs != texts[0]:
                raise CollectiveError(f"rank 0 is at {texts[0]}, and rank {rank} at {theirs}; {ALL_THE_SAME}")

    def clock_offset(self) -> ClockOffset:
        """How far this host's clock is from one that all ranks share; see `hvdtrain.ranks.clocks`. Not a collective."""
        return ClockOffset(0, 0) if self._meeting is None else clock_offset(self._meeting.store)

    def begin_engine_trace(self, path: Path) -> bool:
        """Let the engine itself write what it does into a file of rank 0's, where it can; every rank must call it.

        Returns:
            Whether it does. `end_engine_trace` completes the file.
        """
        return False

    def end_engine_trace(self) -> None:
        """Complete what `begin_engine_trace` began; every rank must call it."""

    def ahead(self, number: int) -> Ahead:
        """Begin to sum a number over the ranks that is wanted later; every rank must call it at the same place.

        It travels with the next gradients that are exchanged, and so costs nothing. One at a time does: an earlier one that
        is not on its way yet is summed when it is asked for.

        Args:
            number: A whole number from 0; the sum must be less than 2**24.
        """
        self._ahead = Ahead(number, self)
        return self._ahead

    def boarding(self) -> Ahead | None:
        """What travels with the exchange of gradients that begins now, asked by a replica."""
        waiting = self._ahead
        return waiting if waiting is not None and waiting.board() else None

    # -- what engines fill in -----------------------------------------------------------------------------------------

    @abstractmethod
    def _connect(self) -> None:
        """Set ``_wire`` and ``_watch``."""

    def _disconnect(self) -> None:
        """Release what `_connect` took, after all ranks have agreed to leave."""

    def _kill(self, error: BaseException) -> None:
        """Release what can be released without the other ranks, and wait for none of them; ``error`` is what ends this one."""

    def _replicate(self, model: nn.Module, optimizer: Optimizer | None, options: ReplicaOptions) -> Replica:
        """Make the engine's replica, of several."""
        return HookedReplica(self, model, optimizer, options)

    @abstractmethod
    def _group(self, ranks: list[int]) -> Group | None:
        """Make a communicator of valid, ascending ranks."""

    def _replicate_alone(self, model: nn.Module, optimizer: Optimizer | None, options: ReplicaOptions) -> Replica:
        """Make the replica of a world of one: there is nothing to exchange."""
        return LocalReplica(self, model, optimizer, options)

    def _check_exchange(self, asked: str) -> None:
        """Refuse settings of this engine that would be without effect, beside an exchange that is not the engine's own."""

    # -- inside -------------------------------------------------------------------------------------------------------

    def _count(self, communicator: Communicator) -> None:
        """Let this backend's traffic hear of what a communicator sends."""
        if communicator._wire is not None:
            communicator._wire.traffic = self.traffic

    def _meet(self) -> Meeting:
        """Connect with the other ranks beside the engine, begin to watch them, and return when all are here."""
        announce = self._announce() if needs_announcement(self.detection) else None
        # An MPI that is told of a lost connection may end the process before `abort` comes to that.
        self._meeting = self._arrival.meet(announce, self._software, self._free_launcher)
        self._watch = self._arrival.watch
        self._local_first = LocalFirst(self._meeting.store, self.topology, self._watch)
        self._key = self._meeting.store.key
        return self._meeting

    def _software(self) -> dict[str, str]:
        """Names and versions that must be the same on every rank."""
        return software()

    def _announce(self) -> Announce | None:
        """How rank 0's address can reach ranks on other hosts; None: only through a folder that they share."""
        return None

    def _free_launcher(self) -> None:
        """See to it that no mpirun of several hosts outlives its ranks for long."""
        if self.topology.num_nodes > 1 and not self._launcher_freed:
            self._launcher_freed = True
            end_if_stuck()

    def _in_child(self) -> bool:
        """Whether this process was forked from the rank, and so must say nothing in its name."""
        return self._process != os.getpid()

    def _leave_at_exit(self) -> None:
        """The program ends without stop(): tell the others, so that none waits for this rank."""
        if self._in_child():
            return
        _log.warning("rank %d ends without backend.stop(); use `with hvdtrain.init() as backend:`", self.rank)
        try:
            self.stop()
        except HvdtrainError as error:
            _log.warning("%s", error)

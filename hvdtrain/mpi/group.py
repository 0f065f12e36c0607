"""`MpiProcessGroup`: torch.distributed's process group, on stock PyTorch, with mpi4py below.

Each call checks its arguments, and hands the rest to the group's lane, which makes the blocking MPI calls in order while
the caller computes on; `submitting` says when a caller that waits makes them itself. Messages between two ranks (`send`,
`recv`) do not queue there: they are started at once, because two ranks that each receive before they send would otherwise wait
for each other.
"""

from __future__ import annotations

import functools
import itertools
import os
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from hvdtrain.mpi import operations
from hvdtrain.mpi.agreement import Agreement, digest
from hvdtrain.mpi.dtypes import as_bytes, kind_of, mpi_op
from hvdtrain.mpi.lane import Lane, MpiWork, forget
from hvdtrain.mpi.messages import MpiMessage, Several
from hvdtrain.mpi.naming import NamedGroup
from hvdtrain.mpi.staging import Staging
from hvdtrain.mpi.submitting import Submitting
from hvdtrain.ranks.watch import NullWatch

_groups = itertools.count()
_ANY_TAG_LIMIT = 2**15 - 1  # every MPI has this many tags
_CLOSE_S = 10.0  # how long a group that is destroyed waits for operations that nobody waited for


class MpiProcessGroup(NamedGroup):
    """Ranks of one communicator.

    Args:
        comm: Used by nothing else; freed when the group is destroyed.
        name: For messages.
        timeout: Of each operation.
        watch: Knows which ranks have not come.
        ranks: The ranks in the world.
        check: Compare each operation over the ranks before any byte moves.
        levels: For hierarchical all-reduces: a communicator of this node's ranks, and one of the nodes' first ranks, None on
            other ranks.
        end: Ends the process, for a reason, when its main thread is inside an MPI call that will not return.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        name: str,
        timeout: timedelta,
        watch: NullWatch,
        ranks: Sequence[int],
        *,
        check: bool = True,
        levels: operations.Levels | None = None,
        end: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(comm.rank, ranks)
        self._levels = levels
        self.order = next(_groups)
        """Of its creation; the same in all groups that two ranks share."""
        self._comm = comm
        self._label = name
        self._over = f" over {name} ({len(ranks)} ranks)"
        self._timeout_s = timeout.total_seconds()
        self._watch = watch
        self._agree = Agreement(comm) if check and comm.size > 1 else None
        self._lane = Lane(f"hvdtrain-mpi {name}", self._explain, end or watch.end)
        self._staging = Staging()
        self._process = os.getpid()
        self._destroyed = False
        self._ways = Submitting(self._lane, self._agree, watch, name, ranks, self._timeout_s, self._staging)

    # -- facts --------------------------------------------------------------------------------------------------------

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    @property
    def supports_splitting(self) -> bool:
        """Whether `split_group` works; `new_group` does the same here."""
        return False

    @property
    def supports_coalescing(self) -> bool:
        """Whether several operations can be started as one."""
        return True

    def _get_backend(self, device: torch.device) -> MpiProcessGroup:
        return self

    def _set_sequence_number_for_group(self) -> None:
        """Operations are numbered by the watch."""

    @property
    def stuck(self) -> bool:
        """Whether an MPI call will not return, so that MPI cannot be left in peace."""
        return self._lane.stuck

    # -- reductions ---------------------------------------------------------------------------------------------------

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> MpiWork:
        """Reduce over the ranks, in place."""
        if opts is not None and len(tensors) == 1:
            tensor = tensors[0]
            over = self._ways.ride((opts.reduceOp, tensor.dtype, tensor.shape), tensor, tensor, opts)
            if over is not None:
                return over
        opts = opts or dist.AllreduceOptions()
        kind = kind_of(opts.reduceOp)
        if len(tensors) == 1 and tensors[0].layout == torch.sparse_coo:
            return self._allreduce_sparse(tensors[0], kind, opts)
        (tensor,) = self._valid("all_reduce", tensors)
        mpi_op(kind, tensor.dtype)
        what, key = (
            f"all_reduce(op={kind.name}) of {_form(tensor)}",
            ("all_reduce", kind.name, tensor.dtype, tensor.numel()),
        )
        ride = self._agree.sum_ride(kind, tensor.dtype, tensor.numel()) if self._agree is not None else None
        if kind != kind.PREMUL_SUM:
            after = None if ride is not None else functools.partial(self._reduce_plain, kind)
            passage = (ride, after, what, digest(key))
            self._ways.remember((opts.reduceOp, tensor.dtype, tensor.shape), _nbytes(tensor), passage)
        return self._ways.start(
            what, key, [tensor], [tensor], opts,
            lambda ins, outs: operations.all_reduce_(self._comm, outs[0], opts.reduceOp, kind, self._levels),
            ride=ride,
        )  # fmt: skip

    def _reduce_plain(self, kind: Any, tensor: Tensor) -> None:
        operations.all_reduce_(self._comm, tensor, None, kind, self._levels)

    def _allreduce_sparse(self, tensor: Tensor, kind: Any, opts: Any) -> MpiWork:
        if kind not in (kind.SUM, kind.AVG):
            raise TypeError(f"all_reduce of sparse tensors sums or averages; got {kind.name}")

        def run(ins: list[Tensor], outs: list[Tensor]) -> None:
            total = operations.sum_sparse(self._comm, tensor.cpu())
            if kind == kind.AVG:
                total /= self.size()
            tensor.copy_(total.to(tensor.device))

        what = f"all_reduce(op={kind.name}) of sparse {_form(tensor)}"
        work = self._ways.start(
            what, ("all_reduce sparse", kind.name, tensor.dtype, tuple(tensor.shape)), [], [], opts, run
        )
        work._tensors = [tensor]
        return work

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> MpiWork:
        """Reduce several tensors over the ranks, in place, small ones together."""
        opts = opts or dist.AllreduceCoalescedOptions()
        kind = kind_of(opts.reduceOp)
        tensors = self._valid("all_reduce_coalesced", tensors, several=True)
        for tensor in tensors:
            mpi_op(kind, tensor.dtype)

        def run(ins: list[Tensor], outs: list[Tensor]) -> None:
            for same in _by_dtype(outs):
                flat = torch.cat([t.reshape(-1) for t in same]) if len(same) > 1 else same[0]
                operations.all_reduce_(self._comm, flat, opts.reduceOp, kind, self._levels)
                if len(same) > 1:
                    for tensor, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
                        tensor.copy_(part.view_as(tensor))

        return self._ways.start(
            f"all_reduce_coalesced(op={kind.name}) of {len(tensors)} tensors",
            ("all_reduce_coalesced", kind.name, tuple((t.dtype, t.numel()) for t in tensors)),
            tensors, tensors, opts, run,
        )  # fmt: skip

    def reduce(self, tensors: list[Tensor], opts: Any = None) -> MpiWork:
        """Reduce to one rank, in place."""
        opts = opts or dist.ReduceOptions()
        kind, root = kind_of(opts.reduceOp), opts.rootRank
        (tensor,) = self._valid("reduce", tensors)
        mpi_op(kind, tensor.dtype)
        outs = [tensor] if self._comm_rank == root else []
        return self._ways.start(
            f"reduce(op={kind.name}, dst={root}) of {_form(tensor)}",
            ("reduce", kind.name, root, tensor.dtype, tensor.numel()),
            [tensor], outs, opts,
            lambda ins, outs: operations.reduce_(self._comm, (outs or ins)[0], opts.reduceOp, kind, root),
        )  # fmt: skip

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> MpiWork:
        """Reduce a list of tensors, one for each rank, of which this rank keeps its own."""
        opts = opts or dist.ReduceScatterOptions()
        kind = kind_of(opts.reduceOp)
        (out,) = self._valid("reduce_scatter", outputs)
        (parts,) = inputs
        parts = self._valid("reduce_scatter", parts, several=True)
        self._one_each("reduce_scatter", parts)
        mpi_op(kind, out.dtype)
        sizes = [part.numel() for part in parts]
        if out.numel() != sizes[self._comm_rank]:
            raise ValueError(
                f"reduce_scatter: the output has {out.numel()} elements, part {self._comm_rank} has {sizes}"
            )

        def run(ins: list[Tensor], outs: list[Tensor]) -> None:
            if len(set(sizes)) == 1:
                whole = torch.cat([part.reshape(-1) for part in ins])
                operations.reduce_scatter(self._comm, outs[0], whole, opts.reduceOp, kind)
                return
            operations.reduce_scatter_unequal(self._comm, outs[0], ins, opts.reduceOp, kind)

        return self._ways.start(
            f"reduce_scatter(op={kind.name}) to {_form(out)}",
            ("reduce_scatter", kind.name, out.dtype, tuple(sizes)),
            parts, [out], opts, run,
        )  # fmt: skip

    def _reduce_scatter_base(self, output: Tensor, tensor: Tensor, opts: Any = None) -> MpiWork:
        """Reduce a tensor of equal parts, of which this rank keeps its own."""
        opts = opts or dist.ReduceScatterOptions()
        kind = kind_of(opts.reduceOp)
        out, whole = self._valid("reduce_scatter_tensor", [output, tensor], several=True)
        mpi_op(kind, out.dtype)
        if whole.numel() != out.numel() * self.size() or whole.dtype != out.dtype:
            raise ValueError(
                f"reduce_scatter_tensor: the input ({_form(whole)}) must have {self.size()} times the output's elements "
                f"({_form(out)}) and its dtype"
            )
        return self._ways.start(
            f"reduce_scatter_tensor(op={kind.name}) to {_form(out)}",
            ("reduce_scatter_tensor", kind.name, out.dtype, out.numel()),
            [whole], [out], opts,
            lambda ins, outs: operations.reduce_scatter(self._comm, outs[0], ins[0], opts.reduceOp, kind),
        )  # fmt: skip

    reduce_scatter_single = _reduce_scatter_base

    def reduce_scatter_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> MpiWork:
        """`reduce_scatter_tensor` of several tensors."""
        return self._together(
            [self._reduce_scatter_base(out, tensor, opts) for out, tensor in zip(outputs, inputs, strict=True)], outputs
        )

    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced

    # -- moving -------------------------------------------------------------------------------------------------------

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> MpiWork:
        """Overwrite a tensor with that of one rank."""
        opts = opts or dist.BroadcastOptions()
        (tensor,) = self._valid("broadcast", tensors)
        root = opts.rootRank
        return self._ways.start(
            f"broadcast(src={root}) of {_form(tensor)}",
            ("broadcast", root, tensor.dtype, tensor.numel()),
            [tensor], [tensor], opts,
            lambda ins, outs: operations.broadcast_(self._comm, outs[0], root),
        )  # fmt: skip

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> MpiWork:
        """Fill a list with every rank's tensor."""
        (tensor,) = self._valid("all_gather", inputs)
        (outs,) = outputs
        outs = self._valid("all_gather", outs, several=True)
        self._one_each("all_gather", outs)
        sizes = [out.numel() for out in outs]
        if tensor.numel() != sizes[self._comm_rank] or any(out.dtype != tensor.dtype for out in outs):
            raise ValueError(
                f"all_gather: this rank's tensor is {_form(tensor)}, the list has {[_form(out) for out in outs]}"
            )

        def run(ins: list[Tensor], outs: list[Tensor]) -> None:
            if len(set(sizes)) > 1:
                operations.all_gather_unequal(self._comm, outs, ins[0])
                return
            flat = torch.empty(sum(sizes), dtype=ins[0].dtype)
            operations.all_gather(self._comm, flat, ins[0])
            for out, part in zip(outs, flat.split(sizes), strict=True):
                out.copy_(part.view_as(out))

        return self._ways.start(
            f"all_gather of {_form(tensor)}", ("all_gather", tensor.dtype, tuple(sizes)), [tensor], outs, opts, run
        )

    def _allgather_base(self, output: Tensor, tensor: Tensor, opts: Any = None) -> MpiWork:
        """Fill a tensor with every rank's tensor, one after the other."""
        if opts is not None:
            over = self._ways.ride((tensor.dtype, tensor.shape, output.dtype, output.shape), tensor, output, opts)
            if over is not None:
                return over
        out, part = self._valid("all_gather_into_tensor", [output, tensor], several=True)
        if out.numel() != part.numel() * self.size() or out.dtype != part.dtype:
            raise ValueError(
                f"all_gather_into_tensor: the output ({_form(out)}) must have {self.size()} times the input's elements "
                f"({_form(part)}) and its dtype"
            )
        what, key = f"all_gather_into_tensor of {_form(part)}", ("all_gather_into_tensor", part.dtype, part.numel())
        ride = self._agree.gather_ride(_nbytes(part)) if self._agree is not None else None
        if ride is not None:
            passage = (ride, None, what, digest(key))
            self._ways.remember((part.dtype, part.shape, out.dtype, out.shape), _nbytes(part), passage)
        return self._ways.start(
            what,
            key,
            [part],
            [out],
            opts,
            lambda ins, outs: operations.all_gather(self._comm, outs[0], ins[0]),
            ride=ride,
        )

    all_gather_single = _allgather_base

    def allgather_into_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> MpiWork:
        """`all_gather_into_tensor` of several tensors."""
        return self._together(
            [self._allgather_base(out, tensor, opts) for out, tensor in zip(outputs, inputs, strict=True)], outputs
        )

    all_gather_single_coalesced = allgather_into_tensor_coalesced

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> MpiWork:
        """`all_gather` of several tensors; ``outputs[r][i]`` receives tensor i of rank r."""
        works = [self.allgather([[outs[i] for outs in outputs]], [tensor], opts) for i, tensor in enumerate(inputs)]
        return self._together(works, [out for outs in outputs for out in outs])

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> MpiWork:
        """Fill a list on one rank with every rank's tensor."""
        opts = opts or dist.GatherOptions()
        root = opts.rootRank
        (tensor,) = self._valid("gather", inputs)
        outs: list[Tensor] = []
        if self._comm_rank == root:
            outs = self._valid("gather", outputs[0], several=True)
            self._one_each("gather", outs)
            if any(out.numel() != tensor.numel() or out.dtype != tensor.dtype for out in outs):
                raise ValueError(f"gather: every output must be like the input, {_form(tensor)}")

        def run(ins: list[Tensor], outs: list[Tensor]) -> None:
            flat = torch.empty(tensor.numel() * len(outs), dtype=tensor.dtype) if outs else None
            operations.gather(self._comm, flat, ins[0], root)
            if flat is not None:
                for out, part in zip(outs, flat.split(tensor.numel()) if tensor.numel() else (), strict=False):
                    out.copy_(part.view_as(out))

        return self._ways.start(
            f"gather(dst={root}) of {_form(tensor)}",
            ("gather", root, tensor.dtype, tensor.numel()),
            [tensor], outs, opts, run,
        )  # fmt: skip

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> MpiWork:
        """Give each rank its tensor of one rank's list."""
        opts = opts or dist.ScatterOptions()
        root = opts.rootRank
        (out,) = self._valid("scatter", outputs)
        parts: list[Tensor] = []
        if self._comm_rank == root:
            parts = self._valid("scatter", inputs[0], several=True)
            self._one_each("scatter", parts)
            if any(part.numel() != out.numel() or part.dtype != out.dtype for part in parts):
                raise ValueError(f"scatter: every part must be like the output, {_form(out)}")

        def run(ins: list[Tensor], outs: list[Tensor]) -> None:
            whole = torch.cat([part.reshape(-1) for part in ins]) if ins else None
            operations.scatter(self._comm, outs[0], whole, root)

        return self._ways.start(
            f"scatter(src={root}) to {_form(out)}",
            ("scatter", root, out.dtype, out.numel()),
            parts, [out], opts, run,
        )  # fmt: skip

    def alltoall_base(
        self, output: Tensor, tensor: Tensor, output_splits: list[int], input_splits: list[int], opts: Any = None
    ) -> MpiWork:
        """Exchange parts of a tensor, split along its first dimension, equally if no splits are given."""
        out, whole = self._valid("all_to_all_single", [output, tensor], several=True)
        if out.dtype != whole.dtype:
            raise ValueError(f"all_to_all_single: input {_form(whole)} and output {_form(out)} differ in dtype")
        receive = self._splits(out, output_splits, "output")
        send = self._splits(whole, input_splits, "input")
        return self._ways.start(
            f"all_to_all_single of {_form(whole)}", ("all_to_all_single", out.dtype), [whole], [out], opts,
            lambda ins, outs: operations.all_to_all(self._comm, as_bytes(outs[0]), as_bytes(ins[0]), receive, send),
        )  # fmt: skip

    all_to_all_single = alltoall_base

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> MpiWork:
        """Exchange lists of tensors: tensor i goes to rank i."""
        outs = self._valid("all_to_all", outputs, several=True)
        parts = self._valid("all_to_all", inputs, several=True)
        self._one_each("all_to_all", outs)
        self._one_each("all_to_all", parts)

        def run(ins: list[Tensor], outs: list[Tensor]) -> None:
            flat = torch.empty(sum(_nbytes(out) for out in outs), dtype=torch.uint8)
            whole = torch.cat([as_bytes(part) for part in ins])
            sizes = [_nbytes(out) for out in outs]
            operations.all_to_all(self._comm, flat, whole, sizes, [_nbytes(part) for part in ins])
            for out, part in zip(outs, flat.split(sizes), strict=True):
                as_bytes(out).copy_(part)

        return self._ways.start(
            f"all_to_all of {len(parts)} tensors", ("all_to_all", outs[0].dtype), parts, outs, opts, run
        )

    def barrier(self, opts: Any = None) -> MpiWork:
        """Complete once every rank has called it."""
        limit = getattr(opts, "timeout", None)

        def run(ins: list[Tensor], outs: list[Tensor]) -> None:
            if self._agree is None:  # the comparison is a barrier
                self._comm.Barrier()

        return self._ways.start("barrier", ("barrier",), [], [], opts, run, limit)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False, **_: Any) -> None:
        """A barrier that waits here; its time-out names the ranks that are missing."""
        self._ways.start("monitored_barrier", ("barrier",), [], [], None, lambda ins, outs: None, timeout).wait()

    # -- between two ranks --------------------------------------------------------------------------------------------

    def send(self, tensors: list[Tensor], dst: int, tag: int = 0, *, synchronous: bool = False) -> MpiWork:
        """Send a tensor to a rank of the group.

        Args:
            tensors: One.
            dst: The rank.
            tag: Distinguishes messages between two ranks.
            synchronous: The message is over when the receiver has begun to receive it, however small it is.
        """
        (tensor,) = self._valid("send", tensors)
        staged = self._staging.take(tensor)
        self._staging.ready(staged)
        return self._message(
            f"send(dst={dst}, tag={tag}) of {_form(tensor)}",
            tensor,
            staged.host,
            dst,
            tag,
            begin=self._comm.Issend if synchronous else self._comm.Isend,
        )

    def recv(self, tensors: list[Tensor], src: int, tag: int = 0) -> MpiWork:
        """Receive a tensor from a rank of the group."""
        (tensor,) = self._valid("recv", tensors)
        return self._message(f"recv(src={src}, tag={tag}) of {_form(tensor)}", tensor, None, src, tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> MpiWork:
        """Receive a tensor from whichever rank sends first; the work's `source_rank` tells which it was."""
        (tensor,) = self._valid("recv", tensors)
        return self._message(f"recv(any source, tag={tag}) of {_form(tensor)}", tensor, None, MPI.ANY_SOURCE, tag)

    # -- several at once ----------------------------------------------------------------------------------------------

    def _start_coalescing(self, device: Any = None) -> None:
        self._ways.coalescing = []

    def _end_coalescing(self, device: Any = None) -> MpiWork:
        works, self._ways.coalescing = self._ways.coalescing or [], None
        return self._together(works, [])

    def _together(self, works: list[MpiWork], tensors: Sequence[Tensor]) -> MpiWork:
        what = f"{len(works)} operations, the last {works[-1].what}" if works else "no operation"
        return Several(what, works, tensors, self._timeout_s)

    # -- life ---------------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """Wait for what is under way, and free the communicator; every rank must call it."""
        if self._destroyed:
            return
        self._destroyed = True
        if os.getpid() != self._process:  # a forked child has no part in it
            return
        ended = self._lane.close(_CLOSE_S)
        forget(self._lane)
        if ended and not self._lane.broken and not MPI.Is_finalized():
            for comm in (*(self._levels or ()), self._comm):
                if comm is not None:
                    comm.Free()

    def give_up(self, reason: str) -> None:
        """Let every wait fail: another rank has failed, or will never come."""
        self._lane.give_up(reason)

    def abort(self) -> None:
        """Take no more work; wait for nobody."""
        self._destroyed = True
        self._lane.close(0)
        forget(self._lane)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _explain(self, work: MpiWork) -> str:
        try:
            return self._watch.missing(self._label, self._ranks)
        except Exception as error:
            return f" (the missing ranks cannot be told: {error})"

    def _valid(self, what: str, tensors: Sequence[Tensor], *, several: bool = False) -> list[Tensor]:
        if self._destroyed:
            raise dist.DistBackendError(f"{what}: the process group was destroyed")
        if os.getpid() != self._process:
            raise dist.DistBackendError(
                f"{what}: this process was forked from rank {self._comm_rank}, and MPI belongs to the parent alone"
            )
        if not several and len(tensors) != 1:
            raise ValueError(f"{what}: one tensor a rank, got {len(tensors)}")
        for tensor in tensors:
            if tensor.layout != torch.strided:
                raise TypeError(
                    f"{what}: MPI moves dense tensors, got {tensor.layout}; call .to_dense(), or .coalesce() and send its parts"
                )
        return [tensor.detach() for tensor in tensors]

    def _one_each(self, what: str, tensors: Sequence[Tensor]) -> None:
        if len(tensors) != self.size():
            raise ValueError(f"{what}: one tensor for each of the {self.size()} ranks, got {len(tensors)}")

    def _splits(self, tensor: Tensor, splits: Sequence[int], which: str) -> list[int]:
        """Bytes for each rank."""
        rows = tensor.shape[0] if tensor.dim() else 1
        row = _nbytes(tensor) // rows if rows else 0
        if not splits:
            if rows % self.size():
                raise ValueError(
                    f"all_to_all_single: {rows} rows of the {which} do not divide among {self.size()} ranks; give splits"
                )
            return [rows // self.size() * row] * self.size()
        if len(splits) != self.size() or sum(splits) != rows:
            raise ValueError(
                f"all_to_all_single: {which} splits {list(splits)} must be {self.size()} numbers that sum to {rows}"
            )
        return [split * row for split in splits]

    def _message(
        self,
        what: str,
        tensor: Tensor,
        host: Tensor | None,
        peer: int,
        tag: int,
        begin: Callable[..., Any] | None = None,
    ) -> MpiWork:
        what += self._over
        if tag < 0 or tag > _ANY_TAG_LIMIT:
            tag = zlib.crc32(str(tag).encode()) % _ANY_TAG_LIMIT
        if host is None:  # to be received
            room = self._staging.room(tensor)
            work = MpiMessage(what, tensor, room.host, self._timeout_s, given_up=lambda: self._lane.broken)
            work.on_arrival = lambda: self._staging.give_back(room)
        else:
            work = MpiMessage(what, tensor, host, self._timeout_s, given_up=lambda: self._lane.broken)
        work.begin(begin or self._comm.Irecv, peer, tag, sends=begin is not None)
        if self._ways.coalescing is not None:
            self._ways.coalescing.append(work)
        return work


def _form(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    found: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor)
    return list(found.values())

"""Collective operations on contiguous CPU tensors over one communicator, as blocking MPI calls.

Long messages go in pieces: Open MPI's all-reduce is twice to three times as slow per byte above 16 MB a call, and MPI's
counts end at 2^31. Nothing here knows of threads, of time-outs or of GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hvdtrain.mpi.dtypes import HALVES, Kind, as_bytes, memory, mpi_op, premultiplier

PIECE_BYTES = 8 * 2**20
_HALVES_BYTES = 4 * 2**20  # of 16-bit floats at a time
MAX_COUNT = 2**30  # bytes in one call, below MPI's 2^31 - 1

Levels = tuple[MPI.Intracomm, "MPI.Intracomm | None"]
"""A communicator of this node's ranks, and one of the nodes' first ranks, None on other ranks."""


class Mismatch(RuntimeError):
    """The ranks of a group called different operations, or the same with tensors that do not fit each other."""


# -- reductions -------------------------------------------------------------------------------------------------------


def all_reduce_(comm: MPI.Intracomm, tensor: Tensor, op: Any, kind: Any, levels: Levels | None = None) -> None:
    """Reduce a tensor over the ranks, in place; with ``levels`` (see `MpiProcessGroup`) within each node first."""
    # A replica may look meanwhile: what is written here is no change of its own, nor is what MPI writes.
    tensor = tensor.data
    mpi_op(kind, tensor.dtype)
    if comm.size > 1 and tensor.numel():
        if tensor.dtype in HALVES and levels is not None:
            wide = tensor.float()
            all_reduce_(comm, wide, op, kind, levels)
            tensor.copy_(wide)
            return
        if tensor.dtype in HALVES:
            _reduce_halves(comm, tensor, kind, op)
            return
        _premultiply_(tensor, op, kind)
        piece = max(1, PIECE_BYTES // tensor.element_size())
        how = mpi_op(kind, tensor.dtype)
        for start in range(0, tensor.numel(), piece):
            part = memory(tensor, start, min(piece, tensor.numel() - start))
            if levels is None:
                comm.Allreduce(MPI.IN_PLACE, part, how)
            else:
                _all_reduce_by_levels(*levels, part, how)
    else:
        _premultiply_(tensor, op, kind)
    if kind == Kind.AVG:
        tensor.div_(comm.size)


def _all_reduce_by_levels(node: MPI.Intracomm, first: MPI.Intracomm | None, part: list[Any], how: MPI.Op) -> None:
    """Only one rank of each node sends to other nodes."""
    if first is None:
        node.Reduce(part, None, how, 0)
    else:
        node.Reduce(MPI.IN_PLACE, part, how, 0)
        first.Allreduce(MPI.IN_PLACE, part, how)
    node.Bcast(part, 0)


def sum_sparse(comm: MPI.Intracomm, tensor: Tensor) -> Tensor:
    """The sum of the ranks' sparse tensors of one shape, which may hold different numbers of values; coalesced."""
    own = tensor.coalesce()
    indices, values = own.indices().contiguous(), own.values().contiguous()
    counts = comm.allgather(values.shape[0])
    all_indices = [torch.empty((indices.shape[0], count), dtype=torch.int64) for count in counts]
    all_values = [torch.empty((count, *values.shape[1:]), dtype=values.dtype) for count in counts]
    all_gather_unequal(comm, all_indices, indices)
    all_gather_unequal(comm, all_values, values)
    whole = torch.sparse_coo_tensor(
        torch.cat(all_indices, 1), torch.cat(all_values), tensor.shape, check_invariants=False
    )
    return whole.coalesce()


def reduce_(comm: MPI.Intracomm, tensor: Tensor, op: Any, kind: Any, root: int) -> None:
    """Reduce a tensor to one rank; the others' keep what they held."""
    mpi_op(kind, tensor.dtype)
    if tensor.dtype in HALVES:
        _reduce_halves(comm, tensor, kind, op, root)
        return
    source = tensor
    if kind == Kind.PREMUL_SUM:
        source = tensor.clone()
        _premultiply_(source, op, kind)
    how, piece = mpi_op(kind, tensor.dtype), max(1, PIECE_BYTES // tensor.element_size())
    for start in range(0, tensor.numel(), piece):
        count = min(piece, tensor.numel() - start)
        part = memory(source, start, count)
        if comm.rank != root:
            comm.Reduce(part, None, how, root)
        elif root == 0:
            comm.Reduce(MPI.IN_PLACE, part, how, root)
        else:  # MPICH 4.0.2 reads MPI_IN_PLACE as an address if the root is not rank 0, and crashes
            own = source.view(-1)[start : start + count].clone()
            comm.Reduce(memory(own), part, how, root)
    if comm.rank == root:
        if source is not tensor:
            tensor.copy_(source)
        if kind == Kind.AVG:
            tensor.div_(comm.size)


def reduce_scatter(comm: MPI.Intracomm, out: Tensor, tensor: Tensor, op: Any, kind: Any) -> None:
    """Reduce a tensor of ``size`` equal parts, and keep this rank's part in ``out``."""
    mpi_op(kind, tensor.dtype)
    if not tensor.numel():
        return
    if tensor.dtype in HALVES:
        reduced = _Halves(comm, out.numel(), tensor.dtype, kind, op)
        parts, flat = tensor.view(comm.size, -1), out.view(-1)
        for start in range(0, flat.numel(), reduced.length):
            columns = parts[:, start : start + reduced.length].contiguous()
            reduced(columns, flat[start : start + reduced.length])
        return
    source = tensor
    if kind == Kind.PREMUL_SUM:
        source = tensor.clone()
        _premultiply_(source, op, kind)
    how, part = mpi_op(kind, tensor.dtype), out.numel()
    piece = max(1, PIECE_BYTES // tensor.element_size() // comm.size)
    if part <= piece:
        comm.Reduce_scatter_block(memory(source), memory(out), how)
    else:
        parts = source.view(comm.size, part)
        for start in range(0, part, piece):
            end = min(part, start + piece)
            columns = parts[:, start:end].contiguous()
            comm.Reduce_scatter_block(memory(columns), memory(out, start, end - start), how)
    if kind == Kind.AVG:
        out.div_(comm.size)


def reduce_scatter_unequal(comm: MPI.Intracomm, out: Tensor, parts: Sequence[Tensor], op: Any, kind: Any) -> None:
    """As `reduce_scatter`, of parts that may differ in size."""
    flats, longest = [part.reshape(-1) for part in parts], max(part.numel() for part in parts)
    if out.dtype in HALVES:
        rows = torch.stack([torch.nn.functional.pad(flat, (0, longest - flat.numel())) for flat in flats])
        mine = torch.empty_like(rows[0])
        reduce_scatter(comm, mine, rows, op, kind)
        out.view(-1).copy_(mine[: out.numel()])
        return
    how = mpi_op(kind, out.dtype)
    piece = max(1, PIECE_BYTES // out.element_size() // comm.size)
    for start in range(0, longest, piece):
        cut = [flat[start : start + piece] for flat in flats]
        columns = torch.cat(cut)
        _premultiply_(columns, op, kind)
        counts = [len(part) for part in cut]
        received = torch.empty(counts[comm.rank], dtype=out.dtype)
        comm.Reduce_scatter(memory(columns), memory(received), counts, how)
        out.view(-1)[start : start + piece] = received
    if kind == Kind.AVG:
        out.div_(comm.size)


def _premultiply_(tensor: Tensor, op: Any, kind: Any) -> None:
    if kind == Kind.PREMUL_SUM:
        tensor.mul_(premultiplier(op))


def _reduce_halves(comm: MPI.Intracomm, tensor: Tensor, kind: Any, op: Any, root: int | None = None) -> None:
    """All-reduce, or reduce to ``root``, of 16-bit floats, in place: each rank reduces its part of everybody's, and all (or the
    root) gather the parts. Two exchanges of two bytes a value, as in a ring."""
    flat = tensor.view(-1)
    reduced = _Halves(comm, -(-flat.numel() // comm.size), tensor.dtype, kind, op)
    piece = reduced.length * comm.size
    for start in range(0, flat.numel(), piece):
        part = flat[start : start + piece]
        length = -(-part.numel() // comm.size)
        whole = part
        if part.numel() < length * comm.size:
            whole = torch.zeros(length * comm.size, dtype=tensor.dtype)
            whole[: part.numel()] = part
        rows = whole.view(comm.size, length)
        if root is None:
            reduced(rows, rows[comm.rank])
            comm.Allgather(MPI.IN_PLACE, memory(as_bytes(whole)))
        else:
            mine = torch.empty(length, dtype=tensor.dtype)
            reduced(rows, mine)
            comm.Gather(memory(as_bytes(mine)), memory(as_bytes(whole)) if comm.rank == root else None, root)
        if whole is not part and root in (None, comm.rank):
            part.copy_(whole[: part.numel()])


class _Halves:
    """This rank's row of the sum (or another reduction) of all ranks' 16-bit floats: exact in float32, rounded once.

    Args:
        comm: The group.
        most: Values of a row.
        dtype: float16 or bfloat16.
        kind: What reduction.
        op: The same, with its factor.
    """

    def __init__(self, comm: MPI.Intracomm, most: int, dtype: torch.dtype, kind: Any, op: Any) -> None:
        self._comm, self._kind = comm, kind
        self.length = max(1, min(most, _HALVES_BYTES // 2 // comm.size))
        """The most values of a row that one call takes."""
        self._received = torch.empty(comm.size * self.length, dtype=dtype)
        self._total, self._term = torch.empty(self.length), torch.empty(self.length)
        self._factor = premultiplier(op) if kind == Kind.PREMUL_SUM else None
        self._combine = {Kind.PRODUCT: torch.mul, Kind.MIN: torch.minimum, Kind.MAX: torch.maximum}.get(kind, torch.add)

    def __call__(self, parts: Tensor, out: Tensor) -> None:
        """Reduce ``parts``, of shape (size, up to `length`), to ``out``, which may be a row of them."""
        rows = self._received[: parts.numel()].view_as(parts)
        all_to_all_equal(self._comm, rows, parts)
        if len(rows) == 2 and self._factor is None and self._kind != Kind.AVG:
            self._combine(*rows, out=out)  # torch computes it in float32 as well, and rounds once
            return
        total, term = self._total[: len(out)], self._term[: len(out)]
        for rank, row in enumerate(rows):
            into = term if rank else total
            into.copy_(row)
            if self._factor is not None:
                into.mul_(self._factor)
            if rank:
                self._combine(total, term, out=total)
        if self._kind == Kind.AVG:
            total /= len(rows)
        out.copy_(total)


# -- operations that only move bytes ----------------------------------------------------------------------------------


def broadcast_(comm: MPI.Intracomm, tensor: Tensor, root: int) -> None:
    """Overwrite a tensor with that of one rank."""
    flat = as_bytes(tensor)
    for start in range(0, flat.numel(), MAX_COUNT):
        comm.Bcast(memory(flat, start, min(MAX_COUNT, flat.numel() - start)), root)


def all_gather(comm: MPI.Intracomm, out: Tensor, tensor: Tensor) -> None:
    """Fill ``out`` with every rank's ``tensor``, one after the other."""
    flat, whole = as_bytes(tensor), as_bytes(out)
    if not flat.numel():
        return
    with _Block(flat.numel()) as block:
        comm.Allgather(block.of(flat), block.of(whole))


def all_gather_unequal(comm: MPI.Intracomm, outs: Sequence[Tensor], tensor: Tensor) -> None:
    """Fill each of ``outs`` with the tensor of the rank of that number; they may differ in size."""
    for rank, out in enumerate(outs):
        if rank == comm.rank:
            out.copy_(tensor)
        broadcast_(comm, out, rank)


def gather(comm: MPI.Intracomm, out: Tensor | None, tensor: Tensor, root: int) -> None:
    """Fill ``out`` on one rank with every rank's ``tensor``."""
    flat = as_bytes(tensor)
    if not flat.numel():
        return
    with _Block(flat.numel()) as block:
        comm.Gather(block.of(flat), None if out is None else block.of(as_bytes(out)), root)


def scatter(comm: MPI.Intracomm, out: Tensor, tensor: Tensor | None, root: int) -> None:
    """Give each rank its part of one rank's ``tensor``."""
    flat = as_bytes(out)
    if not flat.numel():
        return
    with _Block(flat.numel()) as block:
        comm.Scatter(None if tensor is None else block.of(as_bytes(tensor)), block.of(flat), root)


def all_to_all_equal(comm: MPI.Intracomm, out: Tensor, tensor: Tensor) -> None:
    """Exchange equal parts: part i of ``tensor`` goes to rank i."""
    flat, whole = as_bytes(tensor), as_bytes(out)
    if not flat.numel():
        return
    with _Block(flat.numel() // comm.size) as block:
        comm.Alltoall(block.of(flat), block.of(whole))


def all_to_all(comm: MPI.Intracomm, out: Tensor, tensor: Tensor, receive: Sequence[int], send: Sequence[int]) -> None:
    """Exchange parts of any size.

    Args:
        comm: The group.
        out: Receives; flat, of uint8.
        tensor: Sends; flat, of uint8.
        receive: Bytes from each rank.
        send: Bytes for each rank.

    Raises:
        Mismatch: Some rank expects another number of bytes than it is sent.
    """
    expected = np.empty(comm.size, dtype=np.int64)
    comm.Alltoall(np.array(send, dtype=np.int64), expected)
    wrong = [rank for rank in range(comm.size) if expected[rank] != receive[rank]]
    troubled = comm.allreduce([(comm.rank, rank, int(expected[rank]), int(receive[rank])) for rank in wrong])
    if troubled:
        told = "; ".join(
            f"rank {to} expects {want} bytes of rank {of}, which sends {has}" for to, of, has, want in troubled
        )
        raise Mismatch(f"the splits of the ranks do not fit: {told}")
    if max(sum(send), sum(receive)) <= MAX_COUNT:
        comm.Alltoallv(
            [memory(tensor)[0], list(send), _starts(send), MPI.BYTE],
            [memory(out)[0], list(receive), _starts(receive), MPI.BYTE],
        )
        return
    requests = []
    for ranks, buffer, sizes, begin in ((comm.size, out, receive, comm.Irecv), (comm.size, tensor, send, comm.Isend)):
        starts = _starts(sizes)
        for step in range(ranks):
            rank = (comm.rank + step) % ranks
            for start in range(0, sizes[rank], MAX_COUNT):
                count = min(MAX_COUNT, sizes[rank] - start)
                requests.append(begin(memory(buffer, starts[rank] + start, count), rank))
    MPI.Request.Waitall(requests)


def _starts(sizes: Sequence[int]) -> list[int]:
    starts = [0]
    for size in sizes[:-1]:
        starts.append(starts[-1] + size)
    return starts


class _Block:
    """A datatype of ``nbytes`` bytes: equal parts of any length then have a count that MPI's 32 bits can hold."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._large: MPI.Datatype | None = None

    def __enter__(self) -> _Block:
        if self._nbytes > MAX_COUNT:
            units, rest = divmod(self._nbytes, 2**20)
            unit = MPI.BYTE.Create_contiguous(2**20)
            self._large = MPI.Datatype.Create_struct([units, rest], [0, units * 2**20], [unit, MPI.BYTE]).Commit()
            unit.Free()
        return self

    def __exit__(self, *_: object) -> None:
        if self._large is not None:
            self._large.Free()

    def of(self, flat: Tensor) -> list[Any]:
        """The buffer of a flat byte tensor that is a whole number of blocks long."""
        return [MPI.memory.fromaddress(flat.data_ptr(), flat.numel()), self._large or MPI.BYTE]

"""Collectives with one meaning on every engine.

Names and meanings are those of `torch.distributed`; results are new tensors and arguments are left alone, but for the
two names that end in an underscore. What is uniform here and is not between the engines: averages (never of integers,
never overflowing in float16), bool, float16 and bfloat16 (carried in float32), shapes that differ between ranks, empty,
zero-dimensional and non-contiguous tensors, tensors on another device than the engine's, and differentiation: the
result of a tensor that requires grad can be differentiated.

This is not the path of the gradients: a replica hands those to its engine directly.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, Literal, TypeVar, cast, get_args, overload

import torch
from torch import Tensor

from hvdtrain.backends.wire import Done, Wire, WireOp, Work
from hvdtrain.errors import CollectiveError, HvdtrainError
from hvdtrain.ranks.last_words import is_engine_error
from hvdtrain.ranks.watch import NullWatch

ReduceOp = Literal["sum", "mean", "min", "max", "product"]
T = TypeVar("T")

_WIRE_DTYPE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float32,  # no engine sums halves with float32's care, and some cannot at all
    torch.bfloat16: torch.float32,
    torch.int64: torch.int64,
    torch.int32: torch.int32,
    torch.int16: torch.int32,  # Gloo has no 16-bit integers
    torch.int8: torch.int8,
    torch.uint8: torch.uint8,
    torch.bool: torch.uint8,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}
_BOOL_OP: dict[str, WireOp] = {"sum": "max", "max": "max", "min": "min", "product": "min"}
_DTYPES = list(_WIRE_DTYPE)
_MAX_DIMS = 8


class Pending(Generic[T]):
    """The result of a collective that was started with ``async_op=True``.

    Args:
        work: The engine's operation.
        finish: Turns the received bytes into the result; called once.
        guard: Context in which to wait, so that errors name the collective.
    """

    def __init__(self, work: Work, finish: Callable[[], T], guard: Callable[[], Any]) -> None:
        self._work = work
        self._finish: Callable[[], T] | None = finish
        self._guard = guard
        self._result: T | None = None

    def done(self) -> bool:
        """Say whether `wait` would return at once."""
        return self._finish is None or self._work.is_completed()

    def wait(self) -> T:
        """Block until every rank has contributed, and return the result; may be called again.

        Raises:
            CollectiveError: The engine failed or timed out.
        """
        if self._finish is not None:
            with self._guard():
                self._work.wait()
                self._result = self._finish()
            self._finish = None
        return cast(T, self._result)


class Communicator:
    """Collectives over the ranks of one `Wire`. Every rank of the group must call each, in the same order.

    Args:
        wire: The engine's operations; None until the backend has started.
        watch: Told what this rank is waiting for, so that a time-out can name the ranks that are missing.
        check: Compare operation, dtype and shape over the ranks before each collective (one small exchange more), so
            that a mismatch is an error that names the ranks instead of a time-out or of wrong numbers.
        label: How messages name this group.
    """

    def __init__(
        self, wire: Wire | None = None, watch: NullWatch | None = None, *, check: bool = False, label: str = "world"
    ) -> None:
        self._wire = wire
        self._watch = watch or NullWatch()
        self._check = check
        self._label = label

    @property
    def wire(self) -> Wire:
        """The engine's own operations, for code that measures or extends them."""
        if self._wire is None:
            raise CollectiveError(
                "the backend is not running: use it inside `with hvdtrain.init() as backend:`, or between start() and stop()"
            )
        return self._wire

    @property
    def rank(self) -> int:
        """This process's rank in the group, 0 <= rank < world_size."""
        return self.wire.rank

    @property
    def world_size(self) -> int:
        """The number of ranks in the group."""
        return self.wire.size

    @property
    def ranks(self) -> tuple[int, ...]:
        """The world's ranks that form the group, in the group's order."""
        return self.wire.ranks

    @contextmanager
    def region(self, label: str, what: str) -> Iterator[None]:
        """Mark an operation of the engine that all ranks must take part in, and name it if the engine fails.

        Args:
            label: Operations of one label are counted, to find the ranks that have not begun this one.
            what: The operation, for messages.

        Raises:
            CollectiveError: In place of the engine's own error; names the operation and the ranks that are missing.
            RankFailure: Another rank has failed.
        """
        with self._region(label, what, is_engine_error):
            yield

    # -- reductions ---------------------------------------------------------------------------------------------------

    @overload
    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum", *, async_op: Literal[False] = False) -> Tensor: ...
    @overload
    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum", *, async_op: Literal[True]) -> Pending[Tensor]: ...
    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum", *, async_op: bool = False) -> Tensor | Pending[Tensor]:
        """Reduce a tensor over the ranks; every rank gets the result.

        Args:
            tensor: Any shape, the same on every rank. Left alone. bool: sum and max are "any", min and product "all".
            op: "sum", "mean" (floating point and complex only), "min", "max" or "product".
            async_op: Return a `Pending` at once; its `wait` returns the result.

        Returns:
            A new tensor of the same shape, dtype and device. If ``tensor`` requires grad, the result can be
            differentiated (sum and mean): the gradient is the sum (mean) of the ranks' gradients, as in torch.

        Raises:
            CollectiveError: The operation is undefined for the dtype, or the engine failed or timed out.
        """
        if _differentiate(tensor):
            if async_op or op not in ("sum", "mean"):
                raise CollectiveError(
                    f"all_reduce(op={op!r}, async_op={async_op}) of a tensor that requires grad cannot be differentiated; "
                    "pass tensor.detach(), or use op 'sum' or 'mean' with async_op=False"
                )
            return cast(Tensor, _AllReduce.apply(tensor, self, op))  # type: ignore[no-untyped-call]
        pending = self._start_all_reduce(tensor, op, "all_reduce")
        return pending if async_op else pending.wait()

    def all_reduce_(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        """Reduce over the ranks and write the result into ``tensor``, which is returned."""
        _check_tensor("all_reduce_", tensor)
        if tensor.requires_grad and torch.is_grad_enabled():
            raise CollectiveError(
                "all_reduce_ would overwrite a tensor that requires grad; use all_reduce, or torch.no_grad()"
            )
        if tensor.dtype in (torch.float32, torch.float64) and self._direct(tensor):  # no copy
            wire_op = self._wire_op(tensor, op)
            self._agree("all_reduce_", op, tensor)
            with self._guard("all_reduce_", tensor, op):
                self.wire.all_reduce_(tensor, wire_op).wait()
            return tensor.div_(self.wire.size) if op == "mean" else tensor
        return tensor.copy_(self._start_all_reduce(tensor, op, "all_reduce_").wait())

    def reduce_scatter(self, tensors: Sequence[Tensor], op: ReduceOp = "sum") -> Tensor:
        """Reduce the ranks' lists of tensors element by element; rank i gets the i-th result.

        Args:
            tensors: As many as there are ranks; the i-th has the same shape and dtype on every rank.
            op: As for `all_reduce`.

        Returns:
            A new tensor of the shape of ``tensors[rank]``.
        """
        wire, tensors = self.wire, self._one_dtype("reduce_scatter", tensors)
        mine = tensors[wire.rank]
        if any(t.shape != mine.shape for t in tensors):  # no engine does ragged ones: reduce all, keep one
            flat = self._start_all_reduce(
                torch.cat([t.detach().reshape(-1) for t in tensors]), op, "reduce_scatter"
            ).wait()
            parts = flat.split([t.numel() for t in tensors])
            return cast(Tensor, parts[wire.rank]).reshape(mine.shape).clone()
        stacked = torch.stack([t.detach() for t in tensors])
        wire_op = self._wire_op(stacked, op)
        self._agree("reduce_scatter", op, stacked)
        whole = self._encode(stacked)
        if whole.numel() == 0:
            return mine.detach().clone()
        part = torch.empty_like(whole[0])
        with self._guard("reduce_scatter", stacked, op):
            wire.reduce_scatter_into(part, whole, wire_op).wait()
        return self._decode(part, mine, op)

    # -- moving -------------------------------------------------------------------------------------------------------

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Collect every rank's tensor on every rank.

        Args:
            tensor: Any shape, which may differ between ranks; the dtype may not.

        Returns:
            New tensors, one a rank, in rank order. If ``tensor`` requires grad they can be differentiated: the
            gradient is the sum over the ranks, as in torch.

        Raises:
            CollectiveError: The dtypes differ, or the engine failed or timed out.
        """
        if _differentiate(tensor):
            return list(cast("tuple[Tensor, ...]", _AllGather.apply(tensor, self)))  # type: ignore[no-untyped-call]
        wire = self.wire
        headers = self._exchange_headers("all_gather", tensor)
        sizes = [_numel(shape) for _, shape in headers]
        longest = max(sizes)
        if longest == 0:
            return [torch.empty(shape, dtype=tensor.dtype, device=tensor.device) for _, shape in headers]
        flat = torch.zeros(longest, dtype=tensor.dtype, device=wire.device)
        flat[: tensor.numel()] = tensor.detach().reshape(-1).to(wire.device)
        sent = flat.view(torch.uint8)
        out = torch.empty((wire.size, sent.numel()), dtype=torch.uint8, device=wire.device)
        with self._guard("all_gather", tensor):
            wire.all_gather_into(out, sent).wait()
        received = out.view(tensor.dtype).to(tensor.device)
        return [received[i, :size].clone().reshape(headers[i][1]) for i, size in enumerate(sizes)]

    def all_to_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Send the i-th tensor to rank i.

        Args:
            tensors: As many as there are ranks, of one dtype (the same on every rank); shapes are free.

        Returns:
            New tensors: the i-th is the one that rank i sent to this rank.
        """
        wire, tensors = self.wire, self._one_dtype("all_to_all", tensors)
        self._agree("all_to_all", "", None)
        mine = torch.stack([_header(t) for t in tensors]).to(wire.device)
        theirs = torch.empty_like(mine)
        counts = [mine.shape[1]] * wire.size
        with self._guard("all_to_all", mine):
            wire.all_to_all_into(theirs.view(-1), mine.view(-1), counts, counts).wait()
        headers = [_read_header(row) for row in theirs.tolist()]
        first = tensors[0]
        # Every rank must take the same decision, or the ranks that raise leave the others waiting.
        wrong = [i for i, (dtype, _) in enumerate(headers) if dtype != first.dtype]
        if bool(self._start_all_reduce(torch.tensor(bool(wrong)), "max", "all_to_all").wait()):
            raise CollectiveError(
                f"all_to_all: the ranks sent different dtypes (this rank {first.dtype}; differing ranks {wrong})"
            )
        width = first.element_size()
        send = [t.numel() * width for t in tensors]
        receive = [_numel(shape) * width for _, shape in headers]
        sent = torch.cat([t.detach().reshape(-1).to(wire.device) for t in tensors]).view(torch.uint8)
        out = torch.empty(sum(receive), dtype=torch.uint8, device=wire.device)
        with self._guard("all_to_all", sent):
            wire.all_to_all_into(out, sent, receive, send).wait()
        parts = out.split(receive)
        return [part.clone().view(first.dtype).reshape(headers[i][1]).to(first.device) for i, part in enumerate(parts)]

    @overload
    def broadcast(self, tensor: Tensor, src: int = 0, *, async_op: Literal[False] = False) -> Tensor: ...
    @overload
    def broadcast(self, tensor: Tensor, src: int = 0, *, async_op: Literal[True]) -> Pending[Tensor]: ...
    def broadcast(self, tensor: Tensor, src: int = 0, *, async_op: bool = False) -> Tensor | Pending[Tensor]:
        """Give every rank a copy of rank ``src``'s tensor.

        Args:
            tensor: On every rank the same shape and dtype; only ``src``'s content counts.
            src: A rank of this group.
            async_op: Return a `Pending` at once.

        Returns:
            A new tensor. It cannot be differentiated: pass a detached one.
        """
        if _differentiate(tensor):
            raise CollectiveError(
                "broadcast of a tensor that requires grad cannot be differentiated; pass tensor.detach()"
            )
        pending = self._start_broadcast(tensor, src, "broadcast")
        return pending if async_op else pending.wait()

    def broadcast_(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Overwrite ``tensor`` with rank ``src``'s, and return it."""
        _check_tensor("broadcast_", tensor)
        if tensor.requires_grad and torch.is_grad_enabled():
            raise CollectiveError("broadcast_ would overwrite a tensor that requires grad; do so under torch.no_grad()")
        return tensor.copy_(self._start_broadcast(tensor, src, "broadcast_").wait())

    def barrier(self) -> None:
        """Return once every rank has called it."""
        self._agree("barrier", "", None)
        with self._guard("barrier", None):
            self.wire.barrier().wait()

    # -- objects ------------------------------------------------------------------------------------------------------

    def broadcast_object(self, obj: T, src: int = 0) -> T:
        """Give every rank a copy of rank ``src``'s object (pickled; the argument of other ranks is ignored).

        The source's own object is returned to it unchanged.
        """
        self._check_rank("broadcast_object", src)
        wire = self.wire
        data = _pickled(obj) if wire.rank == src else None
        length = torch.tensor(0 if data is None else data.numel(), dtype=torch.int64)
        length = self._start_broadcast(length, src, "broadcast_object").wait()
        buffer = data if data is not None else torch.empty(int(length), dtype=torch.uint8)
        received = self._start_broadcast(buffer, src, "broadcast_object").wait()
        return obj if wire.rank == src else cast(T, _unpickled(received))

    def all_gather_object(self, obj: T) -> list[T]:
        """Collect every rank's object (pickled) on every rank, in rank order."""
        gathered = self.all_gather(_pickled(obj))
        return [obj if i == self.wire.rank else cast(T, _unpickled(data)) for i, data in enumerate(gathered)]

    # -- inside -------------------------------------------------------------------------------------------------------

    def _start_all_reduce(self, tensor: Tensor, op: ReduceOp, name: str) -> Pending[Tensor]:
        wire_op = self._wire_op(tensor, op)
        self._agree(name, op, tensor)
        buffer = self._encode(tensor)
        guard = self._guard(name, tensor, op)
        if buffer.numel() == 0:
            return Pending(Done(), lambda: tensor.detach().clone(), nullcontext)
        with guard:
            work = self.wire.all_reduce_(buffer, wire_op)
        return Pending(
            work, lambda: self._decode(buffer, tensor, op), lambda: self._guard(name, tensor, op, again=True)
        )

    def _start_broadcast(self, tensor: Tensor, src: int, name: str) -> Pending[Tensor]:
        _check_tensor(name, tensor)
        self._check_rank(name, src)
        self._agree(name, str(src), tensor)
        wire = self.wire
        copy = tensor.detach().to(wire.device, copy=True, memory_format=torch.contiguous_format).reshape(-1)
        if copy.numel() == 0:
            return Pending(Done(), lambda: tensor.detach().clone(), nullcontext)
        with self._guard(name, tensor):
            work = wire.broadcast_(copy.view(torch.uint8), src)

        def finish() -> Tensor:
            return copy.reshape(tensor.shape).to(tensor.device)

        return Pending(work, finish, lambda: self._guard(name, tensor, again=True))

    def _direct(self, tensor: Tensor) -> bool:
        return tensor.device == self.wire.device and tensor.is_contiguous() and tensor.numel() > 0

    def _encode(self, tensor: Tensor) -> Tensor:
        """A contiguous copy on the wire's device and in a dtype that every engine reduces."""
        plain = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
        return plain.to(
            self.wire.device, _WIRE_DTYPE[tensor.dtype], copy=True, memory_format=torch.contiguous_format
        ).contiguous()

    def _decode(self, buffer: Tensor, like: Tensor, op: ReduceOp) -> Tensor:
        if op == "mean":
            buffer = buffer.div_(self.wire.size)
        if like.is_complex():
            buffer = torch.view_as_complex(buffer)
        return buffer.to(like.device, like.dtype).reshape(like.shape)

    def _wire_op(self, tensor: Tensor, op: str) -> WireOp:
        """Check that ``op`` is defined for ``tensor``; return what the engine must do."""
        _check_tensor("all_reduce", tensor)
        if op not in get_args(ReduceOp):
            raise CollectiveError(f"unknown reduction {op!r}; use one of {', '.join(get_args(ReduceOp))}")
        if tensor.dtype == torch.bool:
            if op == "mean":
                raise CollectiveError("the mean of a bool tensor is undefined; convert it: tensor.float()")
            return _BOOL_OP[op]
        if op == "mean":
            if not (tensor.is_floating_point() or tensor.is_complex()):
                raise CollectiveError(f"the mean of {tensor.dtype} would be truncated; convert it: tensor.double()")
            return "sum"
        if tensor.is_complex() and op != "sum":
            raise CollectiveError(f"{op!r} of a complex tensor is not supported; use 'sum' or 'mean'")
        return cast(WireOp, op)

    def _one_dtype(self, name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        tensors = list(tensors)
        if len(tensors) != self.wire.size:
            raise CollectiveError(f"{name} needs one tensor a rank: {self.wire.size}, got {len(tensors)}")
        for tensor in tensors:
            _check_tensor(name, tensor)
            if tensor.dtype != tensors[0].dtype:
                raise CollectiveError(f"{name} needs tensors of one dtype, got {tensors[0].dtype} and {tensor.dtype}")
            if _differentiate(tensor):
                raise CollectiveError(
                    f"{name} of a tensor that requires grad cannot be differentiated; pass tensor.detach()"
                )
        return tensors

    def _check_rank(self, name: str, src: int) -> None:
        if not 0 <= src < self.wire.size:
            raise CollectiveError(f"{name}: src={src} is no rank of this group of {self.wire.size}")

    def _exchange_headers(self, name: str, tensor: Tensor) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """Every rank's dtype and shape; an error on every rank if the dtypes differ."""
        _check_tensor(name, tensor)
        self._agree(name, "", None)
        wire = self.wire
        mine = _header(tensor).to(wire.device)
        out = torch.empty((wire.size, mine.numel()), dtype=torch.int64, device=wire.device)
        with self._guard(name, tensor):
            wire.all_gather_into(out, mine).wait()
        headers = [_read_header(row) for row in out.tolist()]
        if len({dtype for dtype, _ in headers}) > 1:
            raise CollectiveError(
                f"{name}: dtypes differ between ranks: {_by_rank(wire.ranks, [d for d, _ in headers])}"
            )
        return headers

    def _agree(self, name: str, detail: str, tensor: Tensor | None) -> None:
        """With ``check``: fail on every rank, naming ranks, unless all call the same collective on the same shape."""
        if not self._check or self.wire.size == 1:
            return
        wire = self.wire
        described = name + (f" op={detail}" if detail else "")
        if tensor is not None:
            described += f" {tensor.dtype} {tuple(tensor.shape)}"
        digest = torch.tensor(
            list(hashlib.sha256(described.encode()).digest()[:16]), dtype=torch.uint8, device=wire.device
        )
        out = torch.empty((wire.size, 16), dtype=torch.uint8, device=wire.device)
        with self._guard(name, tensor):
            wire.all_gather_into(out, digest).wait()
        if bool((out == out[0]).all()):
            return
        padded = torch.zeros(256, dtype=torch.uint8, device=wire.device)
        text = described.encode()[:256]
        padded[: len(text)] = torch.tensor(list(text), dtype=torch.uint8, device=wire.device)
        texts = torch.empty((wire.size, 256), dtype=torch.uint8, device=wire.device)
        with self._guard(name, tensor):
            wire.all_gather_into(texts, padded).wait()
        called = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in texts.tolist()]
        raise CollectiveError(f"the ranks called different collectives: {_by_rank(wire.ranks, called)}")

    def _guard(
        self, name: str, tensor: Tensor | None, op: str = "", *, again: bool = False
    ) -> AbstractContextManager[None]:
        """The region of one collective, in which nothing but the engine can fail."""
        what = name + (f"(op={op})" if op else "")
        if tensor is not None:
            what += f" of {tensor.dtype} {tuple(tensor.shape)}"
        return self._region(self._label, f"{what} over {self._label} ({self.wire.size} ranks)", _any_error, again=again)

    @contextmanager
    def _region(
        self, label: str, what: str, is_engines: Callable[[BaseException], bool], *, again: bool = False
    ) -> Iterator[None]:
        ranks = self.ranks
        with self._watch.region(label, what, ranks, again=again):
            try:
                yield
            except RuntimeError as error:
                if isinstance(error, HvdtrainError) or not is_engines(error):
                    raise
                rank, failure = ranks[self.rank], self._watch.failure
                if failure is not None and failure.rank == rank:  # the watch knows better
                    raise CollectiveError(failure.message) from error
                missing = self._watch.missing(label, ranks)
                raise CollectiveError(f"{what} failed on rank {rank}{missing}: {error}") from error


class _AllReduce(torch.autograd.Function):
    """y = sum (or mean) over ranks of x; so dL/dx = sum (or mean) over ranks of dL/dy."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, communicator: Communicator, op: ReduceOp) -> Tensor:
        ctx.communicator, ctx.op = communicator, op
        return communicator._start_all_reduce(tensor, op, "all_reduce").wait()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return ctx.communicator._start_all_reduce(grads[0], ctx.op, "all_reduce backward").wait(), None, None


class _AllGather(torch.autograd.Function):
    """y[i] = x of rank i; so dL/dx on rank i = sum over ranks of dL/dy[i]."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, communicator: Communicator) -> tuple[Tensor, ...]:
        ctx.communicator = communicator
        return tuple(communicator.all_gather(tensor.detach()))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return ctx.communicator.reduce_scatter([g.detach() for g in grads], "sum"), None


def _any_error(error: BaseException) -> bool:
    return True


def _differentiate(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled()


def _check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise CollectiveError(
            f"{name} takes a torch.Tensor, got {type(tensor).__name__}; for other objects use all_gather_object or broadcast_object"
        )
    if tensor.layout != torch.strided:
        raise CollectiveError(f"{name} takes dense tensors, got layout {tensor.layout}; use tensor.to_dense()")
    if tensor.dtype not in _WIRE_DTYPE:
        known = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise CollectiveError(f"{name} cannot carry {tensor.dtype}; convert to one of {known}")
    if tensor.dim() > _MAX_DIMS:
        raise CollectiveError(f"{name} takes up to {_MAX_DIMS} dimensions, got {tensor.dim()}; reshape the tensor")


def _header(tensor: Tensor) -> Tensor:
    """Dtype and shape as ten integers, so that ranks can tell each other what comes."""
    shape = list(tensor.shape)
    return torch.tensor([_DTYPES.index(tensor.dtype), len(shape), *shape, *[0] * (_MAX_DIMS - len(shape))])


def _read_header(row: list[int]) -> tuple[torch.dtype, tuple[int, ...]]:
    return _DTYPES[row[0]], tuple(row[2 : 2 + row[1]])


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for extent in shape:
        product *= extent
    return product


def _by_rank(ranks: Sequence[int], values: Sequence[object]) -> str:
    """'rank 0, 2: x; rank 1: y'."""
    groups: dict[str, list[int]] = {}
    for rank, value in zip(ranks, values, strict=True):
        groups.setdefault(str(value), []).append(rank)
    return "; ".join(f"rank {', '.join(map(str, members))}: {value}" for value, members in groups.items())


def _pickled(obj: object) -> Tensor:
    buffer = io.BytesIO()
    pickle.dump(obj, buffer, protocol=pickle.HIGHEST_PROTOCOL)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _unpickled(data: Tensor) -> object:
    # From a rank of this very job, never from a file: it runs the same program with the same rights.
    return pickle.loads(data.cpu().numpy().tobytes())

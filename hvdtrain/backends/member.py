"""One rank's place in a group, and what every collective is made of.

Before: tensors and ranks are checked, values brought to the engine's device in a dtype that it reduces, and, with
``check``, the ranks compare what they call. Around: the watch is told what this rank waits for, and an engine's error
becomes one that names the collective and the missing ranks. The collectives themselves are `Communicator`'s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Generic, TypeVar, cast, get_args

import torch
from torch import Tensor

from hvdtrain.backends import extremes
from hvdtrain.backends.alike import differing
from hvdtrain.backends.forms import (
    WIRE_DTYPE,
    ReduceOp,
    by_rank,
    check_tensor,
    header,
    read_header,
    refuse_gradient,
)
from hvdtrain.backends.wire import Done, Wire, WireOp, Work
from hvdtrain.errors import CollectiveError, HvdtrainError
from hvdtrain.ranks.last_words import is_engine_error
from hvdtrain.ranks.watch import NullWatch

T = TypeVar("T")

_BOOL_OP: dict[str, WireOp] = {"sum": "max", "max": "max", "min": "min", "product": "min"}


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


class Member:
    """This rank among the ranks of one `Wire`.

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
        self._key = b""  # with which ranks sign the objects that they send each other
        self._forbidden: dict[int, str] = {}  # by thread: why it may use no engine now

    @property
    def wire(self) -> Wire:
        """The engine's own operations, for code that measures or extends them."""
        if self._wire is None:
            raise CollectiveError(
                "the backend is not running: use it inside `with hvdtrain.init() as backend:`, or between start() and stop()"
            )
        if self._forbidden and threading.get_ident() in self._forbidden:
            raise CollectiveError(self._forbidden[threading.get_ident()])
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
    def key(self) -> bytes:
        """With which the ranks sign the objects that they send each other; b"" in a world of one."""
        return self._key

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
        with self._region([(label, self.ranks)], what, is_engine_error):
            yield

    def note_step(self, step: int) -> None:
        """Let the other ranks know how many steps this one has taken, should they have to say where it ended."""
        self._watch.step = step

    # -- inside -------------------------------------------------------------------------------------------------------

    def _start_all_reduce(self, tensor: Tensor, op: ReduceOp, name: str, *, at_once: bool = True) -> Pending[Tensor]:
        """``at_once``: the caller waits before it does anything else."""
        wire_op = self._wire_op(name, tensor, op)
        self._agree(name, op, tensor)
        buffer = self._encode(tensor)
        guard = self._guard(name, tensor, op)
        if buffer.numel() == 0:
            return Pending(Done(), lambda: tensor.detach().clone(), nullcontext)
        with guard:
            work = extremes.all_reduce_(self.wire.at_once if at_once else self.wire, buffer, wire_op)
        return Pending(
            work, lambda: self._decode(buffer, tensor, op), lambda: self._guard(name, tensor, op, again=True)
        )

    def _start_broadcast(self, tensor: Tensor, src: int, name: str, *, at_once: bool = True) -> Pending[Tensor]:
        check_tensor(name, tensor)
        self._check_rank(name, src)
        self._agree(name, str(src), tensor)
        wire = self.wire
        copy = tensor.detach().to(wire.device, copy=True, memory_format=torch.contiguous_format).reshape(-1)
        if copy.numel() == 0:
            return Pending(Done(), lambda: tensor.detach().clone(), nullcontext)
        with self._guard(name, tensor):
            work = (wire.at_once if at_once else wire).broadcast_(copy.view(torch.uint8), src)

        def finish() -> Tensor:
            return copy.reshape(tensor.shape).to(tensor.device)

        return Pending(work, finish, lambda: self._guard(name, tensor, again=True))

    def _direct(self, tensor: Tensor) -> bool:
        return tensor.device == self.wire.device and tensor.is_contiguous() and tensor.numel() > 0

    def _encode(self, tensor: Tensor) -> Tensor:
        """A contiguous copy on the wire's device and in a dtype that every engine reduces."""
        plain = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
        return plain.to(
            self.wire.device, WIRE_DTYPE[tensor.dtype], copy=True, memory_format=torch.contiguous_format
        ).contiguous()

    def _decode(self, buffer: Tensor, like: Tensor, op: ReduceOp) -> Tensor:
        if op == "mean":
            buffer = buffer.div_(self.wire.size)
        if like.is_complex():
            buffer = torch.view_as_complex(buffer)
        return buffer.to(like.device, like.dtype).reshape(like.shape)

    def _wire_op(self, name: str, tensor: Tensor, op: str) -> WireOp:
        """Check that ``op`` is defined for ``tensor``; return what the engine must do."""
        check_tensor(name, tensor)
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
            check_tensor(name, tensor)
            if tensor.dtype != tensors[0].dtype:
                raise CollectiveError(f"{name} needs tensors of one dtype, got {tensors[0].dtype} and {tensor.dtype}")
            refuse_gradient(name, tensor)
        return tensors

    def _check_rank(self, name: str, rank: int, role: str = "src") -> None:
        if not 0 <= rank < self.wire.size:
            raise CollectiveError(f"{name}: {role}={rank} is no rank of this group of {self.wire.size}")

    def _exchange_headers(self, name: str, tensor: Tensor) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """Every rank's dtype and shape; an error on every rank if the dtypes differ."""
        check_tensor(name, tensor)
        self._agree(name, "", None)
        wire = self.wire
        mine = header(tensor).to(wire.device)
        out = torch.empty((wire.size, mine.numel()), dtype=torch.int64, device=wire.device)
        with self._guard(name, tensor):
            wire.at_once.all_gather_into(out, mine).wait()
        headers = [read_header(row) for row in out.tolist()]
        if len({dtype for dtype, _ in headers}) > 1:
            raise CollectiveError(
                f"{name}: dtypes differ between ranks: {by_rank(wire.ranks, [d for d, _ in headers])}"
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
        with self._guard(name, tensor):
            called = differing(wire.at_once, described)
        if called:
            raise CollectiveError(f"the ranks called different collectives: {by_rank(wire.ranks, called)}")

    @contextmanager
    def _without_engine(self, reason: str) -> Iterator[None]:
        """Refuse, for ``reason``, whatever this thread would do with the engine."""
        thread = threading.get_ident()
        outer = self._forbidden.get(thread)
        self._forbidden[thread] = reason
        try:
            yield
        finally:
            if outer is None:
                del self._forbidden[thread]
            else:
                self._forbidden[thread] = outer

    def _guard(
        self, name: str, tensor: Tensor | None, op: str = "", *, again: bool = False
    ) -> AbstractContextManager[None]:
        """The region of one collective, in which nothing but the engine can fail."""
        what = name + (f"(op={op})" if op else "")
        if tensor is not None:
            what += f" of {tensor.dtype} {tuple(tensor.shape)}"
        what += f" over {self._label} ({self.wire.size} ranks)"
        return self._region([(self._label, self.ranks)], what, any_error, again=again)

    @contextmanager
    def _region(
        self,
        waits: Sequence[tuple[str, Sequence[int]]],
        what: str,
        is_engines: Callable[[BaseException], bool],
        *,
        again: bool = False,
    ) -> Iterator[None]:
        """`region`, with all that may differ: ``waits`` has labels, each with the world's ranks that it needs."""
        rank, watch = self.ranks[self.rank], self._watch
        with ExitStack() as regions:
            for label, ranks in waits:
                regions.enter_context(watch.region(label, what, ranks, again=again))
            try:
                yield
            except RuntimeError as error:
                if isinstance(error, HvdtrainError) or not is_engines(error):
                    raise
                if watch.failure is not None and watch.failure.rank == rank:  # the watch knows better
                    raise CollectiveError(watch.failure.message) from error
                missing = next(filter(None, (watch.missing(label, ranks) for label, ranks in waits)), "")
                raise CollectiveError(f"{what} failed on rank {rank}{missing}: {error}") from error


def any_error(error: BaseException) -> bool:
    """Every error: where nothing but the engine can fail."""
    return True

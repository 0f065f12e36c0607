"""Messages between two ranks: `send`, `recv`, `sendrecv`.

Dtype and shape travel with a tensor, in a first block that holds small tensors whole; the rest follows in a second
message. A message waits for its receiver, on every engine: nothing is buffered, so what works on one engine works on all,
and a program in which two ranks wait for each other fails on all, at the timeout, naming both.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor

from hvdtrain.backends.forms import HEADER, as_bytes, check_tensor, header, numel, read_header, refuse_gradient
from hvdtrain.backends.member import Member, any_error
from hvdtrain.backends.rooted import arrival
from hvdtrain.errors import CollectiveError

_BLOCK_BYTES = 512
_HEADER_BYTES = 8 * (HEADER + 1)
_INLINE_BYTES = _BLOCK_BYTES - _HEADER_BYTES


class Messages(Member):
    """Sending and receiving; only the two ranks of a message take part in it.

    Messages from one rank to another arrive in the order in which they were sent. Threads may send and receive at once;
    those that use the same direction between the same two ranks take turns.
    """

    def send(self, tensor: Tensor, dst: int) -> None:
        """Send a tensor to rank ``dst``, which calls `recv`; returns when it has taken it.

        Two ranks that both send before they receive wait for each other: let one of them receive first, or use `sendrecv`.

        Args:
            tensor: Any shape and dtype; the receiver need not know them. Left alone.
            dst: Another rank of this group.

        Raises:
            CollectiveError: ``dst`` is this rank itself or no rank, ``tensor`` requires grad, or ``dst`` did not receive
                within the timeout (the message says what it does instead).
        """
        _check("send", tensor)
        self._check_peer("send", dst, "dst")
        self._pass(f"send(dst={dst}) of {tensor.dtype} {tuple(tensor.shape)}", tensor, dst, None)

    def recv(self, src: int) -> Tensor:
        """Receive the next tensor that rank ``src`` sends to this one.

        Returns:
            A new tensor of the shape and dtype that was sent: on the CPU if ``src`` had it there, on this rank's GPU if
            it lay on a GPU.

        Raises:
            CollectiveError: ``src`` is this rank itself or no rank, or did not send within the timeout (the message says
                what it does instead).
        """
        self._check_peer("recv", src, "src")
        received = self._pass(f"recv(src={src})", None, None, src)
        assert received is not None
        return received

    def sendrecv(self, tensor: Tensor, dst: int, src: int) -> Tensor:
        """Send a tensor to rank ``dst`` and receive one from rank ``src`` at the same time.

        For an exchange ``dst`` and ``src`` are the same rank, for a shift around a ring its neighbours. The other ends may
        as well call `send` and `recv`. If both are this rank itself, a ring of one, the result is a copy of ``tensor``.

        Args:
            tensor: As for `send`.
            dst: A rank of this group.
            src: A rank of this group.

        Returns:
            As for `recv`.

        Raises:
            CollectiveError: As for `send` and `recv`.
        """
        _check("sendrecv", tensor)
        if dst == src == self.wire.rank:
            return tensor.detach().clone()
        self._check_peer("sendrecv", dst, "dst")
        self._check_peer("sendrecv", src, "src")
        what = f"sendrecv(dst={dst}, src={src}) of {tensor.dtype} {tuple(tensor.shape)}"
        received = self._pass(what, tensor, dst, src)
        assert received is not None
        return received

    # -- inside -------------------------------------------------------------------------------------------------------

    def _pass(self, what: str, tensor: Tensor | None, dst: int | None, src: int | None) -> Tensor | None:
        """Send ``tensor`` to ``dst`` and receive from ``src``, one of which may be missing."""
        wire = self.wire
        rest: Tensor | None = None
        block: Tensor | None = None
        room: Tensor | None = None
        if tensor is not None:
            block, rest = _packed(tensor, wire.device)
        if src is not None:
            room = torch.empty(_BLOCK_BYTES, dtype=torch.uint8, device=wire.device)
        with ExitStack() as turns:
            # Whoever waits here with the first in hand waits for a thread that needs no other, so nobody waits in a circle.
            for direction, peer in (("to", dst), ("from", src)):
                if peer is not None:
                    turns.enter_context(wire.turn(direction, peer))
            turns.enter_context(self._between(what, dst, src))
            wire.send_receive(block, dst, room, src).wait()
            if room is None:
                if rest is not None:
                    wire.send_receive(rest, dst, None, None).wait()
                return None
            on_gpu, *row = room[:_HEADER_BYTES].cpu().view(torch.int64).tolist()
            dtype, shape = read_header(row)
            nbytes = numel(shape) * dtype.itemsize
            body = None
            if nbytes > _INLINE_BYTES:
                body = torch.empty(nbytes, dtype=torch.uint8, device=wire.device)
            if rest is not None or body is not None:
                to, source = (dst if rest is not None else None), (src if body is not None else None)
                wire.send_receive(rest, to, body, source).wait()
        if body is None:
            body = room[_HEADER_BYTES : _HEADER_BYTES + nbytes].clone()
        return body.view(dtype).reshape(shape).to(arrival(on_gpu=bool(on_gpu)))

    def _check_peer(self, name: str, peer: int, role: str) -> None:
        self._check_rank(name, peer, role)
        if peer == self.wire.rank:
            raise CollectiveError(
                f"{name}: {role}={peer} is this rank itself, and messages go from one rank to another; tensor.clone() copies"
            )

    def _between(self, what: str, dst: int | None, src: int | None) -> AbstractContextManager[None]:
        """The region of a message, in which each direction is counted by itself."""
        ranks = self.ranks
        me = ranks[self.rank]
        waits: list[tuple[str, Sequence[int]]] = []
        if dst is not None:
            waits.append((f"{self._label}: {me} to {ranks[dst]}", (ranks[dst],)))
        if src is not None:
            waits.append((f"{self._label}: {ranks[src]} to {me}", (ranks[src],)))
        return self._region(waits, f"{what} over {self._label}", any_error)


def _check(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    refuse_gradient(name, tensor)


def _packed(tensor: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The first block of a message, and what does not fit into it."""
    flat = as_bytes(tensor, device)
    block = torch.zeros(_BLOCK_BYTES, dtype=torch.uint8, device=device)
    first = torch.cat([torch.tensor([int(tensor.is_cuda)]), header(tensor)])
    block[:_HEADER_BYTES] = first.view(torch.uint8).to(device)
    if flat.numel() > _INLINE_BYTES:
        return block, flat
    block[_HEADER_BYTES : _HEADER_BYTES + flat.numel()] = flat
    return block, None

"""Gradients through the reducer of torch's DistributedDataParallel, without its forward pass.

DistributedDataParallel is built for its reducer: hooks in C++ that collect gradients into buckets and exchange each bucket
as soon as it is full. Its own forward pass would prepare the reducer, so that a loss computed in any other way (the bare
module, a method, a part) leaves gradients local, without a word. Here the reducer is prepared by the backward pass that
ends a step, whatever the forward pass was. This file is the only one that uses the reducer's private names; they are the
same in torch 2.4 to 2.15.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hvdtrain.backends.reduce_dtype import Buckets, check_sums, send_bucket
from hvdtrain.backends.replica import Replica
from hvdtrain.backends.slips import unused
from hvdtrain.backends.sparse import dense_embeddings, empty_sparse, sparse_parameters
from hvdtrain.backends.weighting import Tally
from hvdtrain.errors import TrainingError

# The replica has already copied rank 0's state.
_NO_COPY: dict[str, Any] = (
    {"init_sync": False} if "init_sync" in inspect.signature(DistributedDataParallel).parameters else {}
)


class _EveryName:
    """Contains every name."""

    def __contains__(self, name: object) -> bool:
        return True


class _Uncopied(DistributedDataParallel):
    """DistributedDataParallel of torch 2.4, which cannot be told not to copy rank 0's state.

    It would invalidate graphs made before, and Gloo copies no complex numbers there. It copies what it does not ignore, after
    it has built its list of parameters and before it names them.
    """

    def _build_params_for_reducer(self) -> Any:
        built = super()._build_params_for_reducer()  # type: ignore[no-untyped-call]
        self._ignored, self.parameters_to_ignore = self.parameters_to_ignore, _EveryName()  # type: ignore[assignment]
        return built

    def _build_debug_param_to_name_mapping(self, parameters: Any) -> Any:
        self.parameters_to_ignore = self._ignored
        return super()._build_debug_param_to_name_mapping(parameters)  # type: ignore[no-untyped-call]


_Ddp = DistributedDataParallel if _NO_COPY else _Uncopied


class _WithTally(nn.Module):
    """A model and one parameter more, whose gradient carries the tally in the model's own buckets."""

    def __init__(
        self, module: nn.Module, trained: list[nn.Parameter], device: torch.device, *, apart: bool = False
    ) -> None:
        super().__init__()
        wide = apart or any(p.dtype in (torch.float64, torch.complex128) for p in trained)
        self.tally = nn.Parameter(
            torch.zeros(Tally.SIZE, dtype=torch.float64 if wide else torch.float32, device=device)
        )
        self.dense = nn.ParameterList(
            dense_embeddings(module)
        )  # DDP takes a weight for what its first owner makes of it
        self.module = module


class ReducerReplica(Replica):
    """DistributedDataParallel's buckets on any torch.distributed process group."""

    def _set_up(self) -> None:
        device = self._backend.device
        self._sparse = sparse_parameters(self.module)
        # Of a static graph DDP finds them out itself, in the first step.
        self._seeks_unused = self.options.find_unused_parameters and not self.options.static_graph
        other = self._other_dtype()
        self._wrap(device, other)
        if other is not None:
            check_sums(other, device)
        self._first = True
        self._graph: list[nn.Parameter] = []  # of a static graph, what this rank's first pass has used
        self._graph_known = not self.options.static_graph  # every rank had a first pass
        self._laid_out = self._seeks_unused  # as it was at first, for ever
        # What earlier micro-batches of this step have used, of which this reducer's hooks know nothing.
        self._used_before = [p for p in self._parameters if p.grad is not None] if self._seeks_unused else []

    def clear(self) -> None:
        """As of every replica; gradients of micro-batches that are given up are not taken for used by the next exchange."""
        given_up = (
            self._seeks_unused and self._is_gathering and bool(_NO_COPY)
        )  # older ones compare the ranks when made
        super().clear()
        if given_up:  # the reducer's record of what was used ends with an exchange alone
            self._wrap(self._backend.device, self._other_dtype())

    def _wrap(self, device: torch.device, other: torch.dtype | None) -> None:
        """Make a reducer; nothing is sent."""
        self._model = _WithTally(self.module, self._parameters, device, apart=other is not None)
        self._ddp = None  # the hooks of an earlier one go with it
        self._ddp = _Ddp(
            self._model,
            device_ids=[device.index] if device.type == "cuda" else None,
            bucket_cap_mb=_roomy(self._parameters[::-1], self.bucket_bytes) / 2**20,
            gradient_as_bucket_view=True,
            find_unused_parameters=self._seeks_unused,
            static_graph=self.options.static_graph,
            **_NO_COPY,
        )
        hooked = other is not None or any(
            p.is_complex() for p in self._parameters
        )  # Gloo of torch 2.4 sums no complex ones
        if hooked:
            self._ddp.register_comm_hook(Buckets(other, self._backend.world_size, self._backend.traffic), send_bucket)
        self._uncounted_bytes = 0 if hooked else self._bytes_of_buckets()

    def _send_during(self, loss: Tensor, weight: Tensor, tally: Tally, retain_graph: bool) -> None:
        early = self._early(loss)
        root = self._prepare(loss, *early)
        loss.backward(weight, retain_graph=retain_graph)
        self.lap("backward")
        if self._first and self.options.static_graph:
            self._graph = [p for p in self._parameters if p.grad is not None]
        # The tally goes last: until then the reducer is not done, and notices a gradient that comes twice.
        torch.autograd.backward([*early, root], [*map(torch.zeros_like, early), self._numbers(tally)])
        self._end_of_backward()
        if not self._complete():
            self._send_early_ones(loss)

    def _send_after(self, tally: Tally, empty: bool) -> None:
        early = self._early()
        root = self._prepare(*early)
        late = self._graph if self.options.allows_unused else self._parameters[::-1]
        zeros = [*map(torch.zeros_like, early), *map(self._zero, late)]
        torch.autograd.backward([*early, *late, root], [*zeros, self._numbers(tally)])
        self._end_of_backward()

    def _finish(self, empty: bool) -> Tensor:
        complete = self._complete()
        if not complete or self._seeks_unused:
            self._refuse_strays()
        if not complete:  # DDP would notice at the next step, with the other ranks waiting
            names = [name for name, p in self.module.named_parameters() if p.requires_grad and p.grad is None]
            raise unused(names, self._backend.rank)
        self._backend.traffic.all_reduce(self._uncounted_bytes, self._backend.world_size)
        if self._seeks_unused:  # which parameters some rank has used, as int32, and of the tally too
            self._backend.traffic.all_reduce(4 * (len(self._parameters) + 1), self._backend.world_size)
        summed = self._model.tally.grad
        assert summed is not None
        self._model.tally.grad = None
        if not self._graph_known:
            self._graph_known = Tally.of(summed.tolist()).ranks == self._backend.world_size
        return summed

    def rehearse(self, forward: Callable[[nn.Module], Tensor]) -> None:
        """Let DDP lay out its buckets, which it does after its first backward pass.

        Over three and more ranks a sum's rounding depends on where in a bucket a gradient lies.
        """
        self.backward(forward(self.module), samples=0, total=1)
        self.reduce_gradients()
        self.clear()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _other_dtype(self) -> torch.dtype | None:
        """The type in which gradients are to travel, where that is not their own."""
        wanted = self.options.reduce_dtype
        return None if all(p.dtype == wanted for p in self._parameters) else wanted

    def _bytes_of_buckets(self) -> int:
        """What the reducer exchanges in a step, of parameters without a gradient too."""
        return self._model.tally.nbytes + sum(p.nbytes for p in self._parameters if id(p) not in self._sparse)

    @property
    def _reducer(self) -> dist.Reducer:
        assert self._ddp is not None
        return self._ddp.reducer

    def _prepare(self, *losses: Tensor) -> Tensor:
        """Expect the backward pass that ends the step; return what the tally's gradient goes into."""
        if not (self._first or self._graph_known):  # a rank had no samples, and DDP took that for its graph
            self._wrap(self._backend.device, self._other_dtype())
            self._first, self._laid_out = True, False
        self._lay_out()
        with torch.enable_grad():  # also in a step() under no_grad()
            root = self._model.tally.view_as(self._model.tally)  # a view: the reducer looks for parameters behind nodes
        self._reducer.prepare_for_backward([*losses, root] if self._seeks_unused else [])
        return root

    @torch.enable_grad()
    def _early(self, loss: Tensor | None = None) -> list[Tensor]:
        """What leads to parameters that were used before this reducer was there, and are not used in its first pass."""
        before, self._used_before = self._used_before, []
        reached = {id(parameter) for parameter in _parameters_behind(loss)} if loss is not None and before else set()
        return [p.view_as(p) for p in before if id(p) not in reached]

    def _lay_out(self) -> None:
        """Let the reducer lay out its buckets anew, which it does once, after its first backward pass.

        Gradients of earlier micro-batches are out of its sight meanwhile: it would take them over, and divide them by the
        number of ranks where it multiplies all later ones by the inverse, which over 3 ranks is not the same number.
        """
        if self._laid_out:
            return
        kept = [(p, p.grad) for p in self._parameters if p.grad is not None]
        for parameter, _ in kept:
            parameter.grad = None
        self._laid_out = self._reducer._rebuild_buckets()
        for parameter, gradient in kept:
            parameter.grad = gradient

    def _end_of_backward(self) -> None:
        if self.options.static_graph and self._first:
            self._reducer._delay_all_reduce()  # type: ignore[attr-defined]  # the first pass only counts; its gradients leave now
        self._first = False

    def _complete(self) -> bool:
        try:
            self._reducer._check_reducer_finalized()
        except RuntimeError:
            return False
        return True

    def _refuse_strays(self) -> None:
        """Refuse gradients that the reducer's hooks did not see: torch forgets them where a parameter gets another type."""
        for parameter in self._parameters:
            grad = parameter.grad
            if grad is not None and not grad.is_sparse and not grad._is_view():
                raise TrainingError(
                    f"{self._name(parameter)!r} was converted after replicate() (by .to(), .float(), .double(), or .data = ...), and back: its gradient was not "
                    "exchanged. Convert a copy of the model, or call backend.replicate(model, optimizer) again"
                )

    def _send_early_ones(self, loss: Tensor) -> None:
        """Send gradients that only earlier micro-batches have made, for which no hook came in this pass."""
        reached = {id(parameter) for parameter in _parameters_behind(loss)}
        late = [p for p in self._parameters if id(p) not in reached and p.grad is not None]
        if late:
            torch.autograd.backward(late, [self._zero(p) for p in late])

    def _zero(self, parameter: nn.Parameter) -> Tensor:
        if id(parameter) in self._sparse:
            return empty_sparse(parameter)
        return torch.zeros_like(parameter)

    def _numbers(self, tally: Tally) -> Tensor:
        # The reducer divides by the world size.
        return torch.tensor(tally.values(), dtype=self._model.tally.dtype, device=self._model.tally.device).mul_(
            self._backend.world_size
        )


def _roomy(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> int:
    """About ``bucket_bytes``, so that the last bucket is not full without the tally: it would travel alone.

    Args:
        parameters: In about the order in which backward completes them.
        bucket_bytes: A bucket is closed by the gradient that makes it so large; the first one by DDP's own, smaller limit.
    """
    first = dist._DEFAULT_FIRST_BUCKET_BYTES
    for percent in (100, 90, 110, 80, 120, 70, 130):
        limit = bucket_bytes * percent // 100
        filled, closes_at = 0, first
        for parameter in parameters:
            filled += parameter.nbytes
            if filled >= closes_at:
                filled, closes_at = 0, limit
        if filled:
            return limit
    return bucket_bytes


def _parameters_behind(loss: Tensor) -> Iterator[Tensor]:
    """The leaves that a backward pass from ``loss`` reaches."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        waiting += [following for following, _ in node.next_functions]

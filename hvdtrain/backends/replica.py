"""A model and its optimizer as this rank holds them, and the one way to train them on every engine.

`Replica` owns what must not differ between engines: how a loss is weighted, when gradients are complete, what clipping
and a GradScaler see, what happens to a parameter that nobody used. Engines fill in how gradients are exchanged while
the backward pass runs. The order of calls in one step is fixed and checked::

    accumulate() { forward, backward() } ... once per micro-batch, the last with last=True
    reduce_gradients()      # step() does it when it has not been called
    step()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hvdtrain.backends.agreement import average_sparse, check_same_structure, copy_state_from_rank_zero
from hvdtrain.backends.optimizer_guard import check_optimizer, guard_steps
from hvdtrain.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.optim import Optimizer

    from hvdtrain.backends.base import Backend


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaOptions:
    """How an engine may exchange gradients; one that has no use for an option ignores it.

    Attributes:
        find_unused_parameters: Look, at every step, for parameters that the loss does not depend on. Needed when some
            parameters take part only sometimes, or only on some ranks; costs a walk over the graph.
        static_graph: Promise that the graph is the same at every step; allows the engine some short cuts.
        bucket_bytes: Gradients are exchanged in pieces of about this size; None for what suits the engine.
    """

    find_unused_parameters: bool = False
    static_graph: bool = False
    bucket_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What `Replica.step` did.

    Attributes:
        gradient_norm: The L2 norm of the averaged gradient before clipping, the same on every rank; None if nothing
            asked for it.
        skipped: The optimizer did not step, because the gradient was not finite (GradScaler, or ``skip_nonfinite``).
    """

    gradient_norm: Tensor | None
    skipped: bool


class Replica(ABC):
    """One rank's copy of the model, kept equal to the others'.

    Attributes:
        module: The user's own model.
        optimizer: The user's own optimizer; its hooks, state_dict and schedulers work as ever.
    """

    _suitable_bucket_bytes = 25 * 2**20
    _engine_averages = True  # the engine divides the ranks' sum by the world size while it exchanges

    def __init__(self, backend: Backend, module: nn.Module, optimizer: Optimizer, options: ReplicaOptions) -> None:
        self.module = module
        self.optimizer = optimizer
        self.options = options
        self._backend = backend
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        check_optimizer(module, optimizer, self._parameters, backend.device)
        check_same_structure(backend, module, optimizer)
        copy_state_from_rank_zero(backend, module, optimizer)
        self._steps = 0
        self._exchanged = False  # reduce_gradients has run in this step
        self._complete = False  # the last micro-batch has been through backward
        self._last = True
        self._overlap = True
        self._deferred = False  # this step's gradients are exchanged after, not during, backward
        self._started = False  # backward has run in this step
        self._samples: int | None = None  # samples of this rank so far in this step, if the total is unknown
        guard_steps(optimizer, self._why_no_step)

    # -- the verbs ----------------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """What to call for the forward pass; inside `accumulate` where there is one."""
        return self._wrapped() if self._last and self._overlap else self.module

    @contextmanager
    def accumulate(self, *, last: bool = True, overlap: bool = True) -> Iterator[None]:
        """Surround the forward and backward pass of one micro-batch.

        Args:
            last: This is the step's last micro-batch on this rank: gradients are exchanged. Ranks may have different
                numbers of micro-batches.
            overlap: Exchange while backward runs, which needs a backward pass on every rank. False, on every rank, for
                a step in which some ranks have no sample: then the exchange happens in `reduce_gradients`.
        """
        if not last and self.options.static_graph:
            # DDP counts how often each gradient comes in its first step, and takes earlier micro-batches for another graph.
            raise ConfigError("static_graph=True (--static-graph) and several micro-batches a step exclude each other")
        self._last, self._overlap = last, overlap
        try:
            yield
        finally:
            self._last = self._overlap = True

    def backward(self, loss: Tensor, *, samples: int, total: int | None = None) -> None:
        """Add the gradient of ``loss`` to ``.grad``, weighted by its samples.

        Args:
            loss: The mean over this micro-batch's samples (possibly scaled by a GradScaler); a scalar.
            samples: How many samples that is; 0 is allowed and adds nothing.
            total: Samples of the whole global batch, over all ranks and micro-batches, if it is known. If not, the
                ranks' counts are summed in `reduce_gradients` (one small exchange).

        Raises:
            TrainingError: Out of order, or some calls of a step gave ``total`` and others did not.
        """
        if self._exchanged or self._complete:
            raise TrainingError(
                "backward() after this step's last micro-batch; call step() first, or mark the earlier micro-batches with "
                "`with replica.accumulate(last=False):`"
            )
        deferred = not self._overlap
        if self._started and deferred != self._deferred:
            raise TrainingError("every micro-batch of a step must have the same overlap=")
        if self._started and (total is None) != (self._samples is not None):
            raise TrainingError("give total= to every backward() of a step, or to none")
        self._deferred = deferred
        if total is None:
            self._samples = (self._samples or 0) + samples
            weight = float(samples)
        else:
            weight = samples / total * self._divisor
        if self._last and not deferred:
            self._begin_exchange()
            with self._backend.region("gradients", f"backward and gradient exchange of step {self._steps}"):
                (loss * weight).backward()
        else:
            (loss * weight).backward()
        self._started = True
        self._complete = self._last

    def reduce_gradients(self) -> None:
        """Complete the exchange: every ``.grad`` is the gradient averaged over the samples of the global batch.

        A parameter that no rank used keeps ``.grad is None``. On a rank without a sample in this step this is the only
        call before `step`.
        """
        if self._exchanged:
            return
        if not self._started:  # a rank without samples: only a deferred exchange can include it
            self._deferred = True
        elif not self._complete:
            raise TrainingError(
                "reduce_gradients() before the step's last micro-batch: none was marked accumulate(last=True)"
            )
        if self._deferred:
            self._exchange_deferred()
        else:
            self._finish_exchange()
        if self._samples is not None:
            counted = self._backend.all_reduce(torch.tensor(float(self._samples), dtype=torch.float64))
            factor = self._divisor / max(1.0, float(counted))
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        self._exchanged = True

    def step(
        self, *, clip_norm: float | None = None, scaler: GradScaler | None = None, skip_nonfinite: bool = False
    ) -> StepResult:
        """Exchange what is left, clip, update the parameters, and clear the gradients.

        Args:
            clip_norm: Scale the averaged gradient to at most this L2 norm.
            scaler: The GradScaler that scaled the losses; it is unscaled before clipping, stepped and updated.
            skip_nonfinite: Do not update when the averaged gradient has a NaN or an infinity. All ranks see the same
                gradient, so all skip.

        Returns:
            The gradient norm, if it was computed, and whether the update was skipped.
        """
        self.reduce_gradients()
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        norm: Tensor | None = None
        if clip_norm is not None:
            norm = self._clip(clip_norm)
        elif skip_nonfinite:
            norm = self.gradient_norm()
        skipped = skip_nonfinite and norm is not None and not bool(torch.isfinite(norm))
        if scaler is not None:
            before = scaler.get_scale()
            if not skipped:
                scaler.step(self.optimizer)
            scaler.update()
            skipped = skipped or scaler.get_scale() < before
        elif not skipped:
            self.optimizer.step()
        self.clear()
        self._steps += 1
        return StepResult(norm, skipped)

    def clear(self) -> None:
        """Forget this step's gradients (set to None) and begin a new step."""
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self._parameters:  # those that the optimizer does not hold
            parameter.grad = None
        self._exchanged = self._complete = self._started = self._deferred = False
        self._samples = None

    def gradient_norm(self) -> Tensor:
        """The L2 norm over all gradients, float64 for float64 models; 0 if there is no gradient."""
        grads = [p.grad for p in self._parameters if p.grad is not None]
        values = [_values(g) for g in grads]
        if not values:
            return torch.zeros((), device=self._backend.device)
        norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(v) for v in values]))
        return norm

    @property
    def bucket_bytes(self) -> int:
        """The size of the pieces in which gradients are exchanged."""
        return self.options.bucket_bytes or self._suitable_bucket_bytes

    @property
    def inference_model(self) -> nn.Module:
        """What to call in evaluation, where ranks may make different numbers of calls."""
        return self.module

    def rehearse(self, forward: Callable[[nn.Module], Tensor]) -> None:  # noqa: B027 - most engines have nothing to settle
        """Settle whatever the engine decides in its first step, without a step, so that a resumed run continues exactly.

        Args:
            forward: Returns a loss for the model that it is given; every rank's must use the model as training does.
        """

    def copy_from_rank_zero(self) -> None:
        """Overwrite parameters, buffers and optimizer state with rank 0's; every rank must call it."""
        copy_state_from_rank_zero(self._backend, self.module, self.optimizer)

    def sync_buffers(self) -> None:
        """Give every rank the buffers of rank 0 (running statistics and the like)."""
        with torch.no_grad():
            for buffer in self.module.buffers():
                self._backend.broadcast_(buffer)

    # -- what engines fill in -----------------------------------------------------------------------------------------

    @abstractmethod
    def _wrapped(self) -> nn.Module:
        """The module whose forward and backward exchange gradients; those of `module` must leave them local."""

    def _begin_exchange(self) -> None:  # noqa: B027 - DDP needs no word
        """Expect the step's last backward pass, in which gradients become final."""

    @abstractmethod
    def _finish_exchange(self) -> None:
        """Wait for the exchange that backward began.

        Afterwards ``.grad`` is the ranks' sum, divided by the world size if `_engine_averages`.
        """

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _divisor(self) -> int:
        """What the engine will divide this step's sum by. A deferred exchange only sums."""
        return self._backend.world_size if self._engine_averages and not self._deferred else 1

    def _unused_error(self, names: list[str]) -> TrainingError:
        named = f": {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else " in the last micro-batch"
        return TrainingError(
            f"rank {self._backend.rank}: the loss did not depend on some parameters{named}. Freeze them, use them, or pass "
            "find_unused_parameters=True (--find-unused-parameters)"
        )

    def _why_no_step(self) -> str:
        if self._exchanged or not self._backend.running or all(p.grad is None for p in self._parameters):
            return ""
        return (
            "optimizer.step() on gradients that were not exchanged with the other ranks; call replica.backward(loss, "
            "samples=...) and replica.step(), or replica.reduce_gradients() before optimizer.step()"
        )

    def _clip(self, clip_norm: float) -> Tensor:
        if not any(p.grad is not None and p.grad.is_sparse for p in self._parameters):
            return nn.utils.clip_grad_norm_(self._parameters, clip_norm)
        norm = self.gradient_norm()
        factor = torch.clamp(clip_norm / (norm + 1e-6), max=1.0)  # torch.nn.utils.clip_grad_norm_ has the same 1e-6
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.dtype))
        return norm

    def _exchange_deferred(self) -> None:
        """Sum the gradients over the ranks after backward, also where ranks have none."""
        backend = self._backend
        if backend.world_size == 1 or not self._parameters:
            return
        kinds = torch.tensor([0 if p.grad is None else 2 if p.grad.is_sparse else 1 for p in self._parameters])
        kinds = backend.all_reduce(kinds, "max")
        bucket: list[Tensor] = []
        size = 0
        for parameter, kind in zip(self._parameters, kinds.tolist(), strict=True):
            if kind == 2:
                parameter.grad = average_sparse(backend, parameter, 1.0)
            if kind != 1:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grad = parameter.grad
            if bucket and (size + grad.nbytes > self.bucket_bytes or grad.dtype != bucket[0].dtype):
                _sum_bucket(backend, bucket)
                bucket, size = [], 0
            bucket.append(grad)
            size += grad.nbytes
        if bucket:
            _sum_bucket(backend, bucket)


def _sum_bucket(backend: Backend, grads: list[Tensor]) -> None:
    flat = torch.cat([g.reshape(-1) for g in grads])
    backend.all_reduce_(flat)
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def _values(grad: Tensor) -> Tensor:
    return grad.coalesce().values() if grad.is_sparse else grad

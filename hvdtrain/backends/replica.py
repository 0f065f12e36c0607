"""A model and its optimizer as this rank holds them, and the one way to train them on every engine.

`Replica` owns what must not differ between engines: how a loss is weighted, when gradients are complete, what clipping
and a GradScaler see, what happens to a parameter that nobody used, or that was frozen meanwhile. Engines fill in how
gradients are exchanged while the backward pass runs. The model is called as the user likes: nothing hangs on the forward
pass. One step is::

    backward() ... once per micro-batch, all but the last inside `accumulate(last=False)`
    reduce_gradients()      # step() does it when it has not been called
    step()                  # or the user's own optimizer.step() and zero_grad()

On a rank without samples in a step, `step` alone takes part in it.
"""

from __future__ import annotations

import enum
import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hvdtrain.backends.agreement import check_same_structure, copy_state_from_rank_zero, overwrite_from_rank_zero
from hvdtrain.backends.backward_graph import nothing_added, ranks_meet
from hvdtrain.backends.exclusions import check_combination
from hvdtrain.backends.gradient_norm import clip_, norm_of
from hvdtrain.backends.keeper import Keeper, differ
from hvdtrain.backends.laps import no_lap
from hvdtrain.backends.layout import lay_out_what_is_loaded
from hvdtrain.backends.loss_scale import found_infinity, steps_others, unscale, update_scaler
from hvdtrain.backends.optimizer_guard import check_optimizer, check_parameters, guard_steps
from hvdtrain.backends.reduce_dtype import check_reduce_dtype, overflowed
from hvdtrain.backends.replica_options import ReplicaOptions, StepResult
from hvdtrain.backends.slips import (
    AFTER_THE_LAST,
    CHANGED_AFTER_CUTTING,
    INTERRUPTED,
    LEFT_OVER,
    NOT_EXCHANGED,
    REACHED_ANOTHER,
    WEIGHTLESS,
    check_scalar,
    explained_backward,
    frozen_too_late,
)
from hvdtrain.backends.units import state_for_rank_zero
from hvdtrain.backends.unsent import Unsent, check_compression, say_lost
from hvdtrain.backends.watched import Watched, plain_names
from hvdtrain.backends.weighting import Tally, Weighting, checked
from hvdtrain.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.optim import Optimizer

    from hvdtrain.backends.ahead import Ahead
    from hvdtrain.backends.base import Backend
    from hvdtrain.backends.communicator import Communicator


_living: weakref.WeakSet[Replica] = weakref.WeakSet()


class _Phase(enum.Enum):
    EMPTY = "no backward pass yet"
    GATHERING = "backward has run, none of it was the last"
    INTERRUPTED = "an exception ended the last backward pass, while it exchanged gradients"
    LEAVING = "the last backward pass has begun the exchange"
    EXCHANGED = "every gradient is the average"
    STEPPED = "the optimizer has used it"


class Replica(ABC):
    """One rank's copy of the model, kept equal to the others'.

    Attributes:
        module: The user's own model.
        optimizer: The user's own optimizer; its hooks, state_dict and schedulers work as ever. None if there is none.
        lap: Called with a phase of `hvdtrain.backends.laps.PHASES` when it ends: "backward" when this rank's gradients are
            complete, "exchange" when all ranks' are here.
    """

    _suitable_bucket_bytes = 25 * 2**20
    _reuses_gradients = True  # the engine writes a step's gradients where the last step's were
    _own_hooks = 0  # post-accumulate hooks that the engine has put on each parameter
    _ranks_always_meet = False  # every backward pass adds up gradients over the ranks
    is_cut: ClassVar[bool] = False
    """Each rank holds a part of the model, so that all must run it equally often, in evaluation too."""
    _engine_averages = True  # the engine divides the ranks' sum by the world size while it exchanges

    def __init__(
        self, backend: Backend, module: nn.Module, optimizer: Optimizer | None, options: ReplicaOptions
    ) -> None:
        self.module = module
        self.options = options
        self.lap: Callable[[str], None] = no_lap
        self._optimizer = optimizer
        self._backend = backend
        if optimizer is not None:
            check_optimizer(optimizer)
        self._watched = Watched(module, optimizer)
        self._make_alike()
        self._phase = _Phase.EMPTY
        self._keeper = Keeper(self._watched, self._name)
        self._steps = 0
        seldom = options.sync is not None  # then it is weights that are compressed
        self._unsent = None if options.compression is None or seldom else Unsent(options.compression)
        self._number = next(backend.replica_numbers)
        divisor = backend.world_size if self._engine_averages else 1
        self._weighting = Weighting(self._weighed_over(), divisor, number=self._number)
        self._last = True
        self._overlap = True
        self._begin_step()
        self._set_up()
        if optimizer is not None:
            guard_steps(optimizer, self)
            lay_out_what_is_loaded(optimizer)
        _living.add(self)

    # -- the verbs ----------------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """What to call for the forward pass, in whatever way: the user's own model, or its methods and parts."""
        return self.module

    @property
    def optimizer(self) -> Optimizer:
        """The user's own optimizer.

        Raises:
            ConfigError: The replica was made without one.
        """
        if self._optimizer is None:
            raise ConfigError(
                "this replica was made without an optimizer: give backend.replicate(model, optimizer) one, or call "
                "replica.reduce_gradients(), use the gradients, and call replica.clear()"
            )
        return self._optimizer

    @contextmanager
    def accumulate(self, *, last: bool = True, overlap: bool = True) -> Iterator[None]:
        """Surround `backward` of one micro-batch; the forward pass may be inside or outside.

        Args:
            last: This is the step's last micro-batch on this rank: gradients are exchanged while its backward pass runs.
                Ranks may have different numbers of micro-batches. If none was the last, they are exchanged in
                `reduce_gradients`.
            overlap: False to exchange in `reduce_gradients` all the same.
        """
        if not last and self.options.static_graph:
            check_combination({"static_graph": True, "accumulate": True})
        self._last, self._overlap = last, overlap
        try:
            yield
        finally:
            self._last = self._overlap = True

    def backward(
        self,
        loss: Tensor,
        *,
        samples: int,
        weight: float | Tensor | None = None,
        total: float | None = None,
        retain_graph: bool = False,
    ) -> None:
        """Add the gradient of ``loss`` to ``.grad``, weighted by its samples, or by what else it is the mean over.

        Several calls of one step add up. With ``total``, the step's gradient is the sum of ``weight / total`` times each
        loss's gradient, over calls and ranks. Without, it is that of the mean over all weight that was counted: for a
        loss that is a mean over tokens and ``weight=number_of_tokens``, the mean over the tokens of all ranks. A loss that
        is a sum over everything has ``weight=1, total=1``.

        Args:
            loss: The mean over this micro-batch's samples (possibly scaled by a GradScaler); a scalar.
            samples: How many samples that is; 0 is allowed.
            weight: What the loss is the mean over, if not over samples: tokens, pairs, boxes, a sum of weights. On a GPU, a
                tensor there is waited for. A loss of weight 0 adds nothing, whatever its value is.
            total: The weight of the whole global batch, over all ranks and micro-batches, if it is known. If not, the
                ranks' weights are summed with the gradients.
            retain_graph: Another loss of the same forward pass follows: keep the graph, and count the samples once, so
                that the losses' gradients add. Every call but the last is inside ``accumulate(last=False)``.

        Raises:
            TrainingError: Out of order; gradients are there that no backward() of this step made; some calls of a step
                gave ``total`` and others did not; the loss is no scalar or depends on no parameter; a weight is no
                number from 0 to 1e18.
        """
        weight = None if weight is None else checked(weight)
        check_scalar(loss, self._backend.rank, counts=samples > 0 and weight != 0)
        if self._phase is not _Phase.GATHERING:
            self._begin_or_refuse()
        self._keeper.refuse_changes()
        leaving = self._last and self._overlap
        if leaving:
            self._keeper.look_at_lent()
            self._follow_changes()
        share = self._weighting.weigh(samples, weight, total, shared=retain_graph and not leaving)
        self._phase = _Phase.GATHERING
        if leaving or (
            not self._weighting.settled and (self._ranks_always_meet or ranks_meet(loss))
        ):  # what they send each other is in one unit
            share *= self._settle_unit()
        if leaving:
            self._board()
            self._phase = _Phase.INTERRUPTED
        others = [(other._keeper, other._keeper.state()) for other in _living if other._phase is _Phase.EXCHANGED]
        try:
            with nullcontext() if share else nothing_added(loss):
                self._run_backward(loss, loss.new_full(loss.shape, share), leaving=leaving, retain_graph=retain_graph)
        except RuntimeError as error:
            explained = explained_backward(error)
            if explained is None:
                raise
            raise explained from error
        if leaving:
            self._phase = _Phase.LEAVING
        self._keeper.note()
        if any(differ(other.state(), before) for other, before in others):
            raise TrainingError(REACHED_ANOTHER)

    def reduce_gradients(self) -> None:
        """Complete the exchange: every ``.grad`` is the gradient averaged over the samples of the global batch.

        A parameter that no rank used keeps ``.grad is None``. On a rank without a sample in this step this is the only
        call before `step`. Until then the gradients may be changed by hand, the same on every rank, and by no backward pass.
        """
        self._exchange()
        if self._weightless:
            raise TrainingError(WEIGHTLESS)
        self._keeper.listen()

    def step(
        self,
        *,
        clip_norm: float | None = None,
        scaler: GradScaler | None = None,
        update: bool = True,
        skip_nonfinite: bool = False,
        want_norm: bool = False,
    ) -> StepResult:
        """Exchange what is left, clip, update the parameters, and clear the gradients.

        Args:
            clip_norm: Scale the averaged gradient to at most this L2 norm.
            scaler: The GradScaler that scaled the losses; it is unscaled before clipping, stepped and updated. Several
                replicas may share one: it is updated once for all losses that were scaled before the first stepped.
            update: False to leave ``scaler.update()`` to the caller.
            skip_nonfinite: Do not update when the averaged gradient has a NaN or an infinity. All ranks see the same
                gradient, so all skip.
            want_norm: Compute the gradient norm in any case, the same on every rank.

        Returns:
            The gradient norm, if it was computed, whether the update was skipped, and the samples of the step.

        Raises:
            TrainingError: Out of order, or no loss of the step had a weight on any rank (unless ``skip_nonfinite``).
        """
        optimizer = self.optimizer
        self._exchange()
        self.lap("exchange")
        self._keeper.refuse_late()
        if self._weightless and not skip_nonfinite:
            raise TrainingError(WEIGHTLESS)
        if scaler is not None and (self._weightless or not self._any_to_step() or not scaler.is_enabled()):
            scaler = None  # no rank had a sample, or losses are not scaled: there is nothing to unscale
        self._scaler_looked = scaler is not None
        if scaler is not None:
            if self._unsent is not None:
                self._unsent.settle(scaler, self._weighting.tally.began)
            unscale(scaler, optimizer, self._gradients(), self._outside(scaler), self._weighting.tally.began)
            self._agree_on_infinities(scaler)
        norm: Tensor | None = None
        if clip_norm is not None:
            norm = self._clip(clip_norm)
        elif skip_nonfinite or want_norm:
            norm = self.gradient_norm()
        skipped = self._weightless or (skip_nonfinite and norm is not None and not bool(torch.isfinite(norm)))
        if not skipped:
            if scaler is not None:
                skipped = found_infinity(scaler, optimizer)
                scaler.step(optimizer)
            else:
                optimizer.step()
        if scaler is not None and update:
            update_scaler(scaler, self._weighting.tally.began, skipped=skipped)
        samples = self._samples
        self.clear()
        self._steps += 1
        self._backend.note_step(self._steps)
        return StepResult(norm, skipped, samples)

    def clear(self) -> None:
        """Forget this step's gradients (set to None) and begin a new step.

        After the step's last `backward`, whose gradients are on their way to all ranks, every rank must call it.
        """
        self._refuse_interrupted()
        if self._phase is _Phase.EXCHANGED and self._optimizer is None and self._any_gradient():
            late, self._phase = self._keeper.why_late(), _Phase.STEPPED
            if late:  # they were used before, or are lost
                raise TrainingError(late)
            if self._unsent is not None:
                self._unsent.used(self._optimizer)
        if self._phase is _Phase.LEAVING:
            with self._exchanging():
                self._finish(False)
            if self._aboard is not None:
                self._aboard.lose()
        for parameter in self._watched.held:
            parameter.grad = None
        self._begin_step()

    def gradient_norm(self) -> Tensor:
        """The L2 norm over all gradients, float64 for float64 models, else float32; 0 if there is no gradient."""
        return norm_of(self._gradients(), self._backend.device)

    @property
    def bucket_bytes(self) -> int:
        """The size of the pieces in which gradients are exchanged."""
        return self.options.bucket_bytes or self._suitable_bucket_bytes

    @property
    def inference_model(self) -> nn.Module:
        """What to call in evaluation, where ranks may make different numbers of calls."""
        return self.module

    def end_inference(self) -> None:  # noqa: B027 - most engines have nothing to end
        """After the last call of `inference_model` of an evaluation; every rank must call it."""

    def rehearse(self, forward: Callable[[nn.Module], Tensor]) -> None:  # noqa: B027 - most engines have nothing to settle
        """Settle whatever the engine decides in its first step, without a step, so that a resumed run continues exactly.

        Args:
            forward: Returns a loss for the model that it is given; every rank's must use the model as training does.
        """

    def copy_from_rank_zero(self) -> None:
        """Overwrite parameters, buffers and optimizer state with rank 0's; every rank must call it.

        After parts were added to the model that are not alike on all ranks, call it before the forward pass.
        """
        if self._watched.changed():
            self._take(self._watched.take(), copied=True)
        copy_state_from_rank_zero(self._backend, self.module, self._optimizer)

    def sync_buffers(self) -> None:
        """Give every rank the buffers of rank 0 (running statistics and the like)."""
        with torch.no_grad():
            for buffer in self.module.buffers():
                overwrite_from_rank_zero(self._backend, buffer)

    def whole_state(self) -> dict[str, Any]:
        """Return the states of model and optimizer on rank 0, copied to its CPU, and {} elsewhere; every rank must call it.

        It loads at any number of ranks, whether the model is cut over them (``shard_modules=``) or not.
        """
        whole = {} if self._optimizer is None else {"optimizer": state_for_rank_zero(self._optimizer)}
        if self._backend.rank != 0:
            return {}
        whole = {"model": self.module.state_dict(), **whole}
        return {name: copied(state) for name, state in whole.items()}

    def load_whole_state(self, state: dict[str, Any]) -> None:
        """Take what rank 0 gives, from `whole_state`; every rank must call it, others with {}.

        Raises:
            ConfigError: It is of another model.
        """
        state = self._backend.broadcast_object(state if self._backend.rank == 0 else {})
        try:
            self.module.load_state_dict(state["model"])
        except RuntimeError as error:
            raise ConfigError(f"the state is of another model: {error}") from error
        if self._optimizer is not None and "optimizer" in state:
            self._optimizer.load_state_dict(state["optimizer"])

    def expect_scaler(self, scaler: GradScaler | None) -> None:
        """Say which GradScaler scales the losses, before it is given to `step`; a compression needs to know at once."""
        if self._unsent is not None:
            self._unsent.expect(scaler)

    @property
    def exchanges(self) -> int:
        """How often the ranks' common weights have changed; it counts where ranks train apart."""
        return 0

    def common_weights(self) -> Mapping[Tensor, Tensor] | None:
        """By parameter, what all ranks had in common last, where they train apart; None where they have it after each step."""
        return None

    def settle(self) -> None:  # noqa: B027 - most ranks are equal after each step
        """Make the ranks equal where they train apart for some steps; every rank must call it after the same step."""

    def shared_weights(self) -> AbstractContextManager[None]:
        """Surround what looks at the weights of all ranks, an evaluation or a checkpoint; every rank must enter it.

        Where ranks train apart for some steps, the model holds their average in it.
        """
        return nullcontext()

    def rank_state(self) -> dict[str, Any]:
        """What only this rank knows between steps, as a loop must save it: tensors, numbers and text; {} for nothing."""
        if self._unsent is None:
            return {}
        return self._unsent.state(plain_names(self.module).items(), speaks=self._speaks[self._backend.rank])

    def load_rank_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Take what the ranks knew, at any number of ranks; every rank must call it.

        Args:
            states: From `rank_state`, of all ranks that saved one; {} where there was none.
        """
        say_lost((state["unsent"] for state in states if state.get("unsent")), "weights", "without sync=")
        states = [state for state in states if "rests" in state]
        if self._unsent is not None:
            self._unsent.load(states, self._backend.rank, plain_names(self.module), self._speaks)
        else:
            say_lost(states, "gradients", "without a compression")

    @property
    def _speaks(self) -> tuple[bool, ...]:
        """Of each rank, whether it sends what is compressed."""
        return (True,) * self._backend.world_size

    # -- what engines fill in -----------------------------------------------------------------------------------------

    @abstractmethod
    def _set_up(self) -> None:
        """Prepare the exchange of the parameters that are trained now; called again when they have changed."""

    @abstractmethod
    def _send_during(self, loss: Tensor, weight: Tensor, tally: Tally, retain_graph: bool) -> None:
        """Run the step's last backward pass from ``loss`` with the gradient ``weight``, and begin the exchange in it."""

    @abstractmethod
    def _send_after(self, tally: Tally, empty: bool) -> None:
        """Begin the exchange of the gradients that are there; zeros where there are none, as everywhere if ``empty``."""

    @abstractmethod
    def _finish(self, empty: bool) -> Tensor:
        """Wait for the exchange that was begun, and return the ranks' summed tally.

        Afterwards ``.grad`` is the ranks' sum, divided by the world size if `_engine_averages`.
        """

    # -- what an optimizer asks ---------------------------------------------------------------------------------------

    def why_no_step(self) -> str:
        """Why the optimizer must not step now; "" if it may."""
        exchanged = self._phase is _Phase.EXCHANGED
        late = self._why_not_these() if exchanged else ""
        if (exchanged and not late) or not self._backend.running or not self._any_gradient():
            return ""
        if exchanged:
            return late
        if self._phase is _Phase.STEPPED:
            return LEFT_OVER
        return NOT_EXCHANGED

    def _why_not_these(self) -> str:
        """Why the optimizer must not use the averaged gradients; "" if it may."""
        if late := self._keeper.why_late():
            return late
        halves = self.options.reduce_dtype == torch.float16 and self._backend.world_size > 1
        looked = (
            self._scaler_looked or getattr(self._optimizer, "found_inf", None) is not None
        )  # a fused one skips by itself
        return overflowed(self._gradients()) if halves and not looked else ""

    def note_step(self) -> None:
        """The optimizer has stepped."""
        if self._phase is _Phase.EXCHANGED:
            self._phase = _Phase.STEPPED
            if self._any_gradient():
                self._weighting.steps += 1
            if self._unsent is not None:
                self._unsent.used(self._optimizer)

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return self._watched.trained

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._watched.trained if p.grad is not None]

    def _any_gradient(self) -> bool:
        return self._watched.any_gradient()

    def _any_to_step(self) -> bool:
        """Whether the optimizer has a gradient to use."""
        if not self._watched.outside:
            return self._any_gradient()
        return any(p.grad is not None for group in self.optimizer.param_groups for p in group["params"])

    def _outside(self, scaler: GradScaler) -> list[Tensor]:
        """Gradients that the optimizer does not use, and no optimizer that the user steps by hand with this scaler."""
        found = [p.grad for p in self._watched.outside if p.grad is not None]
        if not found:
            return []
        return [] if steps_others(scaler, [r._optimizer for r in _living if r._optimizer is not None]) else found

    def _name(self, parameter: nn.Parameter) -> str:
        return next((name for name, p in self.module.named_parameters() if p is parameter), "?")

    def _weighed_over(self) -> Communicator:
        """Whose losses' weights make up the mean."""
        return self._backend

    @property
    def _is_exchanged(self) -> bool:
        return self._phase is _Phase.EXCHANGED

    @property
    def _is_gathering(self) -> bool:
        return self._phase is _Phase.GATHERING

    def _exchanging(self) -> AbstractContextManager[None]:
        return self._backend.region("gradients", f"gradient exchange of step {self._steps}")

    def _exchange(self) -> None:
        """Complete the exchange of this step, if it is not yet."""
        if self._is_over():
            self._begin_step()
        if self._phase in (_Phase.EXCHANGED, _Phase.STEPPED):
            return
        self._refuse_interrupted()
        empty = self._weighting.empty
        if self._phase is _Phase.EMPTY:
            self._keeper.refuse_foreign()
        self._keeper.refuse_changes()
        if self._phase is not _Phase.LEAVING:
            self._follow_changes()
            self._settle_unit()
            self._weighting.close()
            self._board()
            with self._exchanging():
                self._send_after(self._weighting.tally, empty)
        for parameter in self._watched.frozen:
            if parameter.grad is not None:
                raise frozen_too_late(self._name(parameter))
        with self._exchanging():
            summed = self._finish(empty)
        if self._aboard is not None:
            self._aboard.arrive(summed[-1])
        if empty or self._weighting.tally.uncounted or summed.device.type == "cpu":  # else a GPU need not be waited for
            self._scale(Tally.of(summed.tolist()))
        self._keeper.lend(self._reuses_gradients)
        self._phase = _Phase.EXCHANGED
        self._left_gradients = self._any_gradient()

    def _begin_step(self) -> None:
        self._phase = _Phase.EMPTY
        self._weighting.begin_step()
        self._samples: int | None = None  # of all ranks, once that is known
        self._weightless = False  # there were samples, and nothing that their losses are means over
        self._left_gradients = False  # the exchange left any
        self._scaler_looked = False  # whether they are finite
        self._aboard: Ahead | None = None
        self._keeper.forget()
        if self._unsent is not None:
            self._unsent.forget()

    def _agree_on_infinities(self, scaler: GradScaler) -> None:  # noqa: B027 - every rank has looked at all gradients
        """After `unscale`: let what any rank has found in its part of the gradients count on all."""

    def _unit_of(self, summed: Tally) -> float | None:
        """What makes gradients, as they are exchanged, a mean over samples without a loss scale; None if there is no mean."""
        assert self._unsent is not None
        return self._unsent.unit(self._weighting.factor_ahead(summed), self._weighting.tally.began)

    def _board(self) -> None:
        """Let a number that waits for an exchange travel with this one."""
        self._aboard = self._backend.boarding()
        self._weighting.tally.ahead = 0 if self._aboard is None else self._aboard.number

    def _is_over(self) -> bool:
        """Whether the user has used and cleared this step's gradients."""
        if self._phase is _Phase.EXCHANGED and not self._left_gradients:
            return False
        return self._phase in (_Phase.EXCHANGED, _Phase.STEPPED) and not self._any_gradient()

    def _refuse_interrupted(self) -> None:
        if self._phase is _Phase.INTERRUPTED and self._backend.world_size > 1:
            raise TrainingError(INTERRUPTED)

    def _run_backward(self, loss: Tensor, weight: Tensor, *, leaving: bool, retain_graph: bool) -> None:
        if not leaving:
            if loss.requires_grad:
                loss.backward(weight, retain_graph=retain_graph)
            return
        with self._exchanging():
            if loss.requires_grad:
                self._send_during(loss, weight, self._weighting.tally, retain_graph)
            else:
                self._send_after(self._weighting.tally, self._weighting.empty)

    def _begin_or_refuse(self) -> None:
        """A backward pass that is not one more of this step begins the next one, if this one's gradients are gone."""
        self._refuse_interrupted()
        if self._phase is _Phase.LEAVING or (self._phase is _Phase.EXCHANGED and self._any_gradient()):
            raise TrainingError(AFTER_THE_LAST)
        if self._phase is not _Phase.EMPTY:
            self._begin_step()
        self._keeper.refuse_foreign()
        self._weighting.begin_backward()

    def _make_alike(self) -> None:
        """Check that all ranks hold the same model, and give them rank 0's numbers."""
        check_parameters(self.module, self._optimizer, self._parameters, self._backend.device)
        check_reduce_dtype(self.module.named_parameters(), self.options.reduce_dtype)
        compression = self.options.compression
        if compression is not None:
            check_compression(compression, self.module)
        settings = {
            "reduce_dtype": self.options.reduce_dtype,
            "compression": None if compression is None else compression.name,
            "sync": self.options.sync,
            "sync_group": self.options.sync_group,
        }
        check_same_structure(self._gather, self.module, self._optimizer, settings=settings)
        copy_state_from_rank_zero(self._backend, self.module, self._optimizer)

    def _gather(self, text: str) -> list[str]:
        # Beside the engine: a rank whose model did not change is in another operation of the engine's.
        return self._backend.agree_beside("the agreement on the model's parameters", text)

    def _settle_unit(self) -> float:
        factor = self._weighting.settle()
        if factor != 1.0:
            for gradient in self._gradients():  # of earlier micro-batches
                gradient.mul_(factor)
        return factor

    def _scale(self, summed: Tally) -> None:
        """Make means of the ranks' sums; let gradients be None where no rank had a sample."""
        factor = self._weighting.factor(summed)
        self._samples, self._weightless = summed.samples, factor is not None and math.isnan(factor)
        if factor is None:
            for parameter in self._watched.trained:
                parameter.grad = None
        elif factor != 1.0 and not self._weightless:
            for gradient in self._gradients():
                gradient.mul_(factor)

    def _follow_changes(self) -> None:
        """Train what the model and the optimizer hold now, the same on all ranks."""
        self._keeper.refuse_hooks(self._own_hooks)
        if not self._watched.changed():
            return
        if self.options.shard_modules is not None:
            raise TrainingError(CHANGED_AFTER_CUTTING)
        self._take(self._watched.take(), copied=False)
        self._keeper.refuse_hooks(self._own_hooks)

    def _take(self, new: list[nn.Parameter], *, copied: bool) -> None:
        """Train what was found; parameters that are ``new`` must be alike already unless they are going to be copied."""
        self._keeper.follow()
        check_parameters(self.module, self._optimizer, self._parameters, self._backend.device)
        check_reduce_dtype(self.module.named_parameters(), self.options.reduce_dtype)
        # Where the forward pass has used the new ones it is too late to copy them.
        check_same_structure(self._gather, self.module, self._optimizer, () if copied else new)
        self._set_up()

    def _clip(self, clip_norm: float) -> Tensor:
        return clip_(self._parameters, clip_norm, self._backend.device)


def copied(value: Any) -> Any:
    """A state whose tensors are copies on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    return {key: copied(item) for key, item in value.items()} if isinstance(value, dict) else value

"""`DistributedOptimizer`: an optimizer that steps on the average of all ranks' gradients.

It is the optimizer that it is given in another class: state, settings and parameter groups are the same objects, so that
schedulers made before go on working, and nothing is lost or reset.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdtrain.horovod import state
from hvdtrain.horovod.compression import Compression
from hvdtrain.horovod.exchange import Exchange
from hvdtrain.horovod.operations import grouped_allreduce_
from hvdtrain.horovod.packs import Groups, Manner
from hvdtrain.horovod.passing_through import by_engine
from hvdtrain.horovod.process_sets import ProcessSet, global_process_set
from hvdtrain.horovod.reductions import Adasum, Average, Sum
from hvdtrain.horovod.state import real

_AGAIN = (
    "optimizer.step() called without optimizer.skip_synchronize() context after optimizer.synchronize(): the gradients are exchanged a "
    "second time. Write `with optimizer.skip_synchronize(): optimizer.step()`"
)
_TOO_EARLY = (
    "optimizer.zero_grad() was called after loss.backward() and before optimizer.step() or optimizer.synchronize(): gradients are "
    "on their way to the other ranks"
)

_ITSELF = (
    "this optimizer was given to hvd.DistributedOptimizer and is stepped itself, on gradients of this rank alone: call step() of what "
    "hvd.DistributedOptimizer returned, and keep that"
)

_Base: Any = object


class _Distributed(_Base):  # type: ignore[misc]
    """What every distributed optimizer has; stands before the user's class."""

    _given: Optimizer
    _exchange: Exchange
    _named: list[tuple[str, nn.Parameter]]
    _synchronized: bool
    _skips: bool
    _by_scaler: bool

    @property
    def _parameter_names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self._named}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the optimizer's; the new parameters' gradients are exchanged too."""
        super().add_param_group(param_group)
        for at, parameter in enumerate(self.param_groups[-1]["params"]):
            self._named.append((f"added.{len(self.param_groups) - 1}.{at}", parameter))
            self._take_over(*self._named[-1])

    def _take_over(self, name: str, parameter: nn.Parameter) -> None:
        self._exchange.add(name, parameter)

    def __reduce__(self) -> Any:
        """Pickles and copies are ordinary optimizers."""
        return _plain, (type(self).__mro__[-self._depth],), self.__getstate__()


def _plain(kind: type[Optimizer]) -> Optimizer:
    return kind.__new__(kind)


class _DistributedOptimizer(_Distributed):
    """Steps on gradients that hooks have sent."""

    def synchronize(self) -> None:
        """Return when every gradient is what the ranks' gradients come to; then they may be clipped."""
        if self._exchange.active:
            self._exchange.complete()
        self._synchronized = True

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Let `step` use the gradients as they are, because `synchronize` was called."""
        self._skips = True
        try:
            yield
        finally:
            self._skips = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Exchange gradients, unless that was done, and step.

        Args:
            closure: Computes the loss and its gradients, which are exchanged each time it was called.
        """
        by_scaler, self._by_scaler = self._by_scaler and not self._exchange.under_way, False
        if closure is not None and not self._skips:
            if self._exchange.under_way:
                self.synchronize()
            self._synchronized = False
            return super().step(self._exchanging(closure))
        if not (self._skips or by_scaler):
            if self._synchronized:
                warnings.warn(_AGAIN, stacklevel=3)
            self.synchronize()
        self._synchronized = False
        return super().step(closure) if closure is not None else super().step()

    step.hooked = True  # type: ignore[attr-defined] # torch's hooks around a step are those of the class below

    def _exchanging(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def called() -> Any:
            with torch.enable_grad():
                loss = closure()
            self.synchronize()
            self._synchronized = False
            return loss

        return called

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the optimizer's.

        Raises:
            AssertionError: Gradients are on their way to the other ranks.
        """
        if self._exchange.under_way:
            raise AssertionError(_TOO_EARLY)
        self._exchange.forget_the_past()
        self._synchronized = self._by_scaler = False
        super().zero_grad(set_to_none)

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Change after how many backward passes gradients are complete."""
        self._exchange.passes = passes

    @property
    def backward_passes_per_step(self) -> int:
        """After how many backward passes gradients are complete."""
        return self._exchange.passes

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by a GradScaler before it looks at the gradients: they must be all ranks' by then, or ranks part."""
        if not self._skips and self._exchange.under_way:
            self._exchange.complete()
            self._by_scaler = True
        return bool(self.__dict__.get("_step_supports_amp_scaling", False))


class _DistributedAdasumOptimizer(_Distributed):
    """Steps on this rank's gradients, and combines by Adasum what the ranks' steps have changed."""

    def synchronize(self) -> None:
        """Do nothing: it is not gradients that are exchanged."""

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Not offered.

        Raises:
            AssertionError: Always.
        """
        raise AssertionError(
            "optimizer.skip_synchronize() has no meaning with op=hvd.Adasum, which exchanges in step()"
        )
        yield

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Nothing depends on it: the exchange is in `step`."""
        self.backward_passes_per_step = passes

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step alone, then combine all ranks' changes."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        before = [parameter.detach().clone() for parameter in parameters]
        loss = super().step(closure) if closure is not None else super().step()
        with torch.no_grad():
            changes = [parameter.detach() - start for parameter, start in zip(parameters, before, strict=True)]
            pairs = [self._compression.compress(change) for change in changes]
            combined = grouped_allreduce_([small for small, _ in pairs], op=Adasum)
            for parameter, start, one, (_, context) in zip(parameters, before, combined, pairs, strict=True):
                parameter.copy_(start + self._compression.decompress(one, context))
        return loss

    step.hooked = True  # type: ignore[attr-defined]

    def _take_over(self, name: str, parameter: nn.Parameter) -> None:
        pass


@by_engine(real)
def DistributedOptimizer(
    optimizer: Optimizer,
    named_parameters: Iterable[tuple[str, nn.Parameter]] | None = None,
    compression: Any = Compression.none,
    backward_passes_per_step: int = 1,
    op: int = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Groups = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Let an optimizer step on what all ranks' gradients come to; every rank must call it, in the same order.

    Gradients leave while the backward pass runs. To clip them: ``optimizer.synchronize()``, clip, and ``with
    optimizer.skip_synchronize(): optimizer.step()``. A ``torch.amp.GradScaler`` may call ``step`` itself: it sees the exchanged
    gradients, so that all ranks skip the same steps.

    Args:
        optimizer: Any; use the returned one from here on. It is of the same class, and shares its state.
        named_parameters: Names for messages, usually ``model.named_parameters()``; of all the optimizer's parameters.
        compression: See `Compression`.
        backward_passes_per_step: Backward passes after which gradients are complete. They add up; nothing is divided.
        op: hvd.Average, hvd.Sum, or hvd.Adasum, which combines the ranks' steps instead of their gradients.
        gradient_predivide_factor: Divides before the sum and multiplies after it; for averages.
        num_groups: Older than ``groups``.
        groups: What travels together: a number of groups, or lists of parameters.
        sparse_as_dense: Send sparse gradients as dense ones.
        process_set: The ranks that take part; an optimizer on another rank steps alone.

    Raises:
        ValueError: Names are not unique or not complete, or arguments exclude each other.
    """
    if gradient_predivide_factor != 1.0 and op != Average:
        raise ValueError("gradient_predivide_factor is for op=hvd.Average")
    if num_groups:
        warnings.warn("num_groups= is deprecated; use groups=", DeprecationWarning, stacklevel=3)
        groups = num_groups if groups is None else groups
    if backward_passes_per_step <= 0:
        raise ValueError(f"backward_passes_per_step must be positive, got {backward_passes_per_step}")
    if op not in (Average, Sum, Adasum):
        raise ValueError("op must be hvd.Average, hvd.Sum or hvd.Adasum")
    named = _named(optimizer, named_parameters)
    _check_groups(groups)
    state.job()
    adasum = op == Adasum and state.size() > 1
    if adasum and process_set is not global_process_set:
        raise NotImplementedError("hvd.Adasum works over all ranks, not over a process set")
    mixin = _DistributedAdasumOptimizer if adasum else _DistributedOptimizer
    below = type(optimizer)
    if issubclass(below, _Distributed):
        raise ValueError("this optimizer is a DistributedOptimizer already; wrap an optimizer once")
    made_class: Any = type(
        below.__name__, (mixin, below), {"__module__": below.__module__, "_depth": len(below.__mro__)}
    )
    made: Any = made_class.__new__(made_class)
    # A scheduler puts a `step` of its own into the optimizer that it was made for.
    made.__dict__.update({name: value for name, value in optimizer.__dict__.items() if name != "step"})
    made._given, made._named, made._compression = optimizer, named, compression
    made._synchronized = made._skips = made._by_scaler = False
    if optimizer not in _wrapped:
        optimizer.register_load_state_dict_post_hook(_begin_anew)
    _wrapped[optimizer] = weakref.ref(made)
    if adasum:
        made.backward_passes_per_step = backward_passes_per_step
        return made
    predivided = gradient_predivide_factor if op == Average else 1.0
    made._exchange = Exchange(
        named,
        backward_passes_per_step,
        Manner(
            op=Sum if op == Sum else Average, prescale=1.0 / predivided, postscale=predivided, compression=compression,
            groups=groups, sparse_as_dense=sparse_as_dense, process_set=process_set,
        ),
    )  # fmt: skip
    if made._exchange.active and optimizer not in _refusing:
        optimizer.register_step_pre_hook(_refuse_itself)
        _refusing.add(optimizer)
    return made


_wrapped: weakref.WeakKeyDictionary[Optimizer, weakref.ref[Any]] = weakref.WeakKeyDictionary()  # the newest around it
_refusing: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def _refuse_itself(stepped: Optimizer, *_: Any) -> None:
    """Before the step of an optimizer that was wrapped, or of the one that wraps it."""
    if stepped not in _wrapped:
        return
    made = _wrapped[stepped]()
    if made is None or (isinstance(made, _DistributedOptimizer) and made._exchange.under_way):
        raise RuntimeError(_ITSELF)


def _begin_anew(loaded: Any) -> None:
    """After a state was loaded by an optimizer that was wrapped, or by the one that wraps it: both hold it, as before."""
    made, other = (loaded, loaded._given) if isinstance(loaded, _Distributed) else (_wrapped[loaded](), None)
    for one in (made, other):
        if one is not None and one is not loaded:
            one.__dict__.update(state=loaded.state, param_groups=loaded.param_groups)
    if isinstance(made, _DistributedOptimizer):
        made._exchange.forget()
        made._synchronized = made._by_scaler = False


def _named(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]] | None
) -> list[tuple[str, nn.Parameter]]:
    """The optimizer's parameters with names, in its order."""
    held = [(g, at, p) for g, group in enumerate(optimizer.param_groups) for at, p in enumerate(group["params"])]
    if named_parameters is None:
        return [(f"parameter.{g}.{at}", parameter) for g, at, parameter in held]
    given = list(named_parameters)
    if any(not isinstance(pair, tuple) for pair in given):
        raise ValueError("named_parameters are pairs of a name and a parameter, as model.named_parameters() gives")
    names = [name for name, _ in given]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"names in named_parameters must be unique; found twice: {', '.join(twice)}")
    name_of = {id(parameter): name for name, parameter in given}
    missing = [f"{at} of group {g}" for g, at, parameter in held if id(parameter) not in name_of]
    if missing:
        raise ValueError(
            f"named_parameters must name all the optimizer's parameters; missing: {', '.join(missing[:10])}"
        )
    return [(name_of[id(parameter)], parameter) for _, _, parameter in held]


def _check_groups(groups: Groups) -> None:
    if groups is None or (isinstance(groups, int) and groups >= 0):
        return
    if isinstance(groups, int) or not isinstance(groups, Sequence):
        raise ValueError(f"groups is a number of groups, not negative, or lists of parameters; got {groups!r}")
    seen: set[int] = set()
    for parameter in (parameter for group in groups for parameter in group):
        if not isinstance(parameter, Tensor):
            raise ValueError("groups are lists of parameters")
        if id(parameter) in seen:
            raise ValueError("a parameter can only be in one of the groups")
        seen.add(id(parameter))

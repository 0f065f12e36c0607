"""Float32 masters of 16-bit parameters: the optimizer works on them, and the model computes with what they round to.

bfloat16 holds eight binary digits, so that an update of less than a five-hundredth of a weight would leave it as it is. Here
such updates add up in the master (Micikevicius et al. 2018, "Mixed Precision Training", https://arxiv.org/abs/1710.03740,
section 3.1). The parameter is what counts: where others have written to it since the last step, as a loaded checkpoint
does, its master takes its number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdtrain.backends.layout import laid_out_like, lay_out_states
from hvdtrain.errors import ConfigError

_KIND = "MasterWeights of "
_KEY = "master_weight"  # of a parameter's state
_NARROW = (torch.bfloat16, torch.float16)


class MasterWeights(Optimizer):
    """Wraps one of torch's optimizers, or one like them; everything but the numbers that it works on stays as it was.

    Hand it to `Backend.replicate` or the `Trainer` like any other optimizer, before schedules are made; these, GradScalers and
    parameter groups work on it. To cut the masters and the state over the ranks, wrap it once more:
    ``ShardedOptimizer(MasterWeights(optimizer), backend)``. ``state_dict`` is the optimizer's, and has each master as
    ``master_weight``.

    Args:
        optimizer: Over the model's parameters, which may be converted later: the masters begin with the numbers that the
            parameters have now. It is taken over, and must not be used any more.

    Raises:
        ConfigError: It is wrapped already, or has a schedule.
    """

    keeps_masters = True  # asked for by who cuts parameters too

    def __init__(self, optimizer: Optimizer) -> None:
        if hasattr(optimizer, "kind"):  # MasterWeights or ShardedOptimizer
            raise ConfigError(
                "MasterWeights takes a plain optimizer; to cut its state over the ranks, wrap it in the other order: "
                "ShardedOptimizer(MasterWeights(optimizer), backend)"
            )
        if getattr(optimizer.step, "_wrapped_by_lr_sched", False):
            raise ConfigError(
                "a schedule holds this optimizer already; make MasterWeights of it first, and the schedule over that"
            )
        self.kind = _KIND + type(optimizer).__name__
        self.inner_type = type(optimizer)
        self._inner: Optimizer | None = None
        self._masters: dict[nn.Parameter, nn.Parameter] = {}
        super().__init__(optimizer.param_groups, optimizer.defaults)
        for group in self.param_groups:
            self._make_masters(group["params"])
        optimizer.param_groups = [self._inner_group(group) for group in self.param_groups]
        for parameter in [p for p in self._parameters() if p in optimizer.state]:
            state = optimizer.state.pop(parameter)
            optimizer.state[self._masters[parameter]] = {name: _widened(value) for name, value in state.items()}
        self._inner = optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train one more group of parameters."""
        super().add_param_group(param_group)
        if self._inner is not None:
            group = self.param_groups[-1]
            self._make_masters(group["params"])
            self._inner.add_param_group(self._inner_group(group))

    @property  # type: ignore[override]
    def state(self) -> dict[Any, Any]:
        """Of each parameter: its master, and what the optimizer remembers; to write into it writes to these."""
        return _State(self._inner, self._masters)

    @state.setter
    def state(self, state: dict[Any, Any]) -> None:
        if state:
            raise ConfigError("the state of MasterWeights is changed by load_state_dict()")
        _State(self._inner, self._masters).clear()

    @property
    def remembers(self) -> bool:
        """Whether the optimizer has a state beside the masters."""
        return self._inner is not None and bool(self._inner.state)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the masters by the parameters' gradients, and round them to the parameters.

        Raises:
            ConfigError: A closure was given, or parameters are no more what the masters were made of.
        """
        if closure is not None:
            raise ConfigError("MasterWeights.step takes no closure")
        assert self._inner is not None
        self._follow()
        trained = [(p, self._masters[p]) for p in self._parameters() if p.grad is not None]
        for parameter, master in trained:
            assert parameter.grad is not None
            master.grad = laid_out_like(parameter.grad.to(master.dtype), master)
        self._inner.step()
        for parameter, master in trained:
            parameter.copy_(master)
            master.grad = None

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state, in which each parameter has its master as well."""
        assert self._inner is not None
        self._follow()
        whole: dict[str, Any] = self._inner.state_dict()
        whole["state"] = {
            index: {**whole["state"].get(index, {}), _KEY: self._masters[parameter].detach()}
            for index, parameter in enumerate(self._parameters())
        }
        return whole

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; masters that it lacks, as a plain optimizer's does, stay the parameters' own.

        Raises:
            ValueError: It is another optimizer's, as torch says it.
        """
        assert self._inner is not None
        self._follow()
        states = {index: dict(state) for index, state in state_dict["state"].items()}
        masters = {index: state.pop(_KEY) for index, state in states.items() if _KEY in state}
        self._inner.load_state_dict({**state_dict, "state": {index: state for index, state in states.items() if state}})
        lay_out_states(self._inner)
        for group, loaded in zip(self.param_groups, self._inner.param_groups, strict=True):
            group.update({name: value for name, value in loaded.items() if name != "params"})
        for index, parameter in enumerate(self._parameters()):
            if index in masters:
                self._masters[parameter].copy_(masters[index])

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ConfigError(
            "MasterWeights can be neither copied nor pickled, because another optimizer works for it; copy what state_dict() returns"
        )

    # -- inside -------------------------------------------------------------------------------------------------------

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    def _make_masters(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            wide = torch.float32 if parameter.dtype in _NARROW else parameter.dtype
            self._masters[parameter] = nn.Parameter(parameter.detach().to(wide, copy=True))

    def _inner_group(self, group: dict[str, Any]) -> dict[str, Any]:
        return {**group, "params": [self._masters[parameter] for parameter in group["params"]]}

    def _follow(self) -> None:
        """Let settings and masters be what the groups and the parameters say."""
        assert self._inner is not None
        if not all(parameter in self._masters for parameter in self._parameters()):
            raise ConfigError("a parameter was put into MasterWeights' param_groups by hand; use add_param_group()")
        for group, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner.update(self._inner_group(group))
        for parameter in self._parameters():
            master = self._masters[parameter]
            if master.shape != parameter.shape:
                raise ConfigError(
                    f"a parameter has shape {tuple(parameter.shape)}, and had {tuple(master.shape)} when MasterWeights was made; resize it before"
                )
            kind = master.dtype if parameter.dtype in _NARROW else parameter.dtype  # converted, since: to float64, say
            if master.device != parameter.device or master.dtype != kind:
                master.data = master.data.to(parameter.device, kind)
            rounded = master.to(parameter.dtype)
            if parameter.is_cuda or not torch.equal(rounded, parameter):  # not to wait for a GPU is worth more there
                master.copy_(torch.where(rounded == parameter, master, parameter.to(master.dtype)))


def has_masters(optimizer: object) -> bool:
    """Whether an optimizer works on masters: a `MasterWeights`, or what cuts one over the ranks."""
    return str(getattr(optimizer, "kind", "")).startswith(_KIND)


def _widened(value: Any) -> Any:
    """A state that an optimizer has made for a 16-bit parameter, as it would be for the master."""
    return value.float() if isinstance(value, Tensor) and value.dtype in _NARROW else value


class _State(dict[Any, Any]):
    """What stands for the state: each parameter's, put together from its master and what the inner optimizer remembers."""

    def __init__(self, inner: Optimizer | None, masters: dict[nn.Parameter, nn.Parameter]) -> None:
        self._inner, self._masters = inner, masters
        if inner is not None:
            super().__init__({p: {**inner.state.get(m, {}), _KEY: m.detach()} for p, m in masters.items()})

    def clear(self) -> None:
        """Forget what the optimizer remembers; the masters stay."""
        if self._inner is not None:
            self._inner.state.clear()

    def __setitem__(self, parameter: Any, state: dict[str, Any]) -> None:
        remembered = dict(state)
        master = remembered.pop(_KEY, None)
        if isinstance(master, Tensor):
            self._masters[parameter].data.copy_(master)
        if self._inner is not None and remembered:
            self._inner.state[self._masters[parameter]] = remembered

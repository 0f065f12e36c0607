"""A model that is cut over the ranks: each holds an N-th of the parameters, of their gradients and of the optimizer's state.

It is torch's own FSDP2 (`torch.distributed.fsdp.fully_shard`, https://pytorch.org/docs/stable/distributed.fsdp.fully_shard.html;
stage 3 of ZeRO, Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054). What this module owns: the ranks' weights, the
optimizer that was made over whole parameters, ranks that do not do the same, and states that are whole again.

Every forward and every backward pass gathers parameters from all ranks, so that all must make equally many. That is compared
before each by one small exchange; a rank without samples cannot sit a step out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from hvdtrain.backends.backward_graph import leaves
from hvdtrain.backends.gradient_norm import shrink_
from hvdtrain.backends.replica import Replica, copied
from hvdtrain.backends.replica_options import ReplicaOptions
from hvdtrain.backends.units import cut_like, own_part, owner, units_of, whole
from hvdtrain.backends.weighting import Tally
from hvdtrain.errors import ConfigError, TrainingError

with suppress(ImportError):  # an old torch, which units_of() has refused
    from torch.distributed.fsdp import FSDPModule, fully_shard

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.optim import Optimizer

    from hvdtrain.backends.base import Backend

_KINDS = (
    "runs the model",
    "runs the model without gradients",
    "goes backward",
    "ends its step",
    "ends its evaluation",
)
_FORWARD, _INFERENCE, _BACKWARD, _END, _EVALUATED = range(5)
_MANY = 2**31 - 1


class FullyShardedReplica(Replica):
    """This rank's part of a model; gradients are summed and cut in each backward pass."""

    _reuses_gradients = False
    _engine_averages = False
    _ranks_always_meet = True
    is_cut = True

    def __init__(
        self, backend: Backend, module: nn.Module, optimizer: Optimizer | None, options: ReplicaOptions
    ) -> None:
        assert options.shard_modules is not None
        self._units = units_of(module, options.shard_modules)
        self._calls = [0] * len(_KINDS)
        self._order = 0  # of the units that were gathered since the ranks have met
        self._inside = self._going_back = False
        self._gathered: dict[Tensor, str] = {}  # parameters as the forward pass saw them last
        super().__init__(backend, module, optimizer, options)

    # -- verbs --------------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, **how: Any) -> None:
        """As `Replica.backward`; every rank must call it equally often in a step.

        Raises:
            TrainingError: Also when the ranks do not do the same, or the loss did not depend on some parameters.
        """
        if not loss.requires_grad:
            raise TrainingError(
                f"rank {self._backend.rank}: the loss depends on no parameter, and every rank takes part in each backward pass of a model "
                "that is cut over the ranks (shard_modules=)"
            )
        used = leaves(loss)
        names = {name for parameter, name in self._gathered.items() if parameter in used}
        lacking = [name for name, p in self.module.named_parameters() if p.requires_grad and name not in names]
        if lacking:
            raise TrainingError(
                f"rank {self._backend.rank}: the loss did not depend on some parameters: {', '.join(lacking[:8])}"
                f"{' ...' if len(lacking) > 8 else ''}. Freeze them before replicate(), or use them; "
                "reentrant activation checkpointing hides them: pass use_reentrant=False"
            )
        self._meet(_BACKWARD)
        self._going_back = True
        try:
            super().backward(loss, **how)
        finally:
            self._going_back = False

    def copy_from_rank_zero(self) -> None:
        """Give every rank rank 0's buffers; parameters and optimizer state exist once, over all ranks."""
        self.sync_buffers()

    def end_inference(self) -> None:
        """As `Replica.end_inference`.

        Raises:
            TrainingError: On every rank: the ranks did not run the model equally often.
        """
        self._meet(_EVALUATED)

    def gradient_norm(self) -> Tensor:
        """The L2 norm over all gradients of all ranks."""
        parts = [own_part(gradient) for gradient in self._gradients()]
        squares = torch.zeros((), dtype=torch.float64, device=self._backend.device)
        for part in parts:
            real = torch.view_as_real(part) if part.is_complex() else part
            squares += torch.linalg.vector_norm(real, dtype=torch.float64).square()
        kind = torch.promote_types(torch.float32, parts[0].dtype.to_real()) if parts else torch.float32
        return self._backend.all_reduce(squares).sqrt().to(kind)

    # -- states -------------------------------------------------------------------------------------------------------

    def whole_state(self) -> dict[str, Any]:
        """As `Replica.whole_state`: put together one tensor at a time, on rank 0 alone."""
        root = self._backend.rank == 0
        state = {"model": whole(dict(self.module.state_dict()), root=root)}
        if self._optimizer is not None:
            state["optimizer"] = whole(self._optimizer.state_dict(), root=root)
        return {name: copied(of) for name, of in state.items()} if root else {}

    def load_whole_state(self, state: dict[str, Any]) -> None:
        """As `Replica.load_whole_state`: rank 0's is cut over the ranks, one tensor at a time."""
        outline: Any = self._backend.broadcast_object(_outline(state) if self._backend.rank == 0 else {})
        if "model" in outline:
            self._load_model(state.get("model", {}), outline["model"])
        if self._optimizer is not None and "optimizer" in outline:
            self._load_optimizer(self._optimizer, state.get("optimizer", {}).get("state", {}), outline["optimizer"])

    def _load_model(self, state: dict[str, Tensor], outline: dict[str, Tensor]) -> None:
        own = self.module.state_dict()
        if set(outline) != set(own):
            raise ConfigError(
                f"the state is of another model: it has {sorted(set(outline) ^ set(own))[:8]} or lacks them"
            )
        for name, tensor in own.items():
            if outline[name].shape != tensor.shape:
                raise ConfigError(
                    f"the state has {name!r} in shape {tuple(outline[name].shape)}, the model in {tuple(tensor.shape)}"
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(self._cut(state.get(name), outline[name], tensor))

    def _load_optimizer(self, optimizer: Optimizer, state: dict[int, Any], outline: dict[str, Any]) -> None:
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        cut = {
            index: {
                name: self._cut(state.get(index, {}).get(name), value, held[index]) if _is_outline(value) else value
                for name, value in of.items()
            }
            for index, of in outline["state"].items()
        }
        optimizer.load_state_dict({**outline, "state": cut})

    def _cut(self, value: Tensor | None, outline: Tensor, like: Tensor) -> Tensor:
        device = self._backend.device
        if self._backend.rank == 0:
            assert value is not None
            sent = value.to(device)
        else:
            sent = torch.empty(outline.shape, dtype=outline.dtype, device=device)
        sent = self._backend.broadcast(sent)
        if isinstance(like, DTensor) and sent.shape == like.shape:
            return distribute_tensor(sent, like.device_mesh, like.placements, src_data_rank=None)
        return sent

    # -- Replica ------------------------------------------------------------------------------------------------------

    def _make_alike(self) -> None:
        super()._make_alike()
        self._shard()
        self._watched.take()

    def _set_up(self) -> None:
        pass

    def _send_during(self, loss: Tensor, weight: Tensor, tally: Tally, retain_graph: bool) -> None:
        loss.backward(weight, retain_graph=retain_graph)
        self.lap("backward")
        self._begin(tally)

    def _send_after(self, tally: Tally, empty: bool) -> None:
        self._begin(tally)

    def _settle_unit(self) -> float:
        if self._going_back:
            return super()._settle_unit()
        self._meet(_END)  # before any other collective of the step's end
        return 1.0  # each backward pass has settled it

    def _begin(self, tally: Tally) -> None:
        if self._going_back:
            self._meet(_END)
        self._summed = torch.tensor(tally.values(), dtype=torch.float64, device=self._backend.wire.device)
        self._work = self._backend.wire.all_reduce_(self._summed, "sum")

    def _finish(self, empty: bool) -> Tensor:
        self._work.wait()
        return self._summed

    def _clip(self, clip_norm: float) -> Tensor:
        norm = self.gradient_norm()
        shrink_([own_part(gradient) for gradient in self._gradients()], norm, clip_norm)
        return norm

    def _outside(self, scaler: GradScaler) -> list[Tensor]:
        return [own_part(gradient) for gradient in super()._outside(scaler)]

    def _agree_on_infinities(self, scaler: GradScaler) -> None:
        for found in scaler._found_inf_per_device(self.optimizer).values():
            self._backend.all_reduce_(found, "max")

    # -- inside -------------------------------------------------------------------------------------------------------

    def _shard(self) -> None:
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        world = dist.group.WORLD
        assert world is not None
        mesh = DeviceMesh.from_group(world, self._backend.device.type)
        for unit in (*self._units.values(), self.module):
            unit.register_forward_hook(_own_memory)
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
            assert isinstance(unit, FSDPModule)
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        cut = dict(self.module.named_parameters())
        optimizer = self._optimizer
        for group in [] if optimizer is None else optimizer.param_groups:
            assert optimizer is not None
            for at, parameter in enumerate(group["params"]):
                group["params"][at] = part = cut[names[parameter]]
                if parameter in optimizer.state:  # the same on every rank by now
                    state = optimizer.state.pop(parameter)
                    optimizer.state[part] = {name: _cut_with(part, value) for name, value in state.items()}
        for number, (name, unit) in enumerate((("", self.module), *self._units.items()), 1):
            unit.register_forward_pre_hook(_untraced(self._note_gathered(name, number)))
        self.module.register_forward_pre_hook(_untraced(self._enter), prepend=True)
        self.module.register_forward_hook(_untraced(self._leave), always_call=True)
        for unit in self._units.values():
            unit.register_forward_pre_hook(_untraced(self._refuse_apart), prepend=True)

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self._meet(_FORWARD if torch.is_grad_enabled() else _INFERENCE)
        self._inside = True

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._inside = False

    def _refuse_apart(self, module: nn.Module, inputs: Any) -> None:
        if not self._inside and not self._going_back:
            raise TrainingError(
                f"a {type(module).__name__} of a model that is cut over the ranks (shard_modules=) was called by itself; call replica.model, "
                "in whose forward pass all ranks gather its parameters"
            )

    def _note_gathered(self, unit: str, number: int) -> Callable[[nn.Module, Any], None]:
        places = [
            (part, key, f"{prefix}.{key}" if prefix else key)
            for prefix, part in self.module.named_modules()
            for key in part._parameters
            if owner(f"{prefix}.{key}" if prefix else key, self._units) == unit
        ]

        def note(module: nn.Module, inputs: Any) -> None:
            self._order = (self._order * 1_000_003 + number) % _MANY
            for part, key, name in places:
                parameter = part._parameters[key]
                if parameter is not None and parameter not in self._gathered:
                    self._gathered[parameter] = name
                    if parameter.requires_grad:
                        parameter.register_post_accumulate_grad_hook(self._refuse_plain)

        return note

    def _refuse_plain(self, parameter: Tensor) -> None:
        if not self._going_back:
            raise TrainingError(
                f"loss.backward() was called on a model that is cut over the ranks (its {self._gathered[parameter]!r}), without the weight of "
                "its samples; call replica.backward(loss, samples=...)"
            )

    def _meet(self, kind: int) -> None:
        """Return when all ranks are about to do the same.

        Raises:
            TrainingError: On every rank; says which rank does what.
        """
        self._calls[kind] += 1
        mine = torch.tensor([kind, self._calls[kind], self._order], device=self._backend.wire.device)
        everyone = [of.tolist() for of in self._backend.all_gather(mine)]
        self._order = 0
        other = next((rank for rank, what in enumerate(everyone) if what != everyone[0]), None)
        if other is not None and everyone[other][:2] == everyone[0][:2]:
            raise TrainingError(
                f"rank 0 and rank {other} ran other modules of the model, or in another order, and parameters are cut over the ranks "
                "(shard_modules=), so that they gathered each other's numbers for different modules. Let every rank run the same modules, or "
                "name larger ones, in which the choice is made"
            )
        if other is not None:
            does = [f"{_KINDS[everyone[rank][0]]} (its time {everyone[rank][1]})" for rank in (0, other)]
            raise TrainingError(
                f"rank 0 {does[0]}, and rank {other} {does[1]}: parameters are cut over the ranks (shard_modules=), so that all must run the "
                'model and go backward equally often. Give every rank samples in each step (last_batch="merge" or "drop", a global batch '
                "of at least one sample a rank) and equally many micro-batches"
            )


def _untraced(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that torch.compile leaves alone: of a module compiled in place it would trace the hooks too, and these exchange messages."""
    untraced: Callable[..., Any] = torch.compiler.disable(hook)
    return untraced


def _cut_with(part: Tensor, value: Any) -> Any:
    return cut_like(value, part) if isinstance(value, Tensor) and value.shape == part.shape else value


def _own_memory(module: nn.Module, inputs: Any, output: Any) -> Any:
    """An in-place operation on a view would take away the hook that gathers the parameters for the backward pass."""
    return tree_map(lambda one: one.clone() if isinstance(one, Tensor) and one._is_view() else one, output)


def _outline(value: Any) -> Any:
    """The same without numbers: tensors on the meta device; what is no parameter's is kept."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, dict):
        return {key: _outline(item) for key, item in value.items()}
    return value


def _is_outline(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta

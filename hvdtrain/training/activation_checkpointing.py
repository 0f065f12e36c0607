"""Less memory for more computing: chosen modules forget their activations and compute them again in the backward pass.

It is torch's own non-reentrant checkpointing (https://pytorch.org/docs/stable/checkpoint.html; Chen et al. 2016, "Training Deep
Nets with Sublinear Memory Cost", https://arxiv.org/abs/1604.06174). Names, types and the state_dict of the model stay as they
are. What a module does to its buffers it must not do twice: running statistics are left alone the second time, and other
buffers that change are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint

from hvdtrain.errors import ConfigError, TrainingError

POLICIES = ("full", "selective")
# torch 2.4 has none.
SELECTIVE_CONTEXTS: Callable[[Any], Any] | None = getattr(
    torch_checkpoint, "create_selective_checkpoint_contexts", None
)
# What is costly to compute again: products of matrices, convolutions, attention.
_COSTLY = [
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    if hasattr(torch.ops.aten, name)
]


def checkpoint_activations(model: nn.Module, modules: str, *, policy: str = "full") -> list[str]:
    """Let modules of a model compute their activations again in the backward pass, in place.

    Args:
        model: Before it is compiled; it may be replicated before or afterwards.
        modules: A regular expression for the names of the modules, as in `torch.nn.Module.named_modules`; the whole name must
            match. Of modules inside each other the outermost is taken.
        policy: "full" to compute everything again, "selective" to keep the results of matrix products, convolutions and
            attention, which cost most, and compute the rest.

    Returns:
        The names of the modules that were taken.

    Raises:
        ConfigError: No module has such a name, another call has taken it already, or torch is too old.
    """
    if policy not in POLICIES:
        raise ConfigError(
            f"checkpoint_policy must be one of {', '.join(POLICIES)}, got {policy!r} (--checkpoint-policy)"
        )
    if policy == "selective" and SELECTIVE_CONTEXTS is None:
        raise ConfigError(
            f"checkpoint_policy 'selective' needs torch 2.5 or newer, and this is {torch.__version__}: update torch, or use 'full' "
            "(--checkpoint-policy)"
        )
    try:
        pattern = re.compile(modules)
    except re.error as error:
        raise ConfigError(
            f"checkpoint_modules is no regular expression: {error} in {modules!r} (--checkpoint-modules)"
        ) from error
    matching = {name: module for name, module in _named(model) if name and pattern.fullmatch(name)}
    taken: dict[str, nn.Module] = {}
    for name, module in matching.items():
        called = type(module).forward is not nn.Module.forward and not _reached_past(model, name)  # no ModuleList is
        if called and module not in taken.values() and not any(_inside(name, other) for other in taken):
            taken[name] = module
    if matching and not taken:
        name, module = next(iter(matching.items()))
        if _reached_past(model, name):
            whole = name.rpartition(".")[0]
            raise ConfigError(
                f"{name!r} is never called: the MultiheadAttention that it belongs to computes with its weights; name "
                f"{repr(whole) if whole else 'the module that contains the MultiheadAttention'} (--checkpoint-modules)"
            )
        raise ConfigError(
            f"{name!r} is a {type(module).__name__}, which has no forward pass of its own; name the modules in it, as {name + '[.][^.]+'!r} "
            "does (--checkpoint-modules)"
        )
    if not taken:
        some = [name for name, _ in _named(model) if name][:12]
        raise ConfigError(
            f"no module of {type(model).__name__} has a name like {modules!r} (--checkpoint-modules); there are {', '.join(some)}"
            f"{' ...' if len(some) == 12 else ''}"
        )
    before = [name for name, module in _named(model) if isinstance(module.forward, _Recomputed)]
    twice = [
        name for name in taken for other in before if name == other or _inside(name, other) or _inside(other, name)
    ]
    if twice:
        raise ConfigError(f"the activations of {twice[0]!r} are checkpointed already; name it once")
    for name, module in taken.items():
        module.forward = _Recomputed(name, module, selective=policy == "selective")
    return list(taken)


def recomputes(model: nn.Module) -> bool:
    """Whether any module of a model has been taken by `checkpoint_activations`."""
    return any(isinstance(module.forward, _Recomputed) for module in model.modules())


class _Recomputed:
    """Takes the place of a module's ``forward``; a copy of the module gets a copy of it, which belongs to that."""

    def __init__(self, name: str, module: nn.Module, *, selective: bool) -> None:
        self._name, self._module, self._plain, self._selective = name, module, module.forward, selective

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._plain(*args, **kwargs)
        values = (*args, *kwargs.values())  # `checkpoint` takes some names for its own
        run = _Run(self, len(args), tuple(kwargs))
        if torch.compiler.is_compiling():  # a compiler changes buffers once, at the end
            how: dict[str, Any] = {"context_fn": _selective} if self._selective else {}
            return checkpoint(run.plain, *values, use_reentrant=False, **how)
        return checkpoint(run, _place(values), *values, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        first, again = _selective() if self._selective else (nullcontext(), nullcontext())
        return first, _Again(self._module, again)

    def state(self) -> list[Any]:
        """Whatever the module computes with, as far as it may not change before it computes again."""
        cut = {
            inner
            for part in self._module.modules()
            if part is not self._module and _is_gathered(part)
            for inner in part.modules()
        }
        parts = list(self._module.modules())
        tensors: list[Tensor] = [p for part in parts if part not in cut for p in part.parameters(recurse=False)]
        tensors += [buffer for part in parts if not _counts(part) for buffer in part.buffers(recurse=False)]
        return [(id(tensor), tensor._version) for tensor in tensors] + [part.training for part in parts]


class _Run:
    """One forward pass of a module, and the same again."""

    def __init__(self, owner: _Recomputed, positional: int, names: tuple[str, ...]) -> None:
        self._owner, self._positional, self._names = owner, positional, names
        self._seen: list[Any] | None = None

    def __call__(self, _: Tensor | None, *values: Any) -> Any:
        owner, before = self._owner, self._owner.state()
        if self._seen is not None:
            if before != self._seen:
                raise TrainingError(
                    f"the parameters or buffers of {owner._name!r}, or its train() or eval(), changed between its forward pass and the backward "
                    "pass, which would compute its activations again from other numbers; call backward() first, or leave it out of "
                    "--checkpoint-modules"
                )
            return self._computed(*values)
        output, self._seen = self._computed(*values), owner.state()
        if before != self._seen:
            raise ConfigError(
                f"{owner._name!r} changes its buffers in the forward pass, so that computing it again would give other numbers; leave the "
                "module that does so out of --checkpoint-modules"
            )
        return output

    def _computed(self, *values: Any) -> Any:
        with _no_cache_of_casts() if self._owner._selective else nullcontext():
            return self.plain(*values)

    def plain(self, *values: Any) -> Any:
        """Compute."""
        named = dict(zip(self._names, values[self._positional :], strict=True))
        return self._owner._plain(*values[: self._positional], **named)


def _selective() -> tuple[Any, Any]:
    assert SELECTIVE_CONTEXTS is not None
    first, again = SELECTIVE_CONTEXTS(_COSTLY)
    return first, again


def _place(values: tuple[Any, ...]) -> Tensor | None:
    """A tensor on this rank's GPU where no argument is one: `checkpoint` keeps the random numbers of the devices it sees."""
    if not torch.cuda.is_initialized() or any(isinstance(value, Tensor) and value.is_cuda for value in values):
        return None
    return torch.empty(0, device="cuda")


class _Again:
    """Where a module computes again, once or, with a graph that is retained, more often."""

    def __init__(self, module: nn.Module, inside: AbstractContextManager[Any]) -> None:
        self._module, self._inside = module, inside
        self._open: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(_statistics_kept(self._module))  # outside of what "selective" watches
            stack.enter_context(self._inside)
            self._open.append(stack.pop_all())

    def __exit__(self, *error: Any) -> bool | None:
        return self._open.pop().__exit__(*error)


@contextmanager
def _no_cache_of_casts() -> Iterator[None]:
    """Cast parameters each time under autocast: from a cache they come the first time or the second, and "selective" counts."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Normalise by the batch's statistics, and count them with a weight of 0."""
    counting: list[Any] = [
        part for part in module.modules() if getattr(part, "track_running_stats", False) and part.training
    ]
    before = [
        (part.momentum, None if part.num_batches_tracked is None else part.num_batches_tracked.clone())
        for part in counting
    ]
    for part in counting:
        part.momentum = 0.0
    try:
        yield
    finally:
        for part, (momentum, batches) in zip(counting, before, strict=True):
            part.momentum = momentum
            if batches is not None:
                part.num_batches_tracked.copy_(batches)


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by name; one that is in several places by each of its names."""
    yield from model.named_modules(remove_duplicate=False)


def _reached_past(model: nn.Module, name: str) -> bool:
    """Whether a module's parent computes with its parameters and never calls it."""
    parent = name.rpartition(".")[0]
    return isinstance(model.get_submodule(parent) if parent else model, nn.MultiheadAttention)


def _is_gathered(module: nn.Module) -> bool:
    """Whether a module's parameters are cut over the ranks but while it computes: they are others then."""
    return hasattr(module, "unshard")


def _counts(module: nn.Module) -> bool:
    return bool(getattr(module, "track_running_stats", False)) and module.training


def _inside(name: str, other: str) -> bool:
    return not other or name.startswith(f"{other}.")

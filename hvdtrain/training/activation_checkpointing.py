"""Less memory for more computing: chosen modules forget their activations and compute them again in the backward pass.

It is torch's own non-reentrant checkpointing (https://pytorch.org/docs/stable/checkpoint.html; Chen et al. 2016, "Training Deep
Nets with Sublinear Memory Cost", https://arxiv.org/abs/1604.06174). Names, types and the state_dict of the model stay as they
are. What a module does to its buffers it must not do twice: running statistics are left alone the second time, and other
buffers that change are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from hvdtrain.errors import ConfigError

POLICIES = ("full", "selective")
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
        ConfigError: No module has such a name, or another call has taken it already.
    """
    if policy not in POLICIES:
        raise ConfigError(
            f"checkpoint_policy must be one of {', '.join(POLICIES)}, got {policy!r} (--checkpoint-policy)"
        )
    try:
        pattern = re.compile(modules)
    except re.error as error:
        raise ConfigError(
            f"checkpoint_modules is no regular expression: {error} in {modules!r} (--checkpoint-modules)"
        ) from error
    taken: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if name and pattern.fullmatch(name) and not any(_inside(name, other) for other in taken):
            taken[name] = module
    if not taken:
        some = [name for name, _ in model.named_modules() if name][:12]
        raise ConfigError(
            f"no module of {type(model).__name__} has a name like {modules!r} (--checkpoint-modules); there are {', '.join(some)}"
            f"{' ...' if len(some) == 12 else ''}"
        )
    before = [name for name, module in model.named_modules() if isinstance(module.forward, _Recomputed)]
    twice = [
        name for name in taken for other in before if name == other or _inside(name, other) or _inside(other, name)
    ]
    if twice:
        raise ConfigError(f"the activations of {twice[0]!r} are checkpointed already; name it once")
    for name, module in taken.items():
        module.forward = _Recomputed(name, module, selective=policy == "selective")
    return list(taken)


class _Recomputed:
    """Takes the place of a module's ``forward``; a copy of the module gets a copy of it, which belongs to that."""

    def __init__(self, name: str, module: nn.Module, *, selective: bool) -> None:
        self._name, self._module, self._plain, self._selective = name, module, module.forward, selective

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._plain(*args, **kwargs)
        before = self._versions()
        counts = any(_counts(part) for part in self._module.modules())
        contexts: dict[str, Any] = {"context_fn": self._contexts} if self._selective or counts else {}
        output = checkpoint(self._plain, *args, use_reentrant=False, **contexts, **kwargs)
        if before != self._versions():
            raise ConfigError(
                f"{self._name!r} changes its buffers in the forward pass, so that computing it again would give other numbers; leave the "
                "module that does so out of --checkpoint-modules"
            )
        return output

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        first, again = (
            create_selective_checkpoint_contexts(_COSTLY) if self._selective else (nullcontext(), nullcontext())
        )
        return first, _both(_statistics_kept(self._module), again)  # outside of what "selective" watches

    def _versions(self) -> list[int]:
        return [
            buffer._version
            for module in self._module.modules()
            if not hasattr(module, "track_running_stats")
            for buffer in module.buffers(recurse=False)
        ]


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


@contextmanager
def _both(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _counts(module: nn.Module) -> bool:
    return bool(getattr(module, "track_running_stats", False)) and module.training


def _inside(name: str, other: str) -> bool:
    return not other or name.startswith(f"{other}.")

"""What a replica watches of its model and optimizer, and whether it is still so.

Parameters come and go: a backbone is unfrozen, a head replaced, a parameter group added. Whether anything changed is asked
before each exchange, so it costs comparisons of flat lists and no walk over the model.
"""

from __future__ import annotations

import operator
from itertools import chain, repeat
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.optim import Optimizer

# Asked of every module and parameter before each exchange: loops in C.
_CHILDREN = operator.attrgetter("_modules")
_PARAMETERS = operator.attrgetter("_parameters")
_KIND = operator.attrgetter("requires_grad", "dtype")
_GRADIENT = operator.attrgetter("grad")
_Seen = tuple[list[object], list[tuple[bool, torch.dtype]]]  # who is there, and how


class Watched:
    """The parameters of a model as they were when last looked at.

    Attributes:
        trained: Those that require gradients, in the model's order.
        frozen: The others.
        outside: Those that are trained and that the optimizer does not hold; none without an optimizer.
        held: All of the model's and the optimizer's.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer | None) -> None:
        self._module = module
        self._optimizer = optimizer
        self._known: set[int] = set()
        self.take()

    def take(self) -> list[nn.Parameter]:
        """Look anew; return the parameters that were never seen before."""
        self._modules = list(self._module.modules())
        own = list(self._module.parameters())
        self.trained = [p for p in own if p.requires_grad]
        self.frozen = [p for p in own if not p.requires_grad]
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        stepped = {id(p) for group in groups for p in group["params"]}
        self.outside = [p for p in self.trained if id(p) not in stepped] if groups else []
        self.held = list(dict.fromkeys([*own, *(p for group in groups for p in group["params"])]))
        self._own = own
        self._seen = self._look()
        new = [p for p in own if id(p) not in self._known]
        self._known = {id(p) for p in self.held}  # held alive by the list, so that an id stays one parameter's
        return new

    def changed(self) -> bool:
        """Whether modules, parameters, their kinds, what requires gradients, or the optimizer's groups are other than when taken."""
        objects, kinds = self._look()
        return (
            kinds != self._seen[1]
            or len(objects) != len(self._seen[0])
            or not all(map(operator.is_, objects, self._seen[0]))
        )

    def _look(self) -> _Seen:
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        objects: list[object] = list(chain.from_iterable(map(dict.values, map(_CHILDREN, self._modules))))
        objects += chain.from_iterable(map(dict.values, map(_PARAMETERS, self._modules)))
        for group in groups:
            objects += group["params"]
        return objects, list(map(_KIND, self._own))

    def any_gradient(self) -> bool:
        """Whether any parameter that is trained has a gradient."""
        return not all(map(operator.is_, map(_GRADIENT, self.trained), repeat(None)))


COMPILED = "_orig_mod"
"""What `torch.compile` calls a module inside its wrapper."""


def without_compile(name: str) -> str:
    """A tensor's name without what `torch.compile` puts before it: its wrapper holds the module under a name of its own."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def plain_names(module: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by the names that they have without `torch.compile`, as states hold them."""
    return {without_compile(name): parameter for name, parameter in module.named_parameters()}

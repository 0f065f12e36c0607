"""Which names of a function must be the whole file's, because other functions speak of them."""

from __future__ import annotations

import libcst as cst

from hvdtrain.migrate.pattern import Tree, contains_backward
from hvdtrain.migrate.steps import code
from hvdtrain.migrate.wrapping import Wrapping


class _Uses(cst.CSTVisitor):
    """Lines outside one function that will speak of the backend, or of the replica."""

    def __init__(self, tree: Tree, wrap: Wrapping | None, key: str, function: cst.FunctionDef) -> None:
        super().__init__()
        self._tree, self._wrap, self._key, self._function = tree, wrap, key, function
        self.found = False

    def visit_FunctionDef(self, node: cst.FunctionDef) -> bool:
        return node is not self._function

    def visit_Call(self, node: cst.Call) -> None:
        if self._key == "backend":
            self.found |= self._tree.called(node) not in ("", "init", "run", "DistributedOptimizer")
        elif self._wrap is not None:
            called = node.func.attr.value if isinstance(node.func, cst.Attribute) else ""
            steps = called == "step" and self._wrap.optimizer in code(node)
            self.found |= steps or (called == "backward" and contains_backward(node))


def used_elsewhere(tree: Tree, wrap: Wrapping | None, key: str, function: cst.FunctionDef) -> bool:
    """Whether lines outside a function will speak of the "backend", or of the "replica"."""
    looker = _Uses(tree, wrap, key, function)
    tree.wrapper.module.visit(looker)
    return looker.found

"""Whether all that needs a backend runs inside the block that follows ``hvd.init()``, as far as names of functions tell."""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst

from hvdtrain.migrate.pattern import Pattern, Tree


def outside(tree: Tree, pattern: Pattern) -> bool:
    """Whether ``hvd.init()`` stands in a function of its own, which returns before the work begins."""
    init = pattern.inits[0]
    home = tree.function(init)
    if home is None:
        return False
    block = tree.parent(init)
    if not isinstance(block, cst.IndentedBlock):
        return True
    following = list(block.body[block.body.index(init) + 1 :])
    functions = _Functions()
    tree.wrapper.module.visit(functions)
    reached: set[str] = set()
    waiting = _named(following)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting |= functions.named.get(name, set())
    needed = [*pattern.wraps, *pattern.broadcasts, *(loop for loop, _ in pattern.loops)]
    if not needed:
        return not following
    return any(
        function is None or (function is not home and function.name.value not in reached)
        for function in map(tree.function, needed)
    )


class _Functions(cst.CSTVisitor):
    """By the name of each function, what it names."""

    def __init__(self) -> None:
        super().__init__()
        self.named: dict[str, set[str]] = {}

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        self.named.setdefault(node.name.value, set()).update(_named([node.body]))

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        self.named.setdefault(node.name.value, set()).update(_named([node.body]) | {"__init__"})


class _Named(cst.CSTVisitor):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def visit_Name(self, node: cst.Name) -> None:  # a function may be handed on before it is called
        self.names.add(node.value)


def _named(nodes: Sequence[cst.CSTNode]) -> set[str]:
    looker = _Named()
    for node in nodes:
        node.visit(looker)
    return looker.names

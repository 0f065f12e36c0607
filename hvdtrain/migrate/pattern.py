"""Where a script has the pattern that `own_loop` rewrites: found first, so that nothing is rewritten by halves.

Names are followed by their spelling: the optimizer that was wrapped, the model whose parameters it got, the loaders that a
loop with a backward pass iterates over, wherever in the file they are written like this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import libcst as cst
from libcst.helpers import get_full_name_for_node
from libcst.metadata import (
    CodeRange,
    MetadataWrapper,
    ParentNodeProvider,
    PositionProvider,
    QualifiedNameProvider,
    QualifiedNameSource,
)

from hvdtrain.horovod_modules import OURS


@dataclass(kw_only=True, slots=True)
class Pattern:
    """What was found; nodes are those of the wrapped tree.

    Attributes:
        inits: Statements ``hvd.init()``.
        wraps: Statements ``optimizer = hvd.DistributedOptimizer(...)``.
        broadcasts: Statements that are a broadcast of parameters or of an optimizer's state.
        wrap_calls: Every call of DistributedOptimizer, assigned or not.
        loops: Loops over data with a backward pass in them, and what they iterate over.
        samplers: Names of DistributedSamplers that cut by ``hvd.size()``.
        loaders: Names of DataLoaders, and of the sampler that each has.
        compressions: Names that only hold a compression, and their lines.
        names: Every name in the script.
        has_torch: Whether ``torch`` is torch in the whole file.
    """

    inits: list[cst.SimpleStatementLine] = field(default_factory=list)
    wraps: list[cst.SimpleStatementLine] = field(default_factory=list)
    broadcasts: list[cst.SimpleStatementLine] = field(default_factory=list)
    wrap_calls: list[cst.Call] = field(default_factory=list)
    loops: list[tuple[cst.For, str]] = field(default_factory=list)
    samplers: set[str] = field(default_factory=set)
    loaders: dict[str, str] = field(default_factory=dict)
    compressions: dict[str, cst.SimpleStatementLine] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    has_torch: bool = False


class Tree:
    """A parsed script with what libcst knows about its nodes."""

    def __init__(self, module: cst.Module) -> None:
        self.wrapper = MetadataWrapper(module)
        self._qualified = self.wrapper.resolve(QualifiedNameProvider)
        self._parents = self.wrapper.resolve(ParentNodeProvider)
        self._positions = self.wrapper.resolve(PositionProvider)

    def line(self, node: cst.CSTNode) -> int:
        """Where a node begins."""
        position: CodeRange = self._positions[node]
        return position.start.line

    def operation(self, node: cst.CSTNode) -> str:
        """The name within our package of Horovod's names: "rank" for ``hvd.rank``, however it was imported; else ""."""
        named = self._qualified.get(node, ()) if _is_name(node) else ()
        for found in named() if callable(named) else named:
            if found.source is QualifiedNameSource.IMPORT and found.name.startswith(f"{OURS}."):
                return str(found.name.removeprefix(f"{OURS}."))
        return ""

    def is_package(self, node: cst.CSTNode) -> bool:
        """Whether a name means our package of Horovod's names itself: ``hvd``."""
        named = self._qualified.get(node, ()) if isinstance(node, cst.Name) else ()
        return any(
            found.source is QualifiedNameSource.IMPORT and found.name == OURS
            for found in (named() if callable(named) else named)
        )

    def quote_within(self, node: cst.CSTNode) -> str:
        """The quote that a text at this place may have: before Python 3.12, not that of the f-string around it."""
        around = [above.start[-1] for above in self.around(node) if isinstance(above, cst.FormattedString)]
        return "'" if '"' in around else '"'

    def called(self, node: cst.CSTNode | None) -> str:
        """The operation that an expression calls."""
        return self.operation(node.func) if isinstance(node, cst.Call) else ""

    def parent(self, node: cst.CSTNode) -> cst.CSTNode | None:
        """The node around a node."""
        return self._parents.get(node)

    def around(self, node: cst.CSTNode) -> Iterator[cst.CSTNode]:
        """All nodes around a node, the nearest first."""
        above = self.parent(node)
        while above is not None:
            yield above
            above = self.parent(above)

    def function(self, node: cst.CSTNode) -> cst.FunctionDef | None:
        """The outermost function that a node is in."""
        functions = [above for above in self.around(node) if isinstance(above, cst.FunctionDef)]
        return functions[-1] if functions else None

    def conditional(self, node: cst.CSTNode) -> bool:
        """Whether a statement may be skipped, or run again: in a branch, a loop or a try."""
        for above in self.around(node):
            if isinstance(above, cst.FunctionDef):
                return False
            if isinstance(above, cst.If) and not _is_main(above):
                return True
            if isinstance(above, cst.For | cst.While | cst.Try | cst.Else):
                return True
        return False


def find(tree: Tree) -> Pattern:
    """Look at the whole script."""
    finder = _Finder(tree)
    tree.wrapper.module.visit(finder)
    return finder.found


def only(statement: cst.BaseStatement | cst.SimpleStatementLine) -> cst.BaseSmallStatement | None:
    """The one small statement of a line; None for anything else."""
    if isinstance(statement, cst.SimpleStatementLine) and len(statement.body) == 1:
        return statement.body[0]
    return None


def assigned(statement: cst.BaseStatement) -> tuple[str, cst.BaseExpression] | None:
    """Name and value of ``name = value`` (or ``self.name = value``)."""
    small = only(statement)
    if isinstance(small, cst.Assign) and len(small.targets) == 1:
        name = get_full_name_for_node(small.targets[0].target)
        if name and isinstance(small.targets[0].target, cst.Name | cst.Attribute):
            return name, small.value
    return None


def expressed(statement: cst.CSTNode) -> cst.BaseExpression | None:
    """The expression of a line that is nothing but one."""
    small = only(statement) if isinstance(statement, cst.SimpleStatementLine) else None
    return small.value if isinstance(small, cst.Expr) else None


def method(node: cst.CSTNode | None, name: str) -> str:
    """The object's name in ``object.name(...)``; "" for anything else."""
    if isinstance(node, cst.Call) and isinstance(node.func, cst.Attribute) and node.func.attr.value == name:
        return get_full_name_for_node(node.func.value) or ""
    return ""


def argument(call: cst.Call, name: str, position: int | None = None) -> cst.BaseExpression | None:
    """An argument by name, or by position."""
    for index, arg in enumerate(call.args):
        if (arg.keyword is not None and arg.keyword.value == name) or (
            arg.keyword is None and not arg.star and index == position
        ):
            return arg.value
    return None


def iterated(loop: cst.For) -> str:
    """The name in ``for ... in name``, ``enumerate(name)`` or ``tqdm(name)``."""
    what: cst.BaseExpression = loop.iter
    while isinstance(what, cst.Call) and what.args:
        if (get_full_name_for_node(what.func) or "").split(".")[-1] not in ("enumerate", "tqdm"):
            return ""
        what = what.args[0].value
    return get_full_name_for_node(what) or ""


def per_step(loop: cst.For) -> cst.BaseExpression | None:
    """What a loop gives in each step, without the count of ``enumerate``; None where that is several iterables' (zip)."""
    what: cst.BaseExpression = loop.iter
    target: cst.BaseExpression = loop.target
    while isinstance(what, cst.Call) and what.args:
        called = (get_full_name_for_node(what.func) or "").split(".")[-1]
        if called == "zip":
            return None
        if called == "enumerate" and isinstance(target, cst.Tuple) and len(target.elements) == 2:
            target = target.elements[1].value
        what = what.args[0].value
    return target


def contains_backward(node: cst.CSTNode) -> bool:
    """Whether ``something.backward()`` is called in it."""
    looker = _Backward()
    node.visit(looker)
    return looker.seen


class _Backward(cst.CSTVisitor):
    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def visit_Call(self, node: cst.Call) -> None:
        self.seen |= isinstance(node.func, cst.Attribute) and node.func.attr.value == "backward"


def _is_name(node: cst.CSTNode) -> bool:
    """Whether a node is names and dots alone."""
    while isinstance(node, cst.Attribute):
        node = node.value
    return isinstance(node, cst.Name)


def _is_main(node: cst.If) -> bool:
    return isinstance(node.test, cst.Comparison) and get_full_name_for_node(node.test.left) == "__name__"


class _Finder(cst.CSTVisitor):
    def __init__(self, tree: Tree) -> None:
        super().__init__()
        self._tree = tree
        self.found = Pattern()

    def visit_Name(self, node: cst.Name) -> None:
        self.found.names[node.value] = self.found.names.get(node.value, 0) + 1

    def visit_Import(self, node: cst.Import) -> None:
        named = [alias.evaluated_name.split(".")[0] for alias in node.names if alias.asname is None]
        self.found.has_torch |= "torch" in named and self._tree.function(node) is None

    def visit_Call(self, node: cst.Call) -> None:
        if self._tree.called(node) == "DistributedOptimizer":
            self.found.wrap_calls.append(node)

    def visit_For(self, node: cst.For) -> None:
        name = iterated(node)
        if name and contains_backward(node.body):
            self.found.loops.append((node, name))

    def visit_SimpleStatementLine(self, node: cst.SimpleStatementLine) -> None:
        operation = self._tree.called(expressed(node))
        if operation == "init":
            self.found.inits.append(node)
        elif operation in ("broadcast_parameters", "broadcast_optimizer_state"):
            self.found.broadcasts.append(node)
        bound = assigned(node)
        if bound is None:
            return
        name, value = bound
        if self._tree.called(value) == "DistributedOptimizer":
            self.found.wraps.append(node)
        if isinstance(value, cst.Call):
            made = (get_full_name_for_node(value.func) or "").split(".")[-1]
            size = argument(value, "num_replicas", 1)
            if made == "DistributedSampler" and self._tree.called(size) == "size":
                self.found.samplers.add(name)
            if made == "DataLoader" and argument(value, "batch_sampler") is None:
                sampler = get_full_name_for_node(argument(value, "sampler") or cst.Name("none"))
                self.found.loaders[name] = sampler or ""
        choices = [value.body, value.orelse] if isinstance(value, cst.IfExp) else [value]
        if all(self._tree.operation(choice).startswith("Compression.") for choice in choices):
            self.found.compressions[name] = node

"""The line that wraps the optimizer, its arguments, and the broadcasts around it: what they say, and what becomes of each."""

from __future__ import annotations

from dataclasses import dataclass, field

import libcst as cst
from libcst.helpers import get_full_name_for_node

from hvdtrain.migrate.pattern import Pattern, Tree, argument, assigned, expressed, method
from hvdtrain.migrate.remarks import OWN_LOOP_PAGE, Remark
from hvdtrain.migrate.steps import code

_HOROVOD_PAGE = "docs/horovod.md"


@dataclass(kw_only=True, slots=True)
class Wrapping:
    """What is known of ``optimizer = hvd.DistributedOptimizer(...)``.

    Attributes:
        statement: The line.
        optimizer: The name it is bound to.
        model: The model whose parameters it has.
        inner: The name of what was wrapped, "" if it has none.
        replica: The name of what takes its place.
        replicate_at: The line at which the replica is made: this one, or the last broadcast of the same block, because
            what rank 0 loads from a file before a broadcast is to reach the others.
        becomes: Each broadcast, and "nothing" or "copy" (from rank 0, again).
        dropped: Arguments that are not looked into any more.
        compression: The name that the compression was given by, "" if by none.
        remarks: About arguments.
    """

    statement: cst.SimpleStatementLine
    optimizer: str
    model: str
    inner: str
    replica: str
    replicate_at: cst.SimpleStatementLine
    becomes: dict[cst.SimpleStatementLine, str] = field(default_factory=dict)
    dropped: list[cst.CSTNode] = field(default_factory=list)
    compression: str = ""
    remarks: list[Remark] = field(default_factory=list)


def wrapping(tree: Tree, pattern: Pattern, statement: cst.SimpleStatementLine) -> Wrapping | None:
    """Read the line; None if it cannot be told which model it is about."""
    bound = assigned(statement)
    if bound is None or not isinstance(bound[1], cst.Call):
        return None
    name, call = bound[0], cst.ensure_type(bound[1], cst.Call)
    model = _model(tree, pattern, call)
    if not model:
        return None
    owner, _, _ = name.rpartition(".")
    replica = "replica" if "replica" not in pattern.names else "hvd_replica"
    wrap = Wrapping(
        statement=statement,
        optimizer=name,
        model=model,
        inner=get_full_name_for_node(argument(call, "optimizer", 0) or cst.Name("")) or "",
        replica=f"{owner}.{replica}" if owner else replica,
        replicate_at=statement,
    )
    _read_arguments(tree, call, wrap)
    _place_broadcasts(tree, pattern, wrap)
    return wrap


def _model(tree: Tree, pattern: Pattern, call: cst.Call) -> str:
    """The name of the model, from named_parameters, the optimizer's own line, or the broadcast of its parameters."""
    named = argument(call, "named_parameters", 1)
    found = method(named, "named_parameters")
    if found:
        return found
    looker = _Parameters(get_full_name_for_node(argument(call, "optimizer", 0) or cst.Name("?")) or "?")
    (argument(call, "optimizer", 0) or call).visit(looker)
    if not looker.models:
        tree.wrapper.module.visit(looker)
    if len(looker.models) == 1:
        return looker.models.pop()
    states = {
        method(argument(cst.ensure_type(expressed(line), cst.Call), "params", 0), "state_dict")
        for line in pattern.broadcasts
    } - {""}
    return states.pop() if len(states) == 1 else ""


class _Parameters(cst.CSTVisitor):
    """The models whose parameters an optimizer gets, in the lines that make it."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self._optimizer = optimizer
        self.models: set[str] = set()

    def visit_SimpleStatementLine(self, node: cst.SimpleStatementLine) -> bool:
        bound = assigned(node)
        return bound is not None and bound[0] == self._optimizer

    def visit_Call(self, node: cst.Call) -> None:
        for name in (method(node, "parameters"), method(node, "named_parameters")):
            if name:
                self.models.add(name)


def _read_arguments(tree: Tree, call: cst.Call, wrap: Wrapping) -> None:
    names = (
        "optimizer",
        "named_parameters",
        "compression",
        "backward_passes_per_step",
        "op",
        "gradient_predivide_factor",
    )
    for index, arg in enumerate(call.args):
        name = arg.keyword.value if arg.keyword is not None else names[index] if index < len(names) else ""
        if name == "optimizer":
            continue
        wrap.dropped.append(arg)
        text, yours = _said_of(tree, name, arg.value)
        if name == "compression" and isinstance(arg.value, cst.Name):
            wrap.compression = arg.value.value
        if arg.star:
            text, yours = f"{code(arg.value)} may hold anything; write the arguments out", True
        if text:
            page = _HOROVOD_PAGE if name in ("compression", "op", "groups", "num_groups") else OWN_LOOP_PAGE
            wrap.remarks.append(Remark(line=tree.line(arg.value), text=text, page=page, yours=yours))


def _said_of(tree: Tree, name: str, value: cst.BaseExpression) -> tuple[str, bool]:
    """What is to be said of one argument, and whether the user has to do something; ("", False) if nothing."""
    operation, text = tree.operation(value), code(value)
    chosen = isinstance(value, cst.IfExp) or not operation
    if (
        name == "named_parameters"
        or operation in ("Average", "Compression.none")
        or text in ("1", "1.0", "None", "False")
    ):
        return "", False
    if name == "compression":
        said = (
            f"compression={text} has no effect: gradients travel as they are; backend horovod has --horovod.compression"
        )
        return said, False
    if name == "op":
        said = f"op={text} has no effect: gradients are averaged over the samples"
        if operation == "Sum":
            said = "op=hvd.Sum: gradients are averaged over the samples here; multiply the learning rate by backend.world_size"
        return f"{said}; Adasum is a setting of backend horovod, --horovod.op" if "Adasum" in text else said, not chosen
    if name == "backward_passes_per_step":
        said = (
            f"backward_passes_per_step={text}: all but the last of a step's backward passes go into "
            "`with replica.accumulate(last=False):`"
        )
        return said, True
    if name in ("gradient_predivide_factor", "groups", "num_groups", "sparse_as_dense"):
        return f"{name}={text} has no effect: it changed how gradients travelled, not what they were", False
    return f"{name}={text} has no counterpart in a replica", True


def _of_the_replica(broadcast: cst.Call, wrap: Wrapping) -> bool:
    """Whether a broadcast sends the wrapped model or optimizer, which a replica takes from rank 0 by itself."""
    parameters, state = argument(broadcast, "params", 0), argument(broadcast, "optimizer", 0)
    if method(parameters, "state_dict") == wrap.model or method(parameters, "named_parameters") == wrap.model:
        return True
    return state is not None and get_full_name_for_node(state) in (wrap.optimizer, wrap.inner)


def _place_broadcasts(tree: Tree, pattern: Pattern, wrap: Wrapping) -> None:
    block = tree.parent(wrap.statement)
    line = tree.line(wrap.statement)
    copied = False
    for broadcast in sorted(pattern.broadcasts, key=tree.line):
        call = cst.ensure_type(expressed(broadcast), cst.Call)
        root = argument(call, "root_rank", 1)
        if not _of_the_replica(call, wrap):
            continue
        if root is not None and code(root) != "0":
            text = f"root_rank={code(root)}: a replica takes rank 0's; let rank 0 be the one that loads"
            wrap.remarks.append(Remark(line=tree.line(broadcast), text=text, page=OWN_LOOP_PAGE))
        elif tree.function(broadcast) is not tree.function(wrap.statement):
            text = "this broadcast is in another function than hvd.DistributedOptimizer; replica.copy_from_rank_zero() does it here"
            wrap.remarks.append(Remark(line=tree.line(broadcast), text=text, page=OWN_LOOP_PAGE))
        elif tree.line(broadcast) < line:
            wrap.becomes[broadcast] = "nothing"
        elif tree.parent(broadcast) is block:
            wrap.becomes[broadcast] = "nothing"
            wrap.replicate_at = broadcast
        else:
            wrap.becomes[broadcast] = "nothing" if copied else "copy"
            copied = True
    wrap.dropped += list(wrap.becomes)

"""The end of a training step: from the backward pass to the optimizer's step, in one block of statements.

Works on a block whose expressions are translated already, by the spelling of names. What stands between the two decides:
what `replica.step` does by itself (exchange, unscale, clip) becomes its arguments; where gradients are looked at or changed
in another way the exchange is made before that, and the optimizer steps as it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import libcst as cst
from libcst.helpers import get_full_name_for_node

from hvdtrain.migrate.pattern import argument, expressed, method

_LOOKS = (".grad", "parameters()", "clip_grad", "named_parameters")


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A statement that lets the wrapped optimizer step.

    Attributes:
        index: Of the statement in its block.
        scaler: The GradScaler that steps it; "" without one.
        alone: The stepping statement itself, out of ``with optimizer.skip_synchronize():``.
    """

    index: int
    scaler: str
    alone: cst.BaseStatement


def steps_of(body: Sequence[cst.BaseStatement], optimizer: str) -> list[Step]:
    """The statements of a block that step the optimizer."""
    found = []
    for index, statement in enumerate(body):
        inner = statement
        if isinstance(statement, cst.With) and is_skipping(statement):
            lines = statement.body.body
            if len(lines) != 1 or not isinstance(lines[0], cst.SimpleStatementLine):
                continue
            inner = lines[0].with_changes(leading_lines=statement.leading_lines)
        call = expressed(inner)
        if method(call, "step") == optimizer and isinstance(call, cst.Call) and not call.args:
            found.append(Step(index=index, scaler="", alone=inner))
        elif isinstance(call, cst.Call) and len(call.args) == 1 and method(call, "step"):
            given = get_full_name_for_node(call.args[0].value)
            found += [Step(index=index, scaler=method(call, "step"), alone=inner)] if given == optimizer else []
    return found


def is_skipping(node: cst.CSTNode | None) -> bool:
    """Whether this is ``with optimizer.skip_synchronize():``."""
    return isinstance(node, cst.With) and any(method(item.item, "skip_synchronize") for item in node.items)


def rewritten(
    body: Sequence[cst.BaseStatement], optimizer: str, model: str, replica: str, first: int
) -> tuple[list[cst.BaseStatement], list[str]] | None:
    """A block with its one step in our words, and notes; None if it has no step or more than one, or cannot be translated.

    Args:
        body: The block's statements.
        optimizer: The name of the wrapped optimizer.
        model: The name of its model.
        replica: The name of ours.
        first: Where the gradients are complete: the index after the backward pass, or 0.
    """
    found = steps_of(body, optimizer)
    if len(found) != 1 or found[0].index < first:
        return None
    step = found[0]
    between, after = list(body[first : step.index]), list(body[step.index + 1 :])
    notes, kept, clip = _sorted_out(between, optimizer, model, step.scaler)
    if any(_leaves(statement) for statement in kept):
        return None
    if not any(_looks(statement, optimizer) for statement in kept):
        given = [f"clip_norm={clip}"] if clip else []
        if step.scaler:
            given.append(f"scaler={step.scaler}")
            updates = [i for i, statement in enumerate(after) if method(expressed(statement), "update") == step.scaler]
            if updates:
                del after[updates[0]]
            else:
                given.append("update=False")
        line = _line(f"{replica}.step({', '.join(given)})", step.alone)
        return [*body[:first], *kept, line, *after], notes
    if step.scaler:
        return None
    rest, notes = _exchanged_first(between, optimizer, replica)
    return [*body[:first], *rest, step.alone, _line(f"{replica}.clear()", None), *after], notes


def _sorted_out(
    between: Sequence[cst.BaseStatement], optimizer: str, model: str, scaler: str
) -> tuple[list[str], list[cst.BaseStatement], str | None]:
    """What replica.step() does by itself, taken out: notes; what is kept; the clip's bound."""
    notes: list[str] = []
    kept: list[cst.BaseStatement] = []
    clip, exchanged = None, False
    for statement in between:
        call = expressed(statement)
        if method(call, "synchronize") == optimizer:
            exchanged = True
        elif _clipping(call, model) is not None and clip is None:
            clip = _clipping(call, model)
            if not exchanged:
                notes.append(
                    "clips the averaged gradient; the script clipped each rank's own before they were averaged"
                )
        elif not (scaler and method(call, "unscale_") == scaler):
            kept.append(statement)
    return notes, kept, clip


def _exchanged_first(
    between: Sequence[cst.BaseStatement], optimizer: str, replica: str
) -> tuple[list[cst.BaseStatement], list[str]]:
    """The exchange before the gradients are looked at, and everything after that as it is; and notes."""
    rest: list[cst.BaseStatement] = []
    notes: list[str] = []
    exchanged = False
    for statement in between:
        if method(expressed(statement), "synchronize") == optimizer:
            rest += [] if exchanged else [_line(f"{replica}.reduce_gradients()", statement)]
            exchanged = True
            continue
        if not exchanged and _looks(statement, optimizer):
            rest.append(_line(f"{replica}.reduce_gradients()", None))
            exchanged = True
            notes.append("the averaged gradient is looked at here; the script looked at each rank's own")
        rest.append(statement)
    return rest, notes


def _clipping(call: cst.BaseExpression | None, model: str) -> str | None:
    """The bound in ``clip_grad_norm_(model.parameters(), bound)``, of the whole model's L2 norm."""
    if not isinstance(call, cst.Call) or (get_full_name_for_node(call.func) or "").split(".")[-1] != "clip_grad_norm_":
        return None
    clipped = method(call.args[0].value, "parameters") if len(call.args) == 2 else ""
    if not clipped or clipped.rpartition(".")[2] != model.rpartition(".")[2]:
        return None
    bound = argument(call, "max_norm", 1)
    return None if bound is None else code(bound)


def _looks(statement: cst.BaseStatement, optimizer: str) -> bool:
    text = code(statement)
    return any(word in text for word in _LOOKS) or f"{optimizer}.synchronize" in text


def _leaves(statement: cst.BaseStatement) -> bool:
    """Whether a statement may go on with the next batch, or end the loop, before the step."""
    looker = _Leaving()
    statement.visit(looker)
    return looker.found


class _Leaving(cst.CSTVisitor):
    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def visit_For(self, node: cst.For) -> bool:
        return False

    def visit_While(self, node: cst.While) -> bool:
        return False

    def visit_FunctionDef(self, node: cst.FunctionDef) -> bool:
        return False

    def visit_Continue(self, node: cst.Continue) -> None:
        self.found = True

    def visit_Break(self, node: cst.Break) -> None:
        self.found = True

    def visit_Return(self, node: cst.Return) -> None:
        self.found = True


def code(node: cst.CSTNode) -> str:
    """A node's text."""
    return cst.Module(body=[]).code_for_node(node)


def _line(text: str, like: cst.BaseStatement | None) -> cst.SimpleStatementLine:
    """A statement, with the comments above and behind another one."""
    line = cst.ensure_type(cst.parse_statement(text), cst.SimpleStatementLine)
    if not isinstance(like, cst.SimpleStatementLine):
        return line
    return line.with_changes(leading_lines=like.leading_lines, trailing_whitespace=like.trailing_whitespace)

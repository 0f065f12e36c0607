"""The frame of a rewritten script: its imports, blank lines, and lines in the place of others."""

from __future__ import annotations

import libcst as cst
from libcst.helpers import get_full_name_for_node

from hvdtrain.horovod_modules import OURS


class BlankLines(cst.CSTTransformer):
    """Blank lines stay without blanks when they are indented."""

    def leave_EmptyLine(self, original_node: cst.EmptyLine, updated_node: cst.EmptyLine) -> cst.EmptyLine:  # noqa: D102
        return updated_node if updated_node.comment is not None else updated_node.with_changes(indent=False)


def with_import(module: cst.Module, *, keep: bool) -> cst.Module:
    """``import hvdtrain`` in the place of Horovod's imports, or beside them where names of theirs are left."""
    mover = _ImportsOfOurs(keep=keep)
    return module.visit(mover)


class _ImportsOfOurs(cst.CSTTransformer):
    def __init__(self, *, keep: bool) -> None:
        super().__init__()
        self._keep = keep
        self._done = [False]  # in the module, and in each function around: imports in functions serve those alone

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        self._done.append(False)

    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        self._done.pop()
        return updated_node

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.BaseStatement | cst.FlattenSentinel[cst.BaseStatement] | cst.RemovalSentinel:
        kept = [small for found in updated_node.body for small in _without_ours(found)]
        if len(kept) == len(updated_node.body) and all(map(cst.CSTNode.deep_equals, kept, updated_node.body)):
            return updated_node
        new = cst.ensure_type(cst.parse_statement("import hvdtrain"), cst.SimpleStatementLine)
        if self._keep:
            first, self._done[-1] = not any(self._done), True
            return cst.FlattenSentinel([updated_node, new]) if first else updated_node
        lines: list[cst.BaseStatement] = [updated_node.with_changes(body=kept)] if kept else []
        if not any(self._done):
            self._done[-1] = True
            lines.append(new if kept else new.with_changes(leading_lines=updated_node.leading_lines))
        return cst.FlattenSentinel(lines) if lines else cst.RemoveFromParent()


def _without_ours(small: cst.BaseSmallStatement) -> list[cst.BaseSmallStatement]:
    """What stays of a statement when our package of Horovod's names is no longer imported by it."""
    if not isinstance(small, cst.Import):
        return [] if _imports_ours(small) else [small]
    others = [alias for alias in small.names if not alias.evaluated_name.startswith(OURS)]
    if len(others) == len(small.names):
        return [small]
    others[-1:] = [alias.with_changes(comma=cst.MaybeSentinel.DEFAULT) for alias in others[-1:]]
    return [small.with_changes(names=others)] if others else []


def _imports_ours(small: cst.BaseSmallStatement) -> bool:
    if isinstance(small, cst.ImportFrom) and small.module is not None:
        name = get_full_name_for_node(small.module) or ""
        names = [] if isinstance(small.names, cst.ImportStar) else [alias.evaluated_name for alias in small.names]
        return name == OURS or name.startswith(f"{OURS}.") or (name == "hvdtrain" and names == ["horovod"])
    return False

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
        self._done = False

    def visit_FunctionDef(self, node: cst.FunctionDef) -> bool:  # imports in functions serve those alone
        return True

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.BaseStatement | cst.FlattenSentinel[cst.BaseStatement] | cst.RemovalSentinel:
        kept = [small for small in updated_node.body if not _imports_ours(small)]
        if len(kept) == len(updated_node.body):
            return updated_node
        new = cst.ensure_type(cst.parse_statement("import hvdtrain"), cst.SimpleStatementLine)
        if self._keep:
            first, self._done = not self._done, True
            return cst.FlattenSentinel([updated_node, new]) if first else updated_node
        lines: list[cst.BaseStatement] = [updated_node.with_changes(body=kept)] if kept else []
        if not self._done:
            self._done = True
            lines.append(new if kept else new.with_changes(leading_lines=updated_node.leading_lines))
        return cst.FlattenSentinel(lines) if lines else cst.RemoveFromParent()


def _imports_ours(small: cst.BaseSmallStatement) -> bool:
    if isinstance(small, cst.ImportFrom) and small.module is not None:
        name = get_full_name_for_node(small.module) or ""
        names = [] if isinstance(small.names, cst.ImportStar) else [alias.evaluated_name for alias in small.names]
        return name == OURS or name.startswith(f"{OURS}.") or (name == "hvdtrain" and names == ["horovod"])
    if isinstance(small, cst.Import):
        return all(alias.evaluated_name.startswith(OURS) for alias in small.names)
    return False

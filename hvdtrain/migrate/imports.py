"""The first form: Horovod's imports become ours, and nothing else changes.

Every statement that imports from Horovod is replaced, wherever it stands; where a name that is bound to Horovod's package
itself is used (``horovod.torch.init()``), that use follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst
from libcst.helpers import get_full_name_for_node
from libcst.metadata import MetadataWrapper, PositionProvider, QualifiedNameProvider, QualifiedNameSource

from hvdtrain.horovod_modules import MODULES, NAMES, OURS, why_not_offered
from hvdtrain.migrate.remarks import API_PAGE, THIS_PAGE, Remark


def imports_moved(module: cst.Module) -> tuple[cst.Module, list[Remark]]:
    """The script with our imports, and what is left."""
    wrapper = MetadataWrapper(module)
    mover = _Imports()
    return wrapper.visit(mover), mover.remarks


def from_horovod(name: str | None) -> bool:
    """Whether a dotted name is of Horovod's package."""
    return name is not None and (name == "horovod" or name.startswith("horovod."))


def dotted(name: str) -> cst.Attribute | cst.Name:
    """The expression ``a.b.c``."""
    head, *rest = name.split(".")
    node: cst.Attribute | cst.Name = cst.Name(head)
    for part in rest:
        node = cst.Attribute(node, cst.Name(part))
    return node


class _Imports(cst.CSTTransformer):
    METADATA_DEPENDENCIES = (PositionProvider, QualifiedNameProvider)

    def __init__(self) -> None:
        super().__init__()
        self.remarks: list[Remark] = []
        self._in_import = 0

    def visit_Import(self, node: cst.Import) -> None:
        self._in_import += 1

    def visit_ImportFrom(self, node: cst.ImportFrom) -> None:
        self._in_import += 1

    def leave_Import(self, original_node: cst.Import, updated_node: cst.Import) -> cst.BaseSmallStatement:
        self._in_import -= 1
        names = []
        for alias in updated_node.names:
            name = get_full_name_for_node(alias.name) or ""
            if not from_horovod(name):
                names.append(alias)
                continue
            refusal = why_not_offered(name)
            if refusal:
                self._left(original_node, refusal)
                names.append(alias)
            else:
                names.append(alias.with_changes(name=dotted(MODULES[name])))
        unique = [alias for i, alias in enumerate(names) if not any(alias.deep_equals(other) for other in names[:i])]
        unique = _without_twins(unique)
        unique[-1] = unique[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
        return updated_node.with_changes(names=unique)

    def leave_ImportFrom(
        self, original_node: cst.ImportFrom, updated_node: cst.ImportFrom
    ) -> cst.BaseSmallStatement | cst.FlattenSentinel[cst.BaseSmallStatement]:
        self._in_import -= 1
        name = get_full_name_for_node(updated_node.module) if updated_node.module else None
        if name is None or updated_node.relative or not from_horovod(name):
            return updated_node
        refusal = why_not_offered(name)
        if refusal:
            self._left(original_node, refusal)
            return updated_node
        if isinstance(updated_node.names, cst.ImportStar):
            return updated_node.with_changes(module=dotted(MODULES[name]))
        submodules: list[cst.ImportAlias] = []
        others: list[cst.ImportAlias] = []
        for alias in updated_node.names:
            full = f"{name}.{get_full_name_for_node(alias.name)}"
            is_submodule = full in MODULES
            if (
                name in ("horovod", "horovod.common")
                and not is_submodule
                and why_not_offered(full)
                and full != "horovod.run"
            ):
                self._left(original_node, why_not_offered(full))
                return updated_node
            if not is_submodule and get_full_name_for_node(alias.name) not in NAMES[MODULES[name]]:
                self._left(
                    original_node, f"{name} has {alias.evaluated_name}, which is none of its public names", API_PAGE
                )
            (submodules if is_submodule else others).append(alias)
        found: list[cst.BaseSmallStatement] = []
        if others:
            found.append(updated_node.with_changes(module=dotted(MODULES[name]), names=_last_without_comma(others)))
        for alias in submodules:
            whole = MODULES[f"{name}.{alias.evaluated_name}"]
            parent, _, last = whole.rpartition(".")
            own = alias.asname or (None if last == alias.evaluated_name else cst.AsName(cst.Name(alias.evaluated_name)))
            moved = cst.ImportAlias(cst.Name(last), asname=own)
            found.append(cst.ImportFrom(module=dotted(parent), names=[moved]))
        return found[0] if len(found) == 1 else cst.FlattenSentinel(found)

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.BaseExpression:
        """``horovod.torch`` where ``horovod`` is the package: ours, whatever follows."""
        if self._in_import:
            return updated_node
        name = get_full_name_for_node(original_node)
        imported = self._imported(original_node)
        if imported not in MODULES:
            return updated_node
        if name == imported:  # written out in full: `import horovod.torch` was the import
            return dotted(MODULES[imported])
        base = get_full_name_for_node(updated_node.value)
        bound = self._imported(original_node.value)
        if base is not None and bound in MODULES and MODULES[bound] == MODULES[imported]:
            return updated_node.value  # h.torch after `import horovod as h`
        return updated_node

    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.BaseExpression:
        if self._in_import or original_node.value != "horovod" or self._imported(original_node) != "horovod":
            return updated_node
        return dotted(OURS)

    def visit_Call(self, node: cst.Call) -> None:
        called = get_full_name_for_node(node.func) or ""
        if called.split(".")[-1] not in ("import_module", "__import__", "find_spec", "importorskip") or not node.args:
            return
        what = node.args[0].value
        if isinstance(what, cst.SimpleString) and from_horovod(str(what.evaluated_value)):
            name = str(what.evaluated_value)
            self._left(node, f"{called}({name!r}) names a module in a text: write {MODULES.get(name, OURS)!r} instead")

    def _imported(self, node: cst.CSTNode) -> str | None:
        """The full name of what an expression means, if an import brought it."""
        for found in self.get_metadata(QualifiedNameProvider, node, set()):
            if found.source is QualifiedNameSource.IMPORT and from_horovod(found.name):
                return str(found.name)
        return None

    def _left(self, node: cst.CSTNode, text: str, page: str = THIS_PAGE) -> None:
        line = self.get_metadata(PositionProvider, node).start.line
        self.remarks.append(Remark(line=line, text=text, page=page))


def _last_without_comma(names: Sequence[cst.ImportAlias]) -> list[cst.ImportAlias]:
    return [*names[:-1], names[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)]


def _without_twins(names: list[cst.ImportAlias]) -> list[cst.ImportAlias]:
    """``import horovod, horovod.torch`` names one module of ours twice."""
    seen: set[tuple[str, str]] = set()
    kept = []
    for alias in names:
        key = (alias.evaluated_name, alias.evaluated_alias or "")
        if key not in seen:
            seen.add(key)
            kept.append(alias)
    return kept

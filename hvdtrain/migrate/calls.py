"""Single calls of Horovod's in a backend's words: ``hvd.rank()`` is ``backend.rank``."""

from __future__ import annotations

import libcst as cst

from hvdtrain.migrate.pattern import Tree, argument

_FACTS = {
    "rank": "{0}.rank",
    "size": "{0}.world_size",
    "local_rank": "{0}.local_rank",
    "local_size": "{0}.local_world_size",
    "is_initialized": "{0}.running",
    "shutdown": "{0}.stop()",
    "barrier": "{0}.barrier()",
    "nccl_built": '({0}.engine == "nccl")',
    "gloo_enabled": '({0}.engine == "gloo")',
    "mpi_enabled": '({0}.name == "mpi")',
}
_OPS = {"Average": "mean", "Sum": "sum", "Min": "min", "Max": "max", "Product": "product"}
# Ours, the names of Horovod's arguments in their order, and which of them are dropped: names match nothing here.
_COLLECTIVES = {
    "broadcast": ("{0}.broadcast({1}, {2})", ("tensor", "root_rank", "name")),
    "broadcast_": ("{0}.broadcast_({1}, {2})", ("tensor", "root_rank", "name")),
    "broadcast_object": ("{0}.broadcast_object({1}, {2})", ("obj", "root_rank", "name")),
    "allgather": ("torch.cat({0}.all_gather({1}))", ("tensor", "name")),
    "allgather_object": ("{0}.all_gather_object({1})", ("obj", "name")),
}


def translated(
    call: cst.Call, operation: str, tree: Tree, original: cst.Call, backend: str
) -> cst.BaseExpression | None:
    """The same in ours; None where there is no such one call.

    Args:
        call: The call, its arguments translated already.
        operation: Horovod's name of it.
        tree: That ``original`` is of.
        original: The call as it was.
        backend: The name of the backend.
    """
    if operation in _FACTS and not call.args:
        return _filled(_FACTS[operation], tree.quote_within(original), backend)
    if operation in ("allreduce", "allreduce_"):
        return _all_reduce(call, operation, tree, original, backend)
    if operation not in _COLLECTIVES:
        return None
    text, names = _COLLECTIVES[operation]
    if not _only(call, names):
        return None
    given = argument(call, names[0], 0)
    if given is None:
        return None
    root = argument(call, "root_rank", 1)
    return _filled(text, '"', backend, given, cst.Integer("0") if root is None else root)


def _all_reduce(
    call: cst.Call, operation: str, tree: Tree, original: cst.Call, backend: str
) -> cst.BaseExpression | None:
    names = ("tensor", "average", "name", "compression", "op")
    if not _only(call, names) or argument(call, "compression", 3) is not None:
        return None
    given = argument(call, "tensor", 0)
    op, average = argument(original, "op", 4), argument(original, "average", 1)
    meaning: str | None = "mean"
    if op is not None:
        meaning = _OPS.get(tree.operation(op))
    elif average is not None and not (isinstance(average, cst.Name) and average.value in ("True", "None")):
        meaning = "sum" if isinstance(average, cst.Name) and average.value == "False" else None
    if given is None or meaning is None:
        return None
    ours = "all_reduce_" if operation.endswith("_") else "all_reduce"
    return _filled("{0}." + ours + '({1}, "' + meaning + '")', tree.quote_within(original), backend, given)


def _only(call: cst.Call, names: tuple[str, ...]) -> bool:
    """Whether a call's arguments are all among these, none of them starred."""
    known = all(arg.keyword is None or arg.keyword.value in names for arg in call.args)
    return known and len(call.args) <= len(names) and not any(arg.star for arg in call.args)


def _filled(text: str, quote: str, backend: str, *values: cst.BaseExpression) -> cst.BaseExpression:
    codes = [cst.Module(body=[]).code_for_node(value) for value in values]
    return cst.parse_expression(text.replace('"', quote).format(backend, *codes))

"""The second form: Horovod's usual loop becomes a loop of hvdtrain's own.

::

    hvd.init()                                        with hvdtrain.init() as backend:
    DataLoader(..., sampler=DistributedSampler(...))      backend.loader(DataLoader(...))
    hvd.DistributedOptimizer, broadcasts                  replica = backend.replicate(model, optimizer)
    loss.backward()                                       replica.backward(loss, samples=len(x))
    optimizer.step()                                      replica.step()

A script that has not this shape keeps Horovod's API, on our engines, and is told which line stands in the way.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import libcst as cst
from libcst.helpers import get_full_name_for_node

from hvdtrain.migrate.calls import translated
from hvdtrain.migrate.imports import imports_moved
from hvdtrain.migrate.layout import BlankLines, with_import
from hvdtrain.migrate.pattern import (
    Pattern,
    Tree,
    argument,
    assigned,
    expressed,
    find,
    method,
    only,
    per_step,
)
from hvdtrain.migrate.reach import outside
from hvdtrain.migrate.remarks import API_PAGE, COLLECTIVES_PAGE, OWN_LOOP_PAGE, Remark
from hvdtrain.migrate.shared_names import used_elsewhere
from hvdtrain.migrate.steps import code, is_skipping, rewritten, steps_of
from hvdtrain.migrate.wrapping import Wrapping, wrapping

_HOROVODS_API = re.compile(r"hvdtrain(\.| import .*)horovod")  # as it is imported once the imports were moved
_BEGIN = "_hvdtrain_begins_here_"
_OF_A_WRAPPED_ONE = ("synchronize", "skip_synchronize", "set_backward_passes_per_step")
_SPELLS_A_NAME = (cst.Attribute, cst.AssignTarget, cst.NameItem, cst.AsName, cst.Param)


def own_loop(module: cst.Module) -> tuple[cst.Module, list[Remark]]:
    """The script with a loop of its own; with Horovod's API on our engines where it has not the usual shape."""
    moved, remarks = imports_moved(module)
    if remarks or not _HOROVODS_API.search(moved.code):
        return moved, remarks
    tree = Tree(moved)
    pattern = find(tree)
    obstacles = _obstacles(tree, pattern)
    if obstacles:
        return moved, obstacles
    wrap = wrapping(tree, pattern, pattern.wraps[0]) if pattern.wraps else None
    if pattern.wraps and wrap is None:
        text = "the loop stays as it is: which model is this? Write named_parameters=model.named_parameters()"
        return moved, [Remark(line=tree.line(pattern.wraps[0]), text=text, page=OWN_LOOP_PAGE)]
    rewriter = _Rewriter(tree, pattern, wrap)
    new = tree.wrapper.module.visit(rewriter)
    remarks = [*rewriter.remarks, *(wrap.remarks if wrap else [])]
    if wrap is not None:
        remarks += [*_missing(tree, wrap, rewriter), *rewriter.left_of_horovods()]
    return with_import(new, keep=any(remark.yours for remark in remarks)), remarks


def _obstacles(tree: Tree, pattern: Pattern) -> list[Remark]:
    """Why the loop is left alone."""
    if len(pattern.inits) != 1:
        lines = [tree.line(node) for node in pattern.inits[1:]] or [1]
        text = "the loop stays as it is, with Horovod's API: " + (
            "hvd.init() is called more than once" if pattern.inits else "hvd.init() is not a statement of this file"
        )
        return [Remark(line=lines[0], text=text, page=API_PAGE)]
    if not pattern.wrap_calls:
        text = "the loop stays as it is, with Horovod's API: there is no hvd.DistributedOptimizer in this file"
        return [Remark(line=tree.line(pattern.inits[0]), text=text, page=API_PAGE)]
    found = []
    if tree.conditional(pattern.inits[0]):
        text = "the loop stays as it is: hvd.init() stands under a condition, and `with hvdtrain.init()` holds what follows"
        found.append(Remark(line=tree.line(pattern.inits[0]), text=text, page=OWN_LOOP_PAGE))
    elif outside(tree, pattern):
        text = "the loop stays as it is: hvd.init() stands in a function that ends before the work begins; call it where the work is"
        found.append(Remark(line=tree.line(pattern.inits[0]), text=text, page=OWN_LOOP_PAGE))
    for call in pattern.wrap_calls:
        line = tree.parent(tree.parent(call) or call)
        if len(pattern.wrap_calls) > 1:
            text = "the loop stays as it is: there are several DistributedOptimizers; make one replica for each"
        elif line not in pattern.wraps:
            text = "the loop stays as it is: write `optimizer = hvd.DistributedOptimizer(...)` as a line of its own"
        elif tree.conditional(line):
            text = "the loop stays as it is: hvd.DistributedOptimizer stands under a condition; a replica serves one rank, too"
        else:
            continue
        found.append(Remark(line=tree.line(call), text=text, page=OWN_LOOP_PAGE))
    return found


def _missing(tree: Tree, wrap: Wrapping, rewriter: _Rewriter) -> list[Remark]:
    """A backward pass or a step that was looked for and not found, so that it must have another name."""
    said = any(remark.yours for remark in rewriter.remarks)
    found = []
    for count, what, ours in (
        (rewriter.backwards, "loss.backward()", "backward(loss, samples=...)"),
        (rewriter.steps, f"{wrap.optimizer}.step()", "step()"),
    ):
        if not count and not said:
            text = f"no {what} was found in this file; {wrap.replica}.{ours} takes its place, wherever it is"
            found.append(Remark(line=tree.line(wrap.statement), text=text, page=OWN_LOOP_PAGE))
    return found


class _Rewriter(cst.CSTTransformer):
    def __init__(self, tree: Tree, pattern: Pattern, wrap: Wrapping | None) -> None:
        super().__init__()
        self._tree, self._pattern, self._wrap = tree, pattern, wrap
        self._backend = _free("backend", pattern)
        self.remarks: list[Remark] = []
        self.backwards = self.steps = 0
        self._loaders = _wrapped_loaders(pattern)
        self._loops: list[cst.For] = []
        self._ended: set[cst.CSTNode] = set()  # blocks whose step is the replica's
        self._silent: set[cst.CSTNode] = set(wrap.dropped if wrap else ())
        self._silent |= {line for name, line in pattern.compressions.items() if self._only_for_wrap(name)}

    # -- expressions --------------------------------------------------------------------------------------------------

    def on_visit(self, node: cst.CSTNode) -> bool:
        return node not in self._silent and super().on_visit(node)

    def visit_Import(self, node: cst.Import) -> bool:
        return False

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        return False

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        operation = self._tree.called(original_node)
        if not operation or operation in ("init", "DistributedOptimizer"):
            return updated_node
        if operation == "allgather" and not self._pattern.has_torch:
            text = "hvd.allgather becomes torch.cat(backend.all_gather(...)), where the file has `import torch`"
            self._remark(original_node, text, COLLECTIVES_PAGE)
            return updated_node
        new = translated(updated_node, operation, self._tree, original_node, self._backend)
        if new is None:
            return self._left(original_node, updated_node, operation)
        return new

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.BaseExpression:
        return self._bare(original_node, updated_node)

    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.BaseExpression:
        return self._bare(original_node, updated_node)

    def _bare(self, original: cst.Attribute | cst.Name, updated: cst.BaseExpression) -> cst.BaseExpression:
        """A name of Horovod's that is not called: an argument such as op=hvd.Sum is its call's, all else is left."""
        operation = self._tree.operation(original)
        parent = self._tree.parent(original)
        if self._tree.is_package(original) and not isinstance(parent, _SPELLS_A_NAME):
            self._remark(
                original, f"{code(original)} itself is used here: hvdtrain.init() gives a backend instead", API_PAGE
            )
            return updated
        called = isinstance(parent, cst.Call) and parent.func is original
        if not operation or called or isinstance(parent, cst.Attribute):
            return updated
        if isinstance(parent, cst.Arg) and parent.keyword is not None and parent.keyword.value in ("op", "compression"):
            return updated
        return self._left(original, updated, operation)

    def _left(self, original: cst.CSTNode, updated: cst.BaseExpression, operation: str) -> cst.BaseExpression:
        if operation == "run":
            return updated  # a statement of its own, below
        collective = operation.split("_", maxsplit=1)[0] in (
            "allreduce",
            "grouped",
            "allgather",
            "broadcast",
            "alltoall",
            "reducescatter",
        )
        text = f"hvd.{operation} has no single counterpart here and stays"
        if operation == "SyncBatchNorm":
            text = "hvd.SyncBatchNorm: make nn.BatchNorm layers, then hvdtrain.convert_sync_batch_norm(model, backend)"
        if operation.startswith("elastic"):
            text = f"hvd.{operation}: a loop of your own is saved and continued by hvdtrain.LoopState instead"
        self._remark(original, text, COLLECTIVES_PAGE if collective else OWN_LOOP_PAGE)
        return updated

    def _remark(self, node: cst.CSTNode, text: str, page: str, *, yours: bool = True) -> None:
        self.remarks.append(Remark(line=self._tree.line(node), text=text, page=page, yours=yours))

    # -- statements ---------------------------------------------------------------------------------------------------

    def visit_For(self, node: cst.For) -> None:
        self._loops.append(node)

    def leave_For(self, original_node: cst.For, updated_node: cst.For) -> cst.BaseStatement:
        self._loops.pop()
        return updated_node

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.BaseStatement | cst.FlattenSentinel[cst.BaseStatement] | cst.RemovalSentinel:
        call = expressed(original_node)
        operation = self._tree.called(call)
        if operation in ("init", "run", "join"):
            return self._of_operation(operation, original_node, updated_node)
        if isinstance(call, cst.Call) and _sets_device(call) and self._tree.called(call.args[0].value) == "local_rank":
            return cst.RemoveFromParent()
        if (
            original_node in self._silent
            and assigned(original_node)
            and original_node in self._pattern.compressions.values()
        ):
            return cst.RemoveFromParent()
        moved = self._of_wrapping(original_node, updated_node)
        if moved is not None:
            return moved
        if isinstance(call, cst.Call) and isinstance(call.func, cst.Attribute) and call.func.attr.value == "backward":
            return self._backward(original_node, updated_node)
        return self._of_data(original_node, updated_node)

    def _of_operation(
        self, operation: str, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.BaseStatement | cst.RemovalSentinel:
        """Lines that are nothing but one call of Horovod's."""
        if operation == "init":
            call = expressed(original_node)
            if isinstance(call, cst.Call) and call.args:
                text = f"hvd.init({code(call).partition('(')[2]}: hvdtrain.init() is for all ranks that were started"
                self._remark(original_node, text, OWN_LOOP_PAGE)
            return _instead(updated_node, _BEGIN)
        if operation == "run":
            text = "horovod.run starts ranks by a launcher now: torchrun --nproc-per-node N, mpirun -np N or srun"
            self._remark(original_node, text, "docs/clusters.md", yours=False)
            return _instead(updated_node, 'raise SystemExit("start the ranks with torchrun, mpirun or srun")')
        if not self._loaders:
            return updated_node
        self.remarks = [remark for remark in self.remarks if remark.line != self._tree.line(original_node)]
        text = "hvd.join() is gone: all ranks make the same number of steps"
        self._remark(original_node, text, OWN_LOOP_PAGE, yours=False)
        return cst.RemoveFromParent()

    def _of_data(self, original: cst.SimpleStatementLine, updated: cst.SimpleStatementLine) -> cst.BaseStatement:
        """Loaders and samplers."""
        sampler, new_call = method(expressed(original), "set_epoch"), expressed(updated)
        loader = next((name for name, own in self._loaders.items() if own == sampler), None)
        if loader and isinstance(new_call, cst.Call):
            return _instead(updated, f"{loader}.set_epoch({', '.join(code(arg.value) for arg in new_call.args)})")
        bound, small = assigned(original), only(updated)
        if bound and bound[0] in self._loaders and isinstance(small, cst.Assign):
            inner = cst.Call(cst.Attribute(cst.Name(self._backend), cst.Name("loader")), [cst.Arg(small.value)])
            return updated.with_changes(body=[small.with_changes(value=inner)])
        return updated

    def _of_wrapping(
        self, original: cst.SimpleStatementLine, updated: cst.SimpleStatementLine
    ) -> cst.BaseStatement | cst.FlattenSentinel[cst.BaseStatement] | cst.RemovalSentinel | None:
        """What becomes of the wrapped optimizer's line and of the broadcasts; None for every other line."""
        wrap = self._wrap
        if wrap is None or (original is not wrap.statement and original not in wrap.becomes):
            return None
        lines: list[cst.BaseStatement] = []
        if original is wrap.statement:
            call = cst.ensure_type(cst.ensure_type(only(updated), cst.Assign).value, cst.Call)
            inner = argument(call, "optimizer", 0)
            if inner is not None and get_full_name_for_node(inner) != wrap.optimizer:
                lines.append(_instead(updated, f"{wrap.optimizer} = {code(inner)}"))
        if original is wrap.replicate_at:
            made = f"{self._backend}.replicate({wrap.model}.to({self._backend}.device), {wrap.optimizer})"
            text = f"{wrap.replica} = {made}"
            lines.append(_instead(updated, text, comments=not lines))
        elif wrap.becomes.get(original) == "copy":
            lines.append(_instead(updated, f"{wrap.replica}.copy_from_rank_zero()"))
        return cst.FlattenSentinel(lines) if lines else cst.RemoveFromParent()

    def _backward(self, original: cst.SimpleStatementLine, updated: cst.SimpleStatementLine) -> cst.BaseStatement:
        call = cst.ensure_type(expressed(updated), cst.Call)
        if self._wrap is None or call.args:
            if self._wrap is not None:
                text = "backward() with arguments: replica.backward(loss, samples=..., retain_graph=...) takes the place of it"
                self._remark(original, text, OWN_LOOP_PAGE)
            return updated
        loss = code(cst.ensure_type(call.func, cst.Attribute).value)
        batch = self._batch(original)
        if not batch:
            text = "how many samples has the batch? Write replica.backward(loss, samples=...) here"
            self._remark(original, text, OWN_LOOP_PAGE)
            return updated
        self.backwards += 1
        return _instead(updated, f"{self._wrap.replica}.backward({loss}, samples=len({batch}))")

    def _batch(self, backward: cst.CSTNode) -> str:
        """The name of what the model was called with before a backward pass, or of a loop's inputs; "" if neither."""
        around = next(
            (node for node in self._tree.around(backward) if isinstance(node, cst.For | cst.FunctionDef)), None
        )
        looker = _ModelCalls(self._wrap.model if self._wrap else "")
        (around.body if around is not None else self._tree.wrapper.module).visit(looker)
        given = [each for loop in self._loops for each in (loop.target, per_step(loop)) if each is not None]
        bare = {code(each) for each in given}  # a whole batch of the loader, which may be a dictionary
        if len(set(looker.inputs)) == 1 and looker.inputs[0] not in bare:
            return looker.inputs[0]
        for loop in reversed(self._loops):
            target = per_step(loop)
            if isinstance(target, cst.Tuple) and isinstance(target.elements[0].value, cst.Name):
                return target.elements[0].value.value
        return ""

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        body = self._step(original_node, list(updated_node.body))
        return updated_node.with_changes(body=self._opened(body))

    def leave_If(self, original_node: cst.If, updated_node: cst.If) -> cst.BaseStatement | cst.RemovalSentinel:
        emptied = isinstance(updated_node.body, cst.IndentedBlock) and not updated_node.body.body
        if emptied and updated_node.orelse is None and not isinstance(self._tree.parent(original_node), cst.If):
            return cst.RemoveFromParent()
        return updated_node

    def leave_Module(self, original_node: cst.Module, updated_node: cst.Module) -> cst.Module:
        body = self._step(original_node, list(updated_node.body))
        return updated_node.with_changes(body=self._opened(body))

    def _step(self, original: cst.IndentedBlock | cst.Module, body: list[cst.BaseStatement]) -> list[cst.BaseStatement]:
        """A block with the optimizer's step in our words."""
        wrap = self._wrap
        if wrap is None or is_skipping(self._tree.parent(original)):
            return body
        if not steps_of(body, wrap.optimizer):
            self._other_step(original)
            return body
        node = original.body[steps_of(original.body, wrap.optimizer)[0].index]
        here = [i for i, line in enumerate(body) if f"{wrap.replica}.backward(" in code(line)]
        deeper = len(here) > 1 or (bool(here) and isinstance(body[here[-1]], cst.For | cst.While))
        if not deeper and (here or not self._may_be_left_out(original)):
            first = here[-1] + 1 if here else 0
            new = rewritten(body, wrap.optimizer, wrap.model, wrap.replica, first)
            if new is not None:
                self.steps += 1
                self._ended.add(original)
                for note in new[1]:
                    self._remark(node, note, OWN_LOOP_PAGE, yours=False)
                return new[0]
        several = (
            "several backward passes to one step: all but the last go into `with replica.accumulate(last=False):`, without a division "
            "of the loss, and replica.step() ends them"
        )
        text = several if deeper else "a step that may be left out. If it ends " + several
        if here and not deeper:
            text = "what stands between backward() and step() here has no counterpart; see replica.reduce_gradients()"
        self._remark(node, text, OWN_LOOP_PAGE)
        return body

    def _other_step(self, block: cst.IndentedBlock | cst.Module) -> None:
        """Says so where another optimizer than the wrapped one steps after a backward pass."""
        after = False
        for statement in block.body:
            call = expressed(statement)
            stepping = method(call, "step")
            if call is not None and after and stepping and "sched" not in stepping.lower():
                own = self._wrap.optimizer if self._wrap else ""
                text = f"{code(call)}: if this steps {own}, replica.step() takes its place, without a closure; if not, what it steps needs a replica of its own"
                self._remark(statement, text, OWN_LOOP_PAGE)
            after |= bool(method(call, "backward"))

    def left_of_horovods(self) -> list[Remark]:
        """What is asked of the wrapped optimizer where no step was rewritten, and the optimizer does not have any more."""
        looker = _WrappedOnly(self._wrap.optimizer if self._wrap else "")
        self._tree.wrapper.module.visit(looker)
        return [
            Remark(
                line=self._tree.line(call),
                text=f"{code(call)}: the optimizer is no longer Horovod's; replica.reduce_gradients() exchanges before replica.step()",
                page=OWN_LOOP_PAGE,
            )
            for call in looker.calls
            if not self._ended & set(itertools.islice(self._tree.around(call), 4))
        ]

    def _may_be_left_out(self, block: cst.CSTNode) -> bool:
        """Whether a block that steps is a branch, and another branch does not step, or there is none."""
        branch = self._tree.parent(block)
        if not isinstance(branch, cst.If | cst.Else) or self._wrap is None:
            return False
        while isinstance(above := self._tree.parent(branch), cst.If) and above.orelse is branch:
            branch = above
        each: cst.CSTNode | None = branch
        while isinstance(each, cst.If | cst.Else):
            if not steps_of(cst.ensure_type(each.body, cst.IndentedBlock).body, self._wrap.optimizer):
                return True
            if isinstance(each, cst.Else):
                return False
            each = each.orelse
        return isinstance(branch, cst.If)

    def _opened(self, body: list[cst.BaseStatement]) -> Sequence[cst.BaseStatement]:
        """What follows hvd.init() goes into the backend's `with`."""
        device = "" if {"cuda", "device"} & set(self._pattern.names) else 'device="cpu"'
        for index, line in enumerate(body):
            if isinstance(line, cst.SimpleStatementLine) and code(line).strip().endswith(_BEGIN):
                item = cst.WithItem(
                    cst.parse_expression(f"hvdtrain.init({device})"), cst.AsName(cst.Name(self._backend))
                )
                rest = cst.IndentedBlock(body[index + 1 :]).visit(BlankLines())
                opened = cst.With(items=[item], body=cst.ensure_type(rest, cst.IndentedBlock))
                return [*body[:index], opened.with_changes(leading_lines=line.leading_lines)]
        return body

    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        if self._tree.function(original_node) is not None or not isinstance(updated_node.body, cst.IndentedBlock):
            return updated_node
        made = {"backend": (self._backend, self._pattern.inits[0])}
        if self._wrap is not None and "." not in self._wrap.replica:
            made["replica"] = (self._wrap.replica, self._wrap.replicate_at)
        shared = [name for key, (name, at) in made.items() if self._shared(key, at, original_node)]
        if not shared:
            return updated_node
        line = cst.parse_statement(f"global {', '.join(shared)}")
        own = list(updated_node.body.body)
        after = 1 if own and isinstance(expressed(own[0]), cst.SimpleString | cst.ConcatenatedString) else 0
        return updated_node.with_changes(body=updated_node.body.with_changes(body=[*own[:after], line, *own[after:]]))

    def _shared(self, key: str, made_at: cst.CSTNode, function: cst.FunctionDef) -> bool:
        """Whether a name that this function makes is used in others, too."""
        if self._tree.function(made_at) is not function:
            return False
        return used_elsewhere(self._tree, self._wrap, key, function)

    def _only_for_wrap(self, name: str) -> bool:
        return self._wrap is not None and self._wrap.compression == name and self._pattern.names.get(name, 0) <= 3


class _WrappedOnly(cst.CSTVisitor):
    """Calls of methods that only a wrapped optimizer has."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self._optimizer = optimizer
        self.calls: list[cst.Call] = []

    def visit_Call(self, node: cst.Call) -> None:
        if any(method(node, name) == self._optimizer for name in _OF_A_WRAPPED_ONE):
            self.calls.append(node)


class _ModelCalls(cst.CSTVisitor):
    """What a model is called with, where that is a name."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self._model = model
        self.inputs: list[str] = []

    def visit_Call(self, node: cst.Call) -> None:
        name = get_full_name_for_node(node.func) or ""
        first = node.args[0] if node.args else None
        if name.split(".")[-1] == self._model.split(".")[-1] and first is not None and not first.star:
            self.inputs += [first.value.value] if isinstance(first.value, cst.Name) else []


def _wrapped_loaders(pattern: Pattern) -> dict[str, str]:
    """The loaders whose samples hvdtrain cuts: those that are trained on, by a DistributedSampler; with its name."""
    trained = {name for _, name in pattern.loops}
    return {
        name: sampler for name, sampler in pattern.loaders.items() if name in trained and sampler in pattern.samplers
    }


def _sets_device(call: cst.Call) -> bool:
    return (get_full_name_for_node(call.func) or "").endswith("cuda.set_device") and len(call.args) == 1


def _free(name: str, pattern: Pattern) -> str:
    while name in pattern.names:
        name = f"hvd_{name}"
    return name


def _instead(line: cst.SimpleStatementLine, text: str, *, comments: bool = True) -> cst.SimpleStatementLine:
    """Another statement in a line's place, with the line's comments."""
    new = cst.ensure_type(cst.parse_statement(text), cst.SimpleStatementLine)
    if not comments:
        return new
    return new.with_changes(leading_lines=line.leading_lines, trailing_whitespace=line.trailing_whitespace)

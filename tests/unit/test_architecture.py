"""Imports flow down the stairs of docs/architecture.md, and an engine's name stays in its own file."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "hvdtrain"

# A module may import from its own stair and from those above it in this list.
STAIRS = [
    ["version", "errors"],
    ["topology", "options", "memory"],
    ["config", "launch.hostlist", "launch.ancestry", "launch.environment", "data.partition", "data.arrays", "data.samplers", "data.worker_signals", "data.shared_memory"],
    ["launch.launchers", "launch.stuck", "data.loader", "data.digits", "data.images", "data.downloads"],
    ["launch.detect", "data.rank_loader", "components"],
    ["backends.wire", "backends.watch", "backends.rendezvous", "backends.optimizer_guard", "backends.loss_scale", "backends.watched", "backends.algorithms"],
    ["backends.forms", "backends.local_first", "backends.pairs"],
    ["backends.member"],
    ["backends.rooted"],
    ["backends.messages"],
    ["backends.communicator"],
    ["backends.agreement", "backends.weighting"],
    ["backends.replica"],
    ["backends.alone", "backends.hooked"],
    ["backends.reducer", "backends.base", "backends.horovod_stamp"],
    ["mpi.library", "mpi.lane", "mpi.dtypes"],
    ["mpi.operations", "mpi.staging"],
    ["mpi.messages"],
    ["mpi.group"],
    ["mpi.registration"],
    ["mpi"],
    ["backends.local", "backends.ddp", "backends.hvd"],
    ["backends.mpi"],
    ["backends"],
    ["workers", "data.vision", "sync_batch_norm"],
    ["data.named", "training.state"],
    ["training.checkpoint", "observe.logger", "optim.schedule", "training.precision", "training.models", "training.stopping"],
    ["observe.jsonl", "observe.progress", "observe.summary", "training.checkup", "training.task"],
    ["training.position"],
    ["training.trainer"],
    ["run"],
    ["horovod_build.failure", "horovod_build.trial"],
    ["horovod_build.edits", "horovod_build.running", "horovod_build.wishes", "horovod_build.wheels", "horovod_build.probe"],
    ["horovod_build.source", "horovod_build.nvidia", "horovod_build.plan"],
    ["horovod_build.compiling"],
    ["horovod_build.installing"],
    ["cli.yaml_text", "cli.voice"],
    ["cli.flags"],
    ["cli.commands", "cli.train", "cli.install_horovod"],
    ["cli"],
    ["__main__"],
    ["testing.plugin", "testing.threads", "testing.__main__", "testing.conformance.test_forward", "testing.conformance.test_changes", "testing.conformance.test_slips", "testing.conformance.test_collectives", "testing.conformance.test_master",
     "testing.conformance.test_replica", "testing.conformance.test_collective_details", "testing.conformance.test_lifecycle",
     "testing.conformance.test_stop", "testing.conformance.test_rooted", "testing.conformance.test_messages",
     "testing.conformance.test_local_rank_first", "testing.conformance.test_sync_batch_norm"],
]  # fmt: skip
PUBLIC_DOORS = {
    "",
    "data",
    "launch",
    "horovod_build",
    "training",
    "observe",
    "optim",
    "testing",
    "testing.conformance",
}  # no code of their own
HOME = {
    "horovod": {"backends.hvd", "horovod_build.trial"},
    "mpi4py": {"mpi.library", "mpi.dtypes", "mpi.operations", "mpi.messages", "mpi.group"},
}


def modules(package: Path) -> dict[str, Path]:
    found = {}
    for file in package.rglob("*.py"):
        parts = file.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(file: Path) -> list[str]:
    """What a file imports when it runs, inside functions too; imports for types alone are left out."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def violations(package: Path) -> list[str]:
    level = {name: height for height, names in enumerate(STAIRS) for name in names}
    known = modules(package)
    wrong = [f"{name} is on no stair" for name in known if name not in level and name not in PUBLIC_DOORS]
    for name, file in known.items():
        for target in imports(file):
            top = target.split(".")[0]
            if top in HOME and name not in HOME[top]:
                wrong.append(f"{name} imports {top}")
            if top != "hvdtrain" or name in PUBLIC_DOORS or name not in level:
                continue
            inner = target.removeprefix("hvdtrain").lstrip(".")
            module = inner if inner in level else inner.rpartition(".")[0]
            if module in level and level[module] > level[name]:
                wrong.append(f"{name} imports {module}, which stands above it")
    return wrong


def test_imports_flow_down_the_stairs():
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("module", "line", "message"),
    [
        ("backends/base.py", "from hvdtrain.training.trainer import Trainer", "backends.base imports training.trainer"),
        ("topology.py", "def f():\n    import hvdtrain.config", "topology imports config"),
        ("training/trainer.py", "import horovod.torch", "training.trainer imports horovod"),
        ("stray.py", "", "stray is on no stair"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, module, line, message):
    copied = tmp_path / "hvdtrain"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    with (copied / module).open("a") as file:
        file.write(f"\n{line}\n")
    assert any(message in wrong for wrong in violations(copied))


@pytest.mark.parametrize("name", ["torch", "horovod", "mpi4py", "utils", "helpers", "common", "misc", "manager"])
def test_no_module_has_a_name_that_shadows_or_says_nothing(name):
    assert not [module for module in modules(PACKAGE) if module.split(".")[-1] == name]


@pytest.mark.parametrize(
    "module", ["hvdtrain", "hvdtrain.config", "hvdtrain.topology", "hvdtrain.launch.detect", "hvdtrain.cli"]
)
def test_importing_does_not_load_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Imports flow down the stairs of docs/architecture.md, and an engine's name stays in its own file."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "hvdtrain"

# A module may import from its own stair and from those above it in this list.
STAIRS = [
    ["version", "errors", "horovod_modules"],
    ["topology", "memory", "file_lock", "folder_lock", "settings.wording", "settings.yaml_bounds"],
    ["settings.yaml_text"],
    ["settings.options", "settings.sync", "compression.base"],
    ["compression.quantized", "compression.sparse", "compression.low_rank", "compression.later"],
    ["settings.layers", "settings.horovod_config", "settings.components", "settings.compression", "settings.profiling"],
    ["compression.choosing"],
    ["settings.config", "settings.flags"],
    ["settings.record"],
    ["settings.resuming"],
    ["launch.hostlist", "launch.ancestry", "launch.environment", "launch.processes", "data.partition", "data.arrays", "data.samplers", "data.shards", "data.worker_signals", "data.worker_end", "data.nested", "data.sample_count", "data.random_numbers", "data.streams"],
    ["launch.launchers", "launch.leash", "launch.guard", "launch.stuck", "launch.algorithms", "launch.cores", "launch.listening", "data.shared_memory", "data.loader", "data.digits", "data.images", "data.downloads", "launch.once", "launch.machine"],
    ["launch.leftovers"],
    ["launch.starting", "launch.detect", "data.source", "data.portions"],
    ["data.reach"],
    ["data.rank_batches"],
    ["data.same_data"],
    ["data.stream_reading", "data.stream_place"],
    ["data.rank_stream"],
    ["launch.siblings", "ranks.frames", "ranks.records", "ranks.process_state", "ranks.describing", "ranks.addresses", "ranks.rendezvous_file"],
    ["ranks.store", "ranks.store_server"],
    ["ranks.engine_store", "ranks.torch_store"],
    ["ranks.last_words"],
    ["ranks.watch", "ranks.exit", "ranks.clocks"],
    ["ranks.everyone", "ranks.rendezvous"],
    ["ranks.arrival"],
    ["backends.traffic", "backends.laps", "backends.recommended"],
    ["backends.wire", "backends.layout", "backends.device", "backends.optimizer_guard", "backends.units", "backends.loss_scale", "backends.watched", "backends.backward_graph", "backends.exclusions"],
    ["backends.extremes", "backends.alike"],
    ["backends.keeper"],
    ["backends.forms", "backends.local_first"],
    ["backends.member"],
    ["backends.rooted"],
    ["backends.messages"],
    ["backends.communicator"],
    ["backends.group", "backends.lingering"],
    ["backends.agreement", "backends.ahead", "backends.weighting", "backends.sparse", "backends.reduce_dtype", "backends.unsent", "backends.coded", "backends.outer", "backends.worth"],
    ["backends.groups"],
    ["backends.rounds", "backends.grouped"],
    ["backends.fragments"],
    ["backends.common_weights"],
    ["backends.replica_options", "backends.slips", "backends.gradient_norm"],
    ["backends.replica"],
    ["backends.alone", "backends.hooked", "backends.apart"],
    ["backends.compressed", "backends.seldom"],
    ["backends.reducer", "backends.base", "backends.fully_sharded"],
    ["mpi.library", "mpi.lane", "mpi.dtypes", "mpi.naming"],
    ["mpi.operations", "mpi.staging"],
    ["mpi.agreement", "mpi.messages"],
    ["mpi.submitting"],
    ["mpi.group"],
    ["mpi.registration"],
    ["mpi"],
    ["backends.local", "backends.ddp"],
    ["backends.mpi"],
    ["backends.hvd.stamp"],
    ["backends.hvd.library", "backends.hvd.settings"],
    ["backends.hvd.waiting", "backends.hvd.pairs"],
    ["backends.hvd.wire", "backends.hvd.joining"],
    ["backends.hvd.replica"],
    ["backends.hvd.backend"],
    ["backends"],
    ["notebook", "parcels"],
    ["workers", "data.vision", "sync_batch_norm", "nn.partitioned"],
    ["nn.feature_partitioned_linear"],
    ["nn"],
    ["horovod.streams", "horovod.reductions", "horovod.process_sets", "horovod.compression", "horovod.scaling", "horovod.adasum", "horovod.packing", "horovod.halves"],
    ["horovod.requests", "horovod.passing_through"],
    ["horovod.ledger", "horovod.performing", "horovod.timeline"],
    ["horovod.surroundings"],
    ["horovod.inline"],
    ["horovod.controller", "horovod.channel"],
    ["horovod.channels", "horovod.packs", "horovod.hooks"],
    ["horovod.state"],
    ["horovod.handles", "horovod.features"],
    ["horovod.operations"],
    ["horovod.gradients", "horovod.functions", "horovod.exchange", "horovod.sync_batch_norm"],
    ["horovod.optimizer"],
    ["horovod.elastic.interrupts", "horovod.elastic.sampler", "horovod.importing", "horovod.tracing"],
    ["horovod.elastic.state"],
    ["horovod.elastic.running"],
    ["horovod.elastic"],
    ["horovod.running", "horovod.stand_in.horovod"],
    ["horovod"],
    ["data.named", "training.random_numbers", "training.plain_state", "training.plain_file", "observe.whole_file", "observe.quantities", "observe.log_lines", "observe.memory_use", "observe.surroundings"],
    ["training.checkpoint_files", "training.host_copy", "training.dry_run", "optim.master_weights"],
    ["training.descent", "training.mirror", "optim.pieces"],
    ["training.checkpoint", "observe.logger", "observe.console", "observe.run_folder", "optim.schedule", "optim.sharded", "training.precision", "training.models", "training.stopping", "training.interrupt", "training.same_call", "training.lone_sample", "training.activation_checkpointing"],
    ["observe.jsonl", "observe.trackers", "observe.progress", "observe.summary", "training.checkup", "training.task",
     "training.schedules", "training.metric_state", "training.metric_value", "training.inference", "training.outputs", "training.events"],
    ["training.async_checkpoints", "training.counting", "training.epoch_metrics", "training.prediction_store", "training.loop_options"],
    ["training.position", "training.loop_state", "training.evaluation", "training.predicting", "training.lesson"],
    ["training.resume", "training.compiling", "training.evaluator", "training.ledger", "training.callbacks.goal", "training.callbacks.weights"],
    ["training.parts"],
    ["training.fit_plan"],
    ["training.loop"],
    ["training.trainer", "tasks.byte_language_model", "training.callbacks.early_stopping", "training.callbacks.best_checkpoint", "training.callbacks.averaging"],
    ["exchange.content", "exchange.files"],
    ["exchange.dcp"],
    ["exchange.moving"],
    ["profiling.trace", "profiling.verdict"],
    ["profiling.recording"],
    ["profiling.profiler"],
    ["building.learned", "building.optimizing", "building.summing_up"],
    ["run"],
    ["horovod_build.failure", "horovod_build.trial"],
    ["horovod_build.private_folder"],
    ["horovod_build.edits", "horovod_build.running", "horovod_build.wishes", "horovod_build.wheels", "horovod_build.probe"],
    ["horovod_build.source", "horovod_build.nvidia", "horovod_build.plan"],
    ["horovod_build.compiling"],
    ["horovod_build.installing"],
    ["migrate.remarks", "migrate.source", "migrate.pattern", "migrate.layout"],
    ["migrate.calls", "migrate.steps", "migrate.imports", "migrate.reach"],
    ["migrate.wrapping"],
    ["migrate.shared_names"],
    ["migrate.own_loop"],
    ["migrate.migrating"],
    ["report.reading"],
    ["report.telling"],
    ["report.drawing", "report.page", "report.metrics"],
    ["report.pictures"],
    ["report.making", "bench.trial", "bench.spread", "bench.bandwidth", "bench.energy", "bench.forms", "bench.gathered"],
    ["bench.comparing", "bench.collectives", "bench.raw_mpi", "bench.plain_horovod", "bench.calls", "bench.fitting", "bench.step_models"],
    ["bench.collective_rank", "bench.pictures", "bench.step_rank", "bench.steps", "bench.scaling"],
    ["cli.voice"],
    ["cli.places"],
    ["doctor.rows", "doctor.telling"],
    ["doctor.asking"],
    ["verify.notes"],
    ["verify.watching", "verify.comparing"],
    ["verify.rank"],
    ["doctor.rank", "doctor.software", "doctor.message_passing", "doctor.machine", "doctor.launchers", "doctor.hosts"],
    ["cli.trials", "cli.bench_flags"],
    ["cli.bench_collectives", "cli.bench_step"],
    ["cli.commands", "cli.doctor", "cli.verify", "cli.report", "cli.bench", "cli.bench_engines", "cli.bench_scaling", "cli.train", "cli.guard", "cli.install_horovod", "cli.export", "cli.import_file", "cli.migrate"],
    ["cli"],
    ["horovod.__main__"],
    ["__main__"],
    ["testing.features", "testing.cutting"],
    ["testing.plugin", "testing.threads", "testing.__main__", "testing.conformance.test_collectives", "testing.conformance.test_groups", "testing.conformance.test_master",
     "testing.conformance.test_replica", "testing.conformance.test_collective_details", "testing.conformance.test_lifecycle",
     "testing.conformance.test_stop", "testing.conformance.test_beside", "testing.conformance.test_changes", "testing.conformance.test_checkpoints", "testing.conformance.test_forward",
     "testing.conformance.test_slips", "testing.conformance.test_sync_batch_norm", "testing.conformance.test_loader", "testing.conformance.test_rooted",
     "testing.conformance.test_messages", "testing.conformance.test_local_rank_first",
     "testing.conformance.test_whole_data", "testing.conformance.test_callbacks", "testing.conformance.test_ahead", "testing.conformance.test_streams", "testing.conformance.test_trainer", "testing.conformance.test_weights", "testing.conformance.test_weights_apart", "testing.conformance.test_several",
     "testing.conformance.test_partition", "testing.conformance.test_combinations", "testing.conformance.test_nn", "testing.conformance.test_activations", "testing.conformance.test_sharded", "testing.conformance.test_fully_sharded", "testing.conformance.test_sharded_runs", "testing.conformance.test_sharded_with", "testing.conformance.test_reduce_dtype", "testing.conformance.test_compression", "testing.conformance.test_traffic", "testing.conformance.test_sync", "testing.conformance.test_channels_last", "testing.conformance.test_optimizers", "testing.conformance.test_master_weights", "testing.conformance.test_odd_parameters", "testing.conformance.test_laps", "testing.conformance.test_profiling"],
    ["testing.conformance.test_sync_forms", "testing.conformance.test_sync_groups", "testing.conformance.test_sync_resumed", "testing.conformance.test_sync_programs"],
]  # fmt: skip
PUBLIC_DOORS = {
    "",
    "building",
    "data",
    "launch",
    "doctor",
    "verify",
    "migrate",
    "report",
    "bench",
    "profiling",
    "ranks",
    "backends.hvd",
    "horovod_build",
    "training",
    "training.callbacks",
    "exchange",
    "observe",
    "settings",
    "compression",
    "optim",
    "testing",
    "testing.conformance",
    "tasks",
}  # no code of their own
HOME = {
    "horovod": {"bench.plain_horovod", "backends.hvd.library", "backends.hvd.joining", "horovod_build.trial"},
    "mpi4py": {
        "bench.raw_mpi",
        "mpi.library",
        "mpi.dtypes",
        "mpi.agreement",
        "mpi.operations",
        "mpi.messages",
        "mpi.group",
        "mpi.submitting",
    },
}
ENVIRONMENT = {"launch.detect", "launch.environment", "memory", "run", "workers"}  # of what runs on ranks


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


def folder_cycles(package: Path) -> list[str]:
    """Pairs of folders that import each other, and longer rounds; a module outside all folders counts as one."""
    known = modules(package)
    needs: dict[str, dict[str, str]] = {}  # folder -> folder that it imports -> one import as the example
    for name, file in sorted(known.items()):
        if not name:
            continue
        for target in imports(file):
            inner = target.removeprefix("hvdtrain.")
            while inner and inner not in known:
                inner = inner.rpartition(".")[0]
            here, there = folder_of(name, known), folder_of(inner, known)
            if target.startswith("hvdtrain.") and inner and here != there:
                needs.setdefault(here, {}).setdefault(there, f"{name} imports {inner}")
    cycles = []
    for here in sorted(needs):
        for there in sorted(needs[here]):
            way_back = way(there, here, needs) if here < there else []
            if way_back:
                cycles.append(f"{here} and {there} import each other: " + "; ".join([needs[here][there], *way_back]))
    return cycles


def folder_of(module: str, known: dict[str, Path]) -> str:
    return module if known[module].name == "__init__.py" else module.rpartition(".")[0] or module


def way(start: str, end: str, needs: dict[str, dict[str, str]]) -> list[str]:
    """The shortest chain of imports that leads from one folder to another; [] if none does."""
    chains: dict[str, list[str]] = {start: []}
    queue = [start]
    for folder in queue:
        for following, example in needs.get(folder, {}).items():
            if following not in chains:
                chains[following] = [*chains[folder], example]
                queue.append(following)
    return chains.get(end, [])


def readers_of_the_environment(package: Path) -> set[str]:
    return {
        name
        for name, file in modules(package).items()
        if any(
            isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and ast.unparse(node.value) == "os"
            for node in ast.walk(ast.parse(file.read_text()))
        )
    }


def planted(tmp_path: Path, module: str, line: str) -> Path:
    copied = tmp_path / "hvdtrain"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    with (copied / module).open("a") as file:
        file.write(f"\n{line}\n")
    return copied


def test_imports_flow_down_the_stairs():
    assert violations(PACKAGE) == []


def test_no_two_folders_import_each_other():
    assert folder_cycles(PACKAGE) == []


@pytest.mark.parametrize(
    ("module", "line", "message"),
    [
        (
            "ranks/exit.py",
            "def f():\n    from hvdtrain.mpi import library",
            "mpi and ranks import each other: mpi.group imports ranks.watch; ranks.exit imports mpi.library",
        ),
        (
            "launch/stuck.py",
            "import hvdtrain.optim.schedule\nimport hvdtrain.backends.base",
            "backends and launch import each other",
        ),
        ("backends/base.py", "from hvdtrain.backends.hvd import wire", "backends and backends.hvd import each other"),
        ("errors.py", "from hvdtrain.observe import logger", "errors and observe import each other"),
    ],
)
def test_a_planted_circle_of_folders_is_found_and_named(tmp_path, module, line, message):
    assert any(message in cycle for cycle in folder_cycles(planted(tmp_path, module, line)))


def test_a_round_of_three_folders_is_found(tmp_path):
    package = tmp_path / "hvdtrain"
    for folder, line in {"a": "b.one", "b": "c.one", "c": "a.one"}.items():
        (package / folder).mkdir(parents=True)
        (package / folder / "one.py").write_text(f"import hvdtrain.{line}\n")
    assert (
        folder_cycles(package)[0]
        == "a and b import each other: a.one imports b.one; b.one imports c.one; c.one imports a.one"
    )


def test_launchers_variables_are_read_in_one_place(tmp_path):
    elsewhere = {
        name for name in readers_of_the_environment(PACKAGE) if not name.startswith(("cli", "doctor", "horovod_build"))
    }
    assert elsewhere <= ENVIRONMENT
    copied = planted(tmp_path, "backends/local.py", 'import os\nrank = os.environ["RANK"]')
    assert "backends.local" in readers_of_the_environment(copied)


@pytest.mark.parametrize(
    ("module", "line", "message"),
    [
        ("backends/base.py", "from hvdtrain.training.trainer import Trainer", "backends.base imports training.trainer"),
        ("topology.py", "def f():\n    import hvdtrain.settings.config", "topology imports settings.config"),
        ("training/trainer.py", "import horovod.torch", "training.trainer imports horovod"),
        ("stray.py", "", "stray is on no stair"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, module, line, message):
    assert any(message in wrong for wrong in violations(planted(tmp_path, module, line)))


@pytest.mark.parametrize("name", ["torch", "horovod", "mpi4py", "utils", "helpers", "common", "misc", "manager"])
def test_no_module_has_a_name_that_shadows_or_says_nothing(name):
    named = [module for module in modules(PACKAGE) if module.split(".")[-1] == name]
    assert named == (["horovod", "horovod.stand_in.horovod"] if name == "horovod" else [])  # ours, under that name


@pytest.mark.parametrize(
    "module", ["hvdtrain", "hvdtrain.settings.config", "hvdtrain.topology", "hvdtrain.launch.detect", "hvdtrain.cli"]
)
def test_importing_does_not_load_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_test_file_is_left_out_or_hides_another():
    tests = PACKAGE.parent / "tests"
    files = [file for file in tests.rglob("test_*.py") if not file.relative_to(tests).parts[0].startswith("ranks")]
    assert len({file.name for file in files}) == len(files)  # pytest imports them by name
    configured = (PACKAGE.parent / "pyproject.toml").read_text()
    left_out = ast.literal_eval(re.search(r"^norecursedirs = (\[.*\])", configured, re.M)[1])
    assert not {part for file in files for part in file.relative_to(tests).parts} & set(left_out)


def test_the_picture_shows_files_that_are_there():
    picture = (PACKAGE.parent / "docs" / "architecture.svg").read_text()
    named = [place for text in re.findall(r'class="w">([^<]+)<', picture) for place in text.split()]
    assert len(named) > 8
    assert [place for place in named if not (PACKAGE / place).exists()] == []

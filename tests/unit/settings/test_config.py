"""TrainConfig: defaults, what excludes what, and messages that name the flag."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hvdtrain.errors import BackendUnavailable, ConfigError
from hvdtrain.settings.config import BACKEND_GROUP, Component, HorovodConfig, TrainConfig
from hvdtrain.settings.layers import layer, merge, plain
from hvdtrain.settings.options import every_option_of


def test_the_defaults_are_the_digits_job() -> None:
    config = TrainConfig()
    assert (config.data, config.model, config.task) == (Component("digits"), Component("cnn"), None)
    assert (config.batch_size, config.global_batch_size) == (32, None)
    assert (config.backend, config.resume, config.run_dir) == ("auto", "auto", None)


def layered(*layers: dict[str, Any]) -> TrainConfig:
    return TrainConfig(**merge(TrainConfig, [layer(TrainConfig, values) for values in layers]))


def test_no_epochs_means_evaluation_whatever_a_file_says_of_warm_up() -> None:
    assert TrainConfig(epochs=0, warmup_epochs=5).epochs == 0


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().epochs = 3  # type: ignore[misc]


GROUPS = ("data", "model", "optimisation", "distributed", "horovod (backend horovod)", "run")


def test_every_field_has_help_a_group_and_a_default_to_show() -> None:
    for entry in every_option_of(TrainConfig):
        assert len(entry.help) > 10, entry.name
        assert entry.group in GROUPS, entry.name
        assert entry.default is not None or entry.default_text or entry.name == "global_batch_size", entry.name


def test_a_global_batch_size_leaves_the_batch_size_per_rank_open() -> None:
    config = TrainConfig(global_batch_size=60)
    assert (config.batch_size, config.global_batch_size) == (None, 60)


def test_a_task_leaves_model_and_data_open() -> None:
    config = TrainConfig(task=Component("mine.tasks:MyTask"))
    assert (config.model, config.data) == (None, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"global_batch_size": -4}, "--global-batch-size must be at least 1, got -4"),
        ({"batch_size": 8, "global_batch_size": 16}, "--batch-size 8 .* --global-batch-size 16 .* exclude each other"),
        ({"scale_lr": True, "global_batch_size": 16}, "--scale-lr and --global-batch-size exclude each other"),
        ({"task": "a.b:C", "model": "mlp"}, "--task a.b:C brings its own model, so --model mlp"),
        ({"task": "a.b:C", "data": "digits"}, "--task a.b:C brings its own data, so --data digits"),
        ({"task": "mytask"}, "--task does not know 'mytask'; It takes an import path such as package.module:Name"),
        ({"data": "minst"}, "--data does not know 'minst'; did you mean 'mnist'?"),
        ({"data": "fashion_mnist"}, "did you mean 'fashion-mnist'?"),
        ({"data": "imagefolder"}, "--data 'imagefolder' is incomplete; write imagefolder:DIR"),
        ({"data": "imagefoldr:/data/cats"}, "did you mean 'imagefolder'?"),
        ({"schedule": "cosin"}, "--schedule does not know 'cosin'; did you mean 'cosine'?"),
        (
            {"precision": "fp23"},
            "--precision must be one of fp32, tf32, fp64, bf16, bf16-pure, fp16, got 'fp23'; did you mean 'fp32'?",
        ),
        ({"device": "gpu"}, "--device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        ({"device": "cuda:x"}, "got 'cuda:x'; did you mean 'cuda"),
        ({"warmup_epochs": 6, "epochs": 5}, "--warmup-epochs 6 is more than --epochs 5"),
        (
            {"warmup_epochs": 1, "warmup_steps": 0},
            "--warmup-epochs 1 and --warmup-steps 0 exclude each other; give one",
        ),
        ({"warmup_steps": 6, "max_steps": 5}, "--warmup-steps 6 is more than --max-steps 5"),
        ({"warmup_steps": -1}, "--warmup-steps must be at least 0, got -1"),
        ({"epochs": -1}, "--epochs must be at least 0, got -1"),
        ({"last_batch": "drpo"}, "--last-batch must be one of keep, drop, merge, got 'drpo'; did you mean 'drop'?"),
        ({"data_parallel": True, "backend": "torch"}, "--data-parallel .* --backend torch is not; use --backend local"),
        ({"process_group": "nccl", "device": "cpu"}, "--process-group nccl needs GPUs, got --device cpu"),
        ({"process_group": "gloo", "backend": "local"}, "--process-group gloo is for --backend torch"),
        ({"on_nan": "skp"}, "--on-nan must be one of stop, skip, got 'skp'; did you mean 'skip'?"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"lr": 0}, "--lr must be more than 0"),
        ({"lr": float("nan")}, "--lr must be a finite number"),
        ({"timeout": 0}, "--timeout must be more than 0"),
        ({"reduce_dtype": "fp8"}, "--reduce-dtype must be one of auto, fp32, bf16, fp16, got 'fp8'"),
        ({"reduce_dtype": "bf16", "precision": "fp64"}, "--reduce-dtype bf16 and --precision fp64 exclude each other"),
        (
            {"reduce_dtype": "bf16", "horovod": HorovodConfig(compression="fp16")},
            "--reduce-dtype bf16 and --horovod.compression fp16 both say",
        ),
        (
            {"reduce_dtype": "bf16", "horovod": HorovodConfig(op="adasum")},
            "--horovod.op adasum does not go with --reduce-dtype bf16",
        ),
        ({"sync": "dilocco:5"}, "--sync must be one of every-step, .*, got 'dilocco:5'; did you mean 'diloco'?"),
        ({"sync": "diloco:5,dely=2"}, "--sync 'diloco:5,dely=2': delay=STEPS and .* may follow.*did you mean 'delay'?"),
        ({"sync": "diloco:5,delay=5"}, "sync's delay must be a whole number of steps from 0 and less than the 5"),
        ({"sync_group": "node"}, "--sync-group node says inside which groups .* give --sync or --compression too"),
        (
            {"sync_group": "nodes", "sync": "diloco:5"},
            "--sync-group must be none, node or a number of ranks .* 'nodes'",
        ),
        ({"sync": "diloco:0"}, "--sync 'diloco:0': give the steps between exchanges, diloco:100"),
        (
            {"sync": "diloco:5", "precision": "fp16", "compression": "bf16"},
            "--sync diloco:5 does not go with --compression bf16, --precision fp16",
        ),
        (
            {"sync": "local-sgd:2", "horovod": HorovodConfig(op="adasum")},
            "--sync local-sgd:2 does not go with --horovod.op adasum",
        ),
        ({"compression": "topc:0.1"}, "--compression must be one of int8, .*, got 'topc:0.1'; did you mean 'topk'?"),
        (
            {"compression": "int8,after=x"},
            "--compression 'int8,after=x': after=EXCHANGES may follow, a whole number from 1",
        ),
        ({"compression": "topk:2"}, "--compression topk needs the part of the numbers that is sent"),
        ({"compression": "int8", "reduce_dtype": "bf16"}, "--compression int8 and --reduce-dtype bf16 both say"),
        ({"compression": "bf16", "precision": "fp64"}, "--compression bf16 and --precision fp64 exclude each other"),
        (
            {"compression": "powersgd:2", "horovod": HorovodConfig(op="adasum", num_groups=2)},
            "--compression powersgd:2 does not go with --horovod.op adasum, --horovod.num-groups, which say",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_the_name_of_the_flag(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**values)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_devices_are_named_as_torch_names_them(device: str) -> None:
    assert TrainConfig(device=device).device == device


def test_an_unknown_backend_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(BackendUnavailable) as caught:
        TrainConfig(backend="hvod")
    expected = "--backend must be one of auto, local, torch, mpi, horovod, got 'hvod'; did you mean 'horovod'?"
    assert str(caught.value) == expected


def test_a_backend_that_another_package_registers_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pigeon_backend-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: pigeon-backend\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[{BACKEND_GROUP}]\npigeon = pigeon_backend:PigeonBackend\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert TrainConfig(backend="pigeon").backend == "pigeon"
    with pytest.raises(BackendUnavailable, match="did you mean 'pigeon'"):
        TrainConfig(backend="pigoen")


def test_plain_values_of_a_configuration_survive_json_and_make_an_equal_one() -> None:
    layers = [
        {"model": {"name": "torchvision.models.resnet18", "num_classes": 10}, "max-steps": "5", "timeout": "2m"},
        {"optimizer": "SGD", "global_batch_size": 60},
        {"optimizer": {"args": {"momentum": 0.9}}},
    ]
    config = layered(*layers)
    assert config.optimizer == Component("SGD", {"momentum": 0.9})
    assert (config.batch_size, config.global_batch_size, config.timeout) == (None, 60, 120.0)
    assert layered(json.loads(json.dumps(plain(config)))) == config


def test_a_mapping_of_defaults_gives_way_to_a_task_and_to_a_global_batch() -> None:
    config = layered(plain(TrainConfig()), {"task": "a.b:C", "global_batch_size": 60})
    assert (config.model, config.data, config.batch_size) == (None, None, None)


def test_importing_the_configuration_loads_neither_torch_nor_numpy_nor_yaml() -> None:
    code = "import sys, hvdtrain.settings.config; print(sorted({'torch', 'numpy', 'ruamel.yaml', 'importlib.metadata'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"

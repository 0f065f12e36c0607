"""Flags and --config files as one configuration; unknown flags; the help text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hvdtrain.errors import ConfigError
from hvdtrain.settings.config import Component, TrainConfig
from hvdtrain.settings.flags import UsageError, build, config_text, help_text, read_flags
from hvdtrain.settings.options import every_option_of, option, settle

# ruff: noqa: RUF009


def configured(*argv: str) -> TrainConfig:
    config: TrainConfig = build(TrainConfig, read_flags(TrainConfig, argv))
    return config


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--max-steps", "7"], {"max_steps": 7}),
        (["--max_steps", "7"], {"max_steps": 7}),
        (["--max-steps=7"], {"max_steps": 7}),
        (["--epochs", "3", "--epochs", "4"], {"epochs": 4}),
        (["--epochs", "0"], {"epochs": 0}),
        (["--warmup-steps", "9"], {"warmup_steps": 9, "warmup_epochs": 0.0}),
        (["--last-batch", "merge"], {"last_batch": "merge"}),
        (["--lr", "1e-2"], {"lr": 0.01}),
        (["--clip-norm", "none"], {"clip_norm": None}),
        (["--timeout", "5m"], {"timeout": 300.0}),
        (["--deterministic"], {"deterministic": True}),
        (["--no-download"], {"download": False}),
        (["--no_download"], {"download": False}),
        (["--download=false"], {"download": False}),
        (["--deterministic", "--no-deterministic"], {"deterministic": False}),
        (["--global-batch-size", "60"], {"global_batch_size": 60, "batch_size": None}),
        (["--data", "imagefolder:/a/b=c"], {"data": Component("imagefolder:/a/b=c")}),
        (["--task", "mine.tasks:T", "--task.size", "3"], {"task": Component("mine.tasks:T", {"size": 3})}),
        (["--model.hidden", "[64, 32]"], {"model": Component("cnn", {"hidden": [64, 32]})}),
        (["--data.name", "x", "--data.noise=1e-2"], {"data": Component("digits", {"name": "x", "noise": 0.01})}),
        (
            ["--optimizer.weight-decay", "0.01", "--optimizer", "SGD", "--optimizer.dampening", "-1"],
            {"optimizer": Component("SGD", {"weight_decay": 0.01, "dampening": -1})},
        ),
        (
            ["--model", "torchvision.models.resnet18", "--model.num_classes", "10"],
            {"model": Component("torchvision.models.resnet18", {"num_classes": 10})},
        ),
    ],
)
def test_flags_set_the_fields_of_their_names(argv: list[str], expected: dict[str, Any]) -> None:
    config = configured(*argv)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-stps", "7"], "unknown flag '--max-stps'; did you mean '--max-steps'?"),
        (["--max_stps=7"], "unknown flag '--max_stps'; did you mean '--max-steps'?"),
        (["-epochs", "7"], "unknown flag '-epochs'; did you mean '--epochs'?"),
        (["--no-determinstic"], "unknown flag '--no-determinstic'; did you mean '--no-deterministic'?"),
        (["--confg", "a"], "unknown flag '--confg'; did you mean '--config'?"),
        (["--modle.num_classes", "7"], "unknown flag '--modle.num_classes'; did you mean '--model.num-classes'?"),
        (["--zzzzzzz"], "unknown flag '--zzzzzzz'; --help lists the flags"),
        (["--"], "unknown flag '--'; --help lists the flags"),
        (["-"], "unknown flag '-'; --help lists the flags"),
        (["--epochs.x", "7"], "unknown flag '--epochs.x'; did you mean '--epochs'?"),
        (["--epochs"], "--epochs needs a value"),
        (["--epochs", "--lr", "1"], "--epochs needs a value"),
        (["--model.width"], "--model.width needs a value"),
        (["--model.width", "[1"], "--model.width: cannot read '[1'"),
        (["--config"], "--config needs a value"),
        (["--deterministic", "true"], "--deterministic takes no value, got 'true'; write --deterministic or --no-det"),
        (["--epochs", "3", "4"], "unexpected argument '4'; every setting is a flag with two dashes (--epochs 3)"),
        (["--lr", "-1e-3"], "--lr must be more than 0, got -0.001"),
        (["--lr", ""], "--lr must be a number, got ''"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--batch-size", "8", "--global-batch-size", "8"], "--batch-size 8 (per rank) and --global-batch-size 8"),
        (["--task.size", "3"], "--task.size needs --task PATH as well"),
        (["--model", ""], "--model needs a name"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        configured(*argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_switches_are_told_apart_from_settings() -> None:
    flags = read_flags(TrainConfig, ["-h", "--version", "--print_config", "--epochs", "3"])
    assert flags.switches == {"help", "version", "print_config"}
    assert flags.values == {"epochs": "3"}


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_flags_win_over_files_wherever_they_stand_and_later_files_over_earlier(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "epochs: 3\nmax-steps: 5\nlr: 1e-3\nmodel: {name: mlp, hidden: 8}\n")
    second = write(tmp_path, "b.yaml", "epochs: 4\nmodel:\n  hidden: 16\n  depth: 2\n")
    config = configured("--lr", "2", "--config", first, f"--config={second}", "--model.depth", "3")
    assert (config.epochs, config.max_steps, config.lr) == (4, 5, 2.0)
    assert config.model == Component("mlp", {"hidden": 16, "depth": 3})


def test_a_flag_replaces_the_setting_of_a_file_that_it_excludes(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "batch_size: 16\nmodel: mlp\n")
    config = configured("--global-batch-size", "60", "--task", "a.b:C", "--config", file)
    assert (config.batch_size, config.global_batch_size, config.model) == (None, 60, None)
    assert configured("--config", write(tmp_path, "b.yaml", "task: a.b:C\n"), "--task", "none").task is None


def test_warm_up_in_steps_and_in_epochs_replace_each_other(tmp_path: Path) -> None:
    epochs = write(tmp_path, "a.yaml", config_text(configured("--warmup-epochs", "2")))
    config = configured("--config", epochs, "--warmup-steps", "7")
    assert (config.warmup_epochs, config.warmup_steps) == (0.0, 7)
    steps = write(tmp_path, "b.yaml", config_text(config))
    config = configured("--config", steps, "--warmup-epochs", "1")
    assert (config.warmup_epochs, config.warmup_steps) == (1.0, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_stps: 3\n", "a.yaml: unknown key 'max_stps'; did you mean 'max_steps'?"),
        ("batch_size: 0\n", "a.yaml: --batch-size must be at least 1, got 0"),
        ("precision: fp23\n", "a.yaml: --precision must be one of fp32, tf32, fp64, bf16, bf16-pure, fp16, got 'fp23'"),
        ("data: minst\n", "a.yaml: --data does not know 'minst'; did you mean 'mnist'?"),
        ("deterministic: yes\n", "a.yaml: --deterministic must be true or false, got 'yes'"),
        ("1: 2\n", "a.yaml: unknown key '1'"),
        ("? [a]\n: 1\n", "a.yaml: unknown key"),
        ("model: {name: mlp, [a]: 1}\n", "a.yaml: --model: ('a',) cannot be the name of an argument"),
        ("warmup_steps: 3\nwarmup_epochs: 1\n", "--warmup-epochs 1 and --warmup-steps 3 exclude each other"),
        ("epochs: null\n", "a.yaml: --epochs needs a value"),
    ],
)
def test_a_wrong_file_is_refused_by_its_name_and_is_no_usage_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured("--config", write(tmp_path, "a.yaml", text))
    assert message in str(caught.value)
    assert not isinstance(caught.value, UsageError)


def test_what_a_file_and_a_flag_make_wrong_together_is_no_usage_error(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "data_parallel: true\n")
    with pytest.raises(ConfigError, match="--data-parallel is one process") as caught:
        configured("--config", file, "--backend", "torch")
    assert not isinstance(caught.value, UsageError)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--global-batch-size", "60", "--lr", "1e-5", "--deterministic", "--clip-norm", "0.5", "--timeout", "90s"],
        ["--task", "mine.tasks:T", "--task.args", "1e-3x", "--task.name", "'1e3'", "--task.options", "{a: [1, no]}"],
        ["--model.name", "resnet18", "--run-dir", "10", "--data", "imagefolder:/a b/#c", "--schedule.step-size", "1"],
    ],
)
def test_the_printed_configuration_can_be_fed_back(tmp_path: Path, argv: list[str]) -> None:
    config = configured(*argv)
    file = write(tmp_path, "a.yaml", config_text(config))
    again = configured("--config", file)
    assert again == config
    assert config_text(again) == config_text(config)


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    cycle_time_ms: float = option(1.0, "time between two exchanges, in ms", metavar="MS", at_least=0)
    autotune: bool = option(False, "tune by itself")

    def __post_init__(self) -> None:
        settle(self, "engine")


@dataclass(frozen=True, kw_only=True, slots=True)
class WithSection:
    steps: int = option(3, "steps", group="run", metavar="N")
    engine: Engine = option(Engine(), "engine")

    def __post_init__(self) -> None:
        settle(self)


def test_a_section_has_flags_a_mapping_and_a_heading_of_its_own(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "engine: {cycle-time-ms: 4}\n")
    argv = ["--config", file, "--engine.autotune", "--steps", "4"]
    config = build(WithSection, read_flags(WithSection, argv))
    assert config == WithSection(steps=4, engine=Engine(cycle_time_ms=4.0, autotune=True))
    again = build(WithSection, read_flags(WithSection, ["--config", write(tmp_path, "b.yaml", config_text(config))]))
    assert again == config
    off = read_flags(WithSection, [*argv, "--engine.no-autotune"])
    assert build(WithSection, off).engine.autotune is False
    with pytest.raises(UsageError, match=r"'--engine.cycle-tim'; did you mean '--engine.cycle-time-ms'"):
        read_flags(WithSection, ["--engine.cycle-tim", "3"])
    text = help_text(WithSection, usage="x", intro="y", epilog="z")
    assert "\nengine:\n  --engine.cycle-time-ms MS\n" in text
    assert "--engine.[no-]autotune" in text


@pytest.mark.parametrize("width", [80, 100])
def test_the_help_shows_every_flag_in_its_group_within_the_width(width: int) -> None:
    text = help_text(TrainConfig, usage="x", intro="y", epilog="z", width=width)
    assert max(map(len, text.splitlines())) <= width
    headings = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["general", "data", "model", "optimisation", "distributed", "horovod (backend horovod)", "run"]
    flags = every_option_of(TrainConfig)
    for entry in flags:
        *section, name = entry.flag[2:].split(".")
        shown = ".".join([*section, f"[no-]{name}" if entry.kind is bool else name])
        assert f"\n  --{shown}" in text
    assert " ".join(text.split()).count("(default:") == len(flags)


def test_the_printed_configuration_is_one_key_a_line_under_headings() -> None:
    lines = config_text(configured("--model", "mlp", "--model.hidden", "[8, 4]", "--lr", "1e-5")).splitlines()
    assert "# optimisation" in lines
    assert "model: {name: mlp, hidden: [8, 4]}" in lines
    assert "data: digits" in lines
    assert "lr: 1e-05" in lines
    assert "clip_norm: null" in lines
    assert "deterministic: false" in lines

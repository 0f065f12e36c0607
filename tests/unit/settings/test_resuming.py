"""What a resumed run takes from where: one table, complete, shown in the documentation, and what is said of a difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hvdtrain.errors import CheckpointError
from hvdtrain.settings.config import Component, HorovodConfig, TrainConfig
from hvdtrain.settings.options import every_option_of, options_of
from hvdtrain.settings.resuming import FREE, RULES, SAME, TAKEN, compare, recorded, rule_of, table

DOCS = Path(__file__).parents[3] / "docs" / "checkpoints.md"
PACED = Component("torch.optim.lr_scheduler.StepLR", {"step_size": 3})

# Before, now, and what is said: None for nothing, "!" and a pattern for a refusal.
CASES: list[tuple[dict[str, Any], dict[str, Any], str | None]] = [
    ({}, {}, None),
    ({}, {"epochs": 20}, "--epochs 20 (10 there)"),
    ({}, {"lr": 0.1}, "--lr 0.1 (0.002 there)"),
    ({}, {"schedule": "linear"}, "--schedule linear (cosine there)"),
    ({}, {"schedule": {"name": "cosine", "final": 0.1}}, "--schedule {name: cosine, final: 0.1} (cosine there)"),
    ({}, {"batch_size": 16}, "--batch-size 16 (32 there)"),
    ({}, {"global_batch_size": 64}, "--batch-size null (32 there); --global-batch-size 64 (null there)"),
    ({}, {"seed": 7}, "--seed 7 (0 there)"),
    ({}, {"precision": "bf16"}, "--precision bf16 (fp32 there)"),
    ({}, {"backend": "mpi"}, "--backend mpi (auto there)"),
    ({"backend": "horovod"}, {"backend": "horovod", "horovod": HorovodConfig(op="adasum")}, "--horovod.op adasum"),
    ({}, {"model": "mlp"}, "--model mlp (cnn there)"),
    ({}, {"max_steps": 3, "clip_norm": 1.0}, "--max-steps 3 (null there); --clip-norm 1.0 (null there)"),
    ({}, {"keep": 9, "log_every": 3, "timeout": 5, "run_dir": "x", "resume": "x", "data_dir": "x"}, None),
    ({}, {"optimizer": "SGD"}, "!--optimizer AdamW, and this run has SGD"),
    ({}, {"optimizer": {"name": "AdamW", "weight_decay": 0.1}}, "!--optimizer AdamW, and .* weight_decay: 0.1"),
    ({}, {"optimizer": "torch.optim.AdamW"}, None),
    ({"schedule": PACED}, {"schedule": PACED}, None),
    ({"schedule": PACED}, {"schedule": "torch.optim.lr_scheduler:StepLR", "epochs": 9}, "!--schedule"),
    ({"schedule": PACED}, {"schedule": PACED, "lr": 0.1}, "!--lr 0.002, and this run has 0.1: the schedule .*StepLR goes on"),
    ({"schedule": PACED}, {"schedule": "constant"}, "!--schedule .*StepLR.*constant: a run that goes on cannot change it"),
    ({}, {"schedule": PACED}, "!--schedule cosine"),
]  # fmt: skip


def configured(values: dict[str, Any]) -> TrainConfig:
    return TrainConfig(**values)


@pytest.mark.parametrize(("before", "now", "said"), CASES, ids=str)
def test_each_difference_is_said_or_refused(before: dict[str, Any], now: dict[str, Any], said: str | None) -> None:
    written = recorded(configured(before), 2)
    if said is not None and said.startswith("!"):
        with pytest.raises(CheckpointError, match=rf"^step-7 was written with .*{said[1:]}.* or --resume never"):
            compare(written, configured(now), 2, "step-7")
        return
    text = compare(written, configured(now), 2, "step-7")
    assert (said or "") in text
    assert bool(text) == bool(said)


def test_another_number_of_ranks_is_said() -> None:
    assert "3 ranks (2 there)" in compare(recorded(TrainConfig(), 2), TrainConfig(), 3, "step-7")


def test_a_checkpoint_that_knows_no_settings_or_fewer_is_compared_as_far_as_it_goes() -> None:
    assert compare({}, TrainConfig(epochs=3), 2, "step-7") == ""
    assert compare({"epochs": 10, "gone": 1}, TrainConfig(epochs=3), 2, "x").count("there") == 1


def test_every_setting_has_a_rule_and_every_rule_a_setting() -> None:
    assert {entry.name for entry in options_of(TrainConfig)} == {*RULES} - {"ranks"}
    assert all(rule_of(entry.name).source in (TAKEN, SAME, FREE) for entry in every_option_of(TrainConfig))


def test_the_documentation_shows_the_table() -> None:
    flags = {entry.name: entry.flag + (".*" if entry.is_section else "") for entry in options_of(TrainConfig)}
    assert table(flags) in DOCS.read_text()

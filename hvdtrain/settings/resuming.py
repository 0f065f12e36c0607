"""What a resumed run takes from its checkpoint and what from the command line: one table, and what is said of a difference."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hvdtrain.errors import CheckpointError
from hvdtrain.settings.layers import plain
from hvdtrain.settings.options import every_option_of, is_import_path
from hvdtrain.settings.record import shown, value_of

TAKEN, SAME, FREE = "command line, said", "must be the same", "command line"
_RANKS = "ranks"


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of a setting when a run is resumed.

    Attributes:
        source: `TAKEN`: as the command line says now, and a difference from the checkpoint's is said. `SAME`: a difference is
            refused. `FREE`: as the command line says, without a word, because it does not change what is trained.
        note: What else there is to know.
    """

    source: str
    note: str = ""


_FITS = "its parameters' names, shapes and types must be the checkpoint's"
_POSITION = "in the middle of an epoch the checkpoint must lie between two global batches"
_SHAPE = "a schedule by import path goes on as it was made"
_RATE = "where --schedule is built in; with one by import path a difference is refused"

RULES: dict[str, Rule] = {
    _RANKS: Rule(TAKEN, "on another number each rank's random numbers begin anew"),
    "data": Rule(TAKEN, "the position in it goes on, counted in samples"),
    "data_dir": Rule(FREE),
    "download": Rule(FREE),
    "batch_size": Rule(TAKEN, _POSITION),
    "global_batch_size": Rule(TAKEN, _POSITION),
    "eval_batch_size": Rule(FREE),
    "last_batch": Rule(TAKEN, _POSITION),
    "partition": Rule(
        TAKEN, "in the middle of an epoch it must be the same, and but for batch the number of ranks too"
    ),
    "workers": Rule(TAKEN),
    "task": Rule(TAKEN, _FITS),
    "model": Rule(TAKEN, _FITS),
    "epochs": Rule(TAKEN, f"shapes the built-in schedules; {_SHAPE}"),
    "max_steps": Rule(TAKEN, f"shapes the built-in schedules; {_SHAPE}"),
    "optimizer": Rule(SAME, "its state goes on, and its arguments (momentum, weight decay and so on) with it"),
    "lr": Rule(TAKEN, _RATE),
    "scale_lr": Rule(TAKEN, _RATE),
    "warmup_epochs": Rule(TAKEN),
    "warmup_steps": Rule(TAKEN),
    "schedule": Rule(TAKEN, "among the built-in ones, at the step where it was; one by import path must be the same"),
    "accumulate": Rule(TAKEN, _POSITION),
    "clip_norm": Rule(TAKEN),
    "label_smoothing": Rule(TAKEN),
    "precision": Rule(TAKEN, "fp64, bf16-pure and the others do not read each other's; a gradient scaler goes on"),
    "channels_last": Rule(TAKEN),
    "shard_optimizer": Rule(FREE),
    "shard_modules": Rule(FREE),
    "compile": Rule(TAKEN),
    "checkpoint_modules": Rule(FREE),
    "checkpoint_policy": Rule(FREE),
    "backend": Rule(TAKEN),
    "device": Rule(TAKEN),
    "data_parallel": Rule(TAKEN),
    "process_group": Rule(TAKEN),
    "find_unused_parameters": Rule(TAKEN),
    "static_graph": Rule(TAKEN),
    "bucket_mb": Rule(TAKEN),
    "reduce_dtype": Rule(TAKEN),
    "compression": Rule(
        TAKEN,
        "what was not sent yet goes on, also with another one and on other ranks; without one, and between gradients and --sync, it is lost",
    ),
    "sync": Rule(TAKEN, "with another one, or on other ranks, all go on from the ranks' average"),
    "sync_group": Rule(
        TAKEN,
        "with other groups, all go on from the ranks' average; what was not sent yet goes to the ranks that speak for them",
    ),
    "all_reduce": Rule(TAKEN),
    "sync_batch_norm": Rule(TAKEN),
    "horovod": Rule(TAKEN),
    "timeout": Rule(FREE),
    "run_dir": Rule(FREE),
    "resume": Rule(FREE),
    "checkpoint_every": Rule(FREE),
    "checkpoint_minutes": Rule(FREE),
    "checkpoint_async": Rule(FREE),
    "checkpoint_url": Rule(FREE),
    "keep": Rule(FREE),
    "eval_every": Rule(TAKEN),
    "logger": Rule(FREE),
    "log_every": Rule(FREE),
    "profile": Rule(FREE),
    "seed": Rule(TAKEN, "for the order of the samples; random numbers go on as they were"),
    "deterministic": Rule(TAKEN),
    "on_nan": Rule(TAKEN),
}
"""Of each setting, `horovod.*` together."""


def rule_of(name: str) -> Rule:
    """A setting's rule; sections share one."""
    return RULES.get(name) or RULES[name.partition(".")[0]]


def recorded(config: Any, ranks: int) -> dict[str, Any]:
    """What a checkpoint remembers of what its run was told."""
    values: dict[str, Any] = _finite(json.loads(json.dumps({**plain(config), _RANKS: ranks}, default=str)))
    return values


def compare(before: Mapping[str, Any], config: Any, ranks: int, where: str) -> str:
    """How a run that goes on differs from the one that wrote the checkpoint.

    Args:
        before: What `recorded` returned then; empty if nothing is known.
        config: The configuration now.
        ranks: Their number now.
        where: How messages name the checkpoint.

    Returns:
        A sentence; "" if nothing worth saying differs.

    Raises:
        CheckpointError: Something differs that cannot be changed on the way.
    """
    if not before:
        return ""
    now = recorded(config, ranks)
    differences = []
    if _RANKS in before and before[_RANKS] != ranks:
        differences.append(f"{ranks} ranks ({before[_RANKS]} there)")
    own_pace = is_import_path(str(_component(now["schedule"])[0]))
    for entry in every_option_of(type(config)):
        rule = rule_of(entry.name)
        try:
            old = value_of(dict(before), entry.name)
        except (KeyError, TypeError):  # a setting that the writer did not have
            continue
        new = value_of(now, entry.name)
        if rule.source == FREE or old == new:
            continue
        if entry.name in ("optimizer", "schedule") and _component(old) == _component(new):
            continue
        both_built_in = not own_pace and not is_import_path(str(_component(old)[0]))
        if rule.source == SAME or (entry.name == "schedule" and not both_built_in):
            raise CheckpointError(
                f"{where} was written with {entry.flag} {shown(old)}, and this run has {shown(new)}: a run that goes on cannot "
                f"change it. Give {entry.flag} as it was, or --resume never"
            )
        if entry.name in ("lr", "scale_lr") and own_pace:
            raise CheckpointError(
                f"{where} was written with {entry.flag} {shown(old)}, and this run has {shown(new)}: the schedule "
                f"{_component(now['schedule'])[0]} goes on with the learning rates that it had. Give {entry.flag} as it was, or "
                "--resume never"
            )
        differences.append(f"{entry.flag} {shown(new)} ({shown(old)} there)")
    if not differences:
        return ""
    return (
        f"this run goes on with other settings than {where} was written with: {'; '.join(differences)}. config.yaml stays as "
        "the run began"
    )


def table(flags: Mapping[str, str]) -> str:
    """The rules as Markdown.

    Args:
        flags: How each setting is written.
    """
    lines = ["| setting | from | |", "|---|---|---|"]
    grouped: dict[Rule, list[str]] = {}
    for name, rule in RULES.items():
        grouped.setdefault(rule, []).append(flags.get(name, name))
    for rule, names in grouped.items():
        lines.append(
            f"| {', '.join(f'`{name}`' if name.startswith('-') else name for name in names)} | {rule.source} | {rule.note} |"
        )
    return "\n".join(lines)


def _component(value: Any) -> tuple[str, dict[str, Any]]:
    """A component's name, short for what torch.optim itself has, and its arguments."""
    if isinstance(value, Mapping):
        args = {key: content for key, content in value.items() if key != "name"}
        name = str(value.get("name"))
    else:
        name, args = str(value), {}
    short = name.removeprefix("torch.optim").lstrip(".:")
    name = short if short.isidentifier() else name  # AdamW is torch.optim.AdamW
    return name, args


def _finite(value: Any) -> Any:
    """JSON proper has no infinities."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

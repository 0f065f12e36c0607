"""What an engine was seen to do: the features that conformance tests stand for, and the table that is made of runs of them.

::

    torchrun --nproc-per-node 3 -m hvdtrain.testing --backend torch --record torch_3.json
    python -m hvdtrain.testing.features *.json > docs/compatibility.md
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from hvdtrain.backends.exclusions import EXCLUSIONS

FEATURES = {
    "collectives": "Collectives of every dtype and shape, groups, messages between ranks ([collectives](collectives.md))",
    "forward": "The model called in any way: itself, its parts and methods, several times a step",
    "changing parameters": "Parameters frozen, unfrozen, added and removed while it trains",
    "odd parameters": "Tied, complex, 0-dimensional, non-contiguous, lazy, parametrized and frozen parameters, buffers of any type",
    "accumulation": "Micro-batches, uneven ranks, ranks without samples: the gradient is the mean over the global batch",
    "weights": "Losses that are means over tokens or weights, or sums",
    "several": "Several models, optimizers and losses in a loop of your own",
    "slips": "What would let ranks drift apart in a loop of your own is refused",
    "batch normalisation": "Batch normalisation over all ranks",
    "loader": "Data sets and DataLoaders, cut by step",
    "partition": "Data sets cut once, so that each rank reads its own part (`--partition`)",
    "streams": "Streams: iterable data, shards, of unequal lengths",
    "trainer": "The Trainer: random numbers, evaluation, schedules, refusals",
    "whole data": "Metrics that are no means (torchmetrics), predictions in order",
    "callbacks": "Callbacks: early stopping, best checkpoint, averaged weights",
    "checkpoints": "Checkpoints, resumed bit for bit",
    "compile": "`torch.compile` (`--compile`)",
    "activation checkpointing": "Activation checkpointing (`--checkpoint-modules`)",
    "sharded optimizer": "The optimizer's state cut over the ranks, ZeRO-1 (`--shard-optimizer`)",
    "precision": "Precisions, float32 masters, the type in which gradients travel, channels last, fused optimizers, clipping",
    "compression": "Compressed gradients: int8, fp8, 1-bit, top-k, random-k, PowerSGD (`--compression`)",
    "traffic": "Bytes that each rank sends, counted",
    "sync": "Weights exchanged every so many steps: local SGD, DiLoCo (`--sync`)",
    "sharded model": "Parameters, gradients and state cut over the ranks, FSDP2 (`--shard-modules`)",
    "wide layers": "Layers cut by feature over the ranks (`hvdtrain.nn`)",
    "combinations": "Every two of the above options together",
}
"""Features by the name that tests give in their ``feature`` mark; as the table shows them."""

ENGINES = ("local", "torch", "mpi", "horovod")
_BEGIN, _END = "<!-- made by hvdtrain.testing.features -->", "<!-- end -->"


@dataclass(kw_only=True, slots=True)
class Record:
    """One run of the suite, all of which passed.

    Attributes:
        backend: Its name.
        world_size: Number of ranks.
        device: "cpu" or "cuda".
        versions: Of what it ran on.
        passed: How many tests passed of each feature.
        refused: Features that this engine refuses, each with the reason.
    """

    backend: str
    world_size: int
    device: str
    versions: dict[str, str] = field(
        default_factory=lambda: {"Python": platform.python_version(), "PyTorch": torch.__version__.partition("+")[0]}
    )
    passed: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def count(self, feature: str, refused_by: Mapping[str, str]) -> None:
        """Note that a test of a feature passed; ``refused_by`` has the engines where it showed a refusal, with reasons."""
        if self.backend in refused_by:
            self.refused[feature] = refused_by[self.backend]
        else:
            self.passed[feature] = self.passed.get(feature, 0) + 1

    def write(self, file: Path) -> None:
        """Write it as JSON."""
        file.write_text(json.dumps(asdict(self), indent=1))

    @staticmethod
    def read(file: Path) -> Record:
        """Read what `write` wrote."""
        return Record(**json.loads(file.read_text()))

    def cell(self, feature: str) -> str:
        """What the table says of a feature on this engine."""
        if feature in self.passed:
            return "yes"
        return "refused" if feature in self.refused else ""


def table(records: Iterable[Record]) -> str:
    """The table of features and engines, in Markdown: a cell says yes if its tests passed in all of the runs."""
    by_engine = {name: [record for record in records if record.backend == name] for name in ENGINES}
    lines = [f"| | {' | '.join(f'`{name}`' for name in ENGINES)} |", "|---|" + "---|" * len(ENGINES)]
    notes: list[str] = []
    for feature, title in FEATURES.items():
        cells = []
        for runs in by_engine.values():
            said = {run.cell(feature) for run in runs if run.world_size > 1 or run.backend == "local"}
            (cell,) = said if len(said) == 1 else {""}
            reason = next((run.refused[feature] for run in runs if cell == "refused"), "")
            if reason and reason not in notes:
                notes.append(reason)
            cells.append(f"refused ({notes.index(reason) + 1})" if reason else cell)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", *(f"({number}) {reason}" for number, reason in enumerate(notes, 1))]
    return "\n".join(lines).rstrip()


def exclusions() -> str:
    """What does not go together, in Markdown."""
    return "\n".join(f"- {row.sentence}." for row in EXCLUSIONS)


def page(records: list[Record]) -> str:
    """The page of documentation that the runs make."""
    runs: dict[str, set[int]] = {}
    versions = {f"{name} {version}" for record in records for name, version in record.versions.items()}
    devices = {record.device for record in records}
    for record in records:
        runs.setdefault(record.backend, set()).add(record.world_size)
    sizes = "; ".join(
        f"`{name}` at {', '.join(map(str, sorted(runs[name])))} rank{'s' if runs[name] != {1} else ''}"
        for name in ENGINES
        if name in runs
    )
    return f"""# Compatibility

What each engine was seen to do: made out of runs of the conformance suite by `python -m hvdtrain.testing.features`, and not
written by hand. A cell says *yes* where every test of the row passed in every run, most of them against one process with the
whole batch in float64. The runs: {sizes}; on {" and ".join(sorted(devices))}; {", ".join(sorted(versions))}.

{_BEGIN}
{table(records)}
{_END}

## What does not go together

It is refused before the first step, on every engine and at every number of ranks, by these sentences.

{exclusions()}
"""


def table_in(text: str) -> str:
    """The table that stands in a page."""
    return text.partition(_BEGIN)[2].partition(_END)[0].strip()


def cells_in(text: str, engine: str) -> dict[str, str]:
    """What a page's table says of each feature on one engine: "yes", "refused" or ""."""
    titles = {title: feature for feature, title in FEATURES.items()}
    found = {}
    for line in table_in(text).splitlines()[2:]:
        title, *cells = (cell.strip() for cell in line.strip().strip("|").split(" | "))
        if title in titles:
            found[titles[title]] = cells[ENGINES.index(engine)].partition(" ")[0]
    return found


if __name__ == "__main__":
    sys.stdout.write(page([Record.read(Path(name)) for name in sys.argv[1:]]))

"""What benchmarks that launch their own workers share; engines, steps and collectives are measured by ``hvdtrain bench``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hvdtrain.bench.step_models import model_and_batch
from hvdtrain.cli.trials import environment
from hvdtrain.doctor.asking import ask
from hvdtrain.launch.starting import starters, surroundings

BATCH = {"mlp": 16, "resnet18": 8, "small": 16, "many": 4}
_LIMIT_S = 600.0


def model_of(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, and the batch of a step."""
    return model_and_batch(name, BATCH[name], image_size=64, rank=0)


def run_once(file: str, arguments: list[str], ranks: int, *, launcher: str) -> str:
    """Run a benchmark's workers to their end, under a launcher: torchrun, mpirun, "horovodrun --gloo".

    Returns:
        "", or what was said if they failed.
    """
    found = [each for each in starters(gloo=True, mpi=True) if each.name == launcher]
    if not found:
        return f"{launcher} is not here"
    command = found[0].command(ranks, [file, *arguments])
    answer = ask(command, limit_s=_LIMIT_S, environment=surroundings(os.environ))
    return "\n".join([answer.how, *answer.lines[-12:]]) if answer.code else ""


def missing(engine: str) -> str:
    """Why an engine cannot be measured here; "" if it can."""
    for prefix, module in (("horovod", "horovod"), ("mpi", "mpi4py")):
        if engine.startswith(prefix) and importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    return ""


def report(benchmark: str, args: argparse.Namespace, tried: list[str], results: dict[str, Any]) -> None:
    """Print what came out as one JSON object, and write it where ``--out`` says."""
    whole = {
        "benchmark": benchmark,
        "world_size": args.ranks,
        **environment(),
        "not_installed": [engine for engine in tried if missing(engine)],
        "results": results,
    }
    if args.out:
        Path(args.out).write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps(whole))

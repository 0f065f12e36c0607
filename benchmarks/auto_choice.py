"""How often --backend auto:RUN takes the right engine: one short hvdtrain bench engines, then a longer one that judges it, again and again.

python benchmarks/auto_choice.py
python benchmarks/auto_choice.py --repetitions 2 --steps 40 --judging-steps 120 -- --task my_module:MyTask

In each repetition a record is made by ``hvdtrain bench engines`` as a user would, in few rounds; the engine is read from it as
``--backend auto:`` reads it. Then all engines are measured again, in turns, in more and longer rounds: the choice is right if it was
the fastest of these, or at most 5 % slower than the fastest. All engines are started by mpirun, so that one command could follow the
record. Nothing else may run on the machine. Words after -- are flags of training. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hvdtrain.backends.recommended import check_recommendation, read_recommendation
from hvdtrain.launch.machine import this_machine
from hvdtrain.topology import Topology

CLOSE = 0.05
TRAINED = ["--model", "mlp", "--batch-size", "32", "--device", "cpu"]


def measured(folder: Path, name: str, options: argparse.Namespace, *, rounds: int, steps: int) -> Path:
    """Run the benchmark; returns its record."""
    file = folder / name
    words = [
        "--ranks",
        options.ranks,
        "--rounds",
        rounds,
        "--steps",
        steps,
        "--out",
        file,
        "--launcher",
        options.launcher,
    ]
    words += ["--engines", options.engines] if options.engines else []
    command = [sys.executable, "-m", "hvdtrain", "bench", "engines", *map(str, words), *options.trained]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return file


def chosen(file: Path, options: argparse.Namespace) -> str:
    """The engine that --backend auto:FILE takes under the launcher that it was measured with."""
    found = read_recommendation(str(file))
    ranks = options.ranks
    place = Topology(
        rank=0, world_size=ranks, local_rank=0, local_world_size=ranks, node_rank=0, num_nodes=1, launcher=options.launcher
    )  # fmt: skip
    check_recommendation(found, place, this_machine())
    return found.best


def rates(file: Path) -> dict[str, float]:
    """Median samples per second of each engine."""
    rounds: dict[str, list[dict[str, Any]]] = json.loads(file.read_text())["rounds"]
    return {engine: statistics.median(each["samples_per_second"] for each in of) for engine, of in rounds.items()}


def main() -> None:
    """Repeat, and say how often the choice was right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--engines", default="", help="A,B; all that the launcher can start")
    parser.add_argument("--launcher", default="mpirun")
    parser.add_argument("--rounds", type=int, default=1, help="of the record")
    parser.add_argument("--steps", type=int, default=320, help="of each start of the record")
    parser.add_argument("--judging-rounds", type=int, default=2)
    parser.add_argument("--judging-steps", type=int, default=640)
    parser.add_argument("trained", nargs="*", default=TRAINED)
    options = parser.parse_args()
    began = time.monotonic()
    found, whole = [], {}
    for number in range(options.repetitions):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            choice = chosen(
                measured(folder, "record.json", options, rounds=options.rounds, steps=options.steps), options
            )
            judge = measured(folder, "judge.json", options, rounds=options.judging_rounds, steps=options.judging_steps)
            judged = rates(judge)
            whole = json.loads(judge.read_text())
        best = max(judged, key=lambda engine: judged[engine])
        behind = 1 - judged.get(choice, 0.0) / judged[best]
        right = behind <= CLOSE
        found.append(
            {"chosen": choice, "fastest": best, "behind": behind, "right": right, "samples_per_second": judged}
        )
        print(
            f"{number + 1}/{options.repetitions}: chose {choice}, fastest {best}, {behind:.1%} behind: {'right' if right else 'WRONG'}; "
            + ", ".join(f"{engine} {rate:,.0f}" for engine, rate in judged.items()),
            flush=True,
        )
    hits = sum(bool(each["right"]) for each in found)
    print(f"right in {hits} of {len(found)} repetitions, within {CLOSE:.0%}, in {time.monotonic() - began:.0f} s")
    kept = {name: whole[name] for name in ("date", "machine", "load", "versions", "trained", "world_size")}
    print(json.dumps({"benchmark": "auto_choice", **kept, "right": hits, "repetitions": found}))


if __name__ == "__main__":
    main()

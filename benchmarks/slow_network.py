"""Ways to send less, over a slow network: hosts as network namespaces, each of which may send so much a second.

python benchmarks/slow_network.py --backend torch --rate 100mbit

Needs root, iproute2 and sshd (see tests/cluster/hosts.py). The ways take turns in one job, on an MLP of 8.5 million parameters
that learns what a random teacher says, or (`--model bytes`) a causal transformer of 7.3 million that reads the Python standard
library. Held-out losses are taken off the clock, of the weights that all ranks have in common; they would wait for what is under
way, and with a delay there is the last one alone. Seconds are to the loss that the first way has after `--steps`; a way that
has not reached it by then goes on for at most three times as many.

python benchmarks/slow_network.py --hides 40 35

How much of DiLoCo's exchange after every 40 steps is hidden where it has 35 steps' time: by how much the calls of `replica.step`
that send weights or take them in are longer than the median one, with an exchange that is waited for and with one that is not.

python benchmarks/slow_network.py --plan --out slow_network.json

Everything that docs/slow_networks.md shows, one after the other; `--plan mlp bytes` for some of it. What the file holds already of
other runs stays. One table comes last, and one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from slow_network_job import PROBLEMS, WAYS, work

LAUNCHERS = {"torch": "torchrun", "mpi": "mpirun", "horovod": "horovodrun-gloo"}
BEST = ["plain", "compression powersgd:2", "sync local-sgd:20", "sync diloco:20"]
USUAL = [way for way in WAYS if "node" not in way and "delay" not in way and "500" not in way]
PLAN: dict[str, dict[str, Any]] = {
    "mlp": {"ways": BEST},
    "bytes": {"model": "bytes", "ways": BEST},
    "mpi": {"backend": "mpi", "ways": BEST},
    "horovod": {"backend": "horovod", "ways": BEST},
    "bytes, mpi": {"model": "bytes", "backend": "mpi", "ways": BEST},
    "bytes, horovod": {"model": "bytes", "backend": "horovod", "ways": BEST},
    "all ways": {"ways": USUAL},
    "1gbit": {"rate": "1gbit", "ways": USUAL},
    "three hosts": {"hosts": 3, "ways": BEST},
    "two ranks a host": {
        "each": 2,
        "ways": ["plain", *(way for at in WAYS for way in (at.removesuffix(", node"), at) if at.endswith("node"))],
    },
    "hides, torch": {"hides": [40, 35]},
    "hides, mpi": {"backend": "mpi", "hides": [40, 35]},
    "hides, horovod": {"backend": "horovod", "hides": [40, 35]},
    "diloco:500": {"ways": ["sync diloco:500"], "steps": 500, "every": 100},
}
"""What is shown, by name: what differs from the defaults."""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="torch", choices=list(LAUNCHERS))
    parser.add_argument("--rate", default="100mbit", help="what each host can send, as tc has it")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--each", type=int, default=1, help="ranks on a host")
    parser.add_argument("--model", default="mlp", choices=list(PROBLEMS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=5, help="steps between held-out losses")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--ways", nargs="*", default=BEST, help=f"of {', '.join(WAYS)}, or what --sync takes")
    parser.add_argument("--hides", nargs=2, type=int, metavar=("STEPS", "DELAY"), help="measure what a delay hides")
    parser.add_argument("--turns", type=int, default=1, help="medians are shown")
    parser.add_argument("--plan", nargs="*", metavar="NAME", help=f"of {', '.join(PLAN)}; all without a name")
    parser.add_argument("--out", type=Path, help="a JSON file that takes what was measured, by name of the plan")
    parser.add_argument("--limit-s", type=float, default=3600)
    parser.add_argument("--results", type=Path, default=None, help=argparse.SUPPRESS)  # given to ranks
    return parser


def settled(args: argparse.Namespace) -> argparse.Namespace:
    """With the steps and ways that --hides stands for."""
    if args.hides:
        every, delay = args.hides
        args.steps = args.every = 2 * every + delay  # two exchanges, both taken in
        args.ways = [f"diloco:{every}", f"diloco:{every},delay={delay}"]
    return args


def main() -> None:
    args = settled(arguments().parse_args())
    if args.results is not None:
        work(args)
        return
    if args.plan is None:
        runs = {"": args}
    else:
        if unknown := [name for name in args.plan if name not in PLAN]:
            sys.exit(f"--plan knows {', '.join(PLAN)}, and not {', '.join(unknown)}")
        runs = {name: settled(argparse.Namespace(**{**vars(args), **PLAN[name]})) for name in args.plan or PLAN}
    found = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    for name, asked in runs.items():
        found[name] = run(asked)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1) + "\n")
        print(table({name: found[name]}), flush=True)
    if len(found) > 1:
        print(table(found))
    print(json.dumps(found))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One job on hosts of its own."""
    here = Path(__file__).resolve()
    tests = here.parents[1] / "tests"
    sys.path[:0] = [str(tests), str(tests / "cluster")]
    network = importlib.import_module("hosts")
    if why := network.missing():
        sys.exit(f"skipped: {why}")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        own = [str(here), "--results", str(results)]
        for name in ("backend", "model", "steps", "every", "lr", "turns"):
            own += [f"--{name}", str(getattr(args, name))]
        own += ["--hides", *map(str, args.hides)] if args.hides else ["--ways", *args.ways]
        with network.Hosts(Path(folder) / "net", *[f"host{number}" for number in range(args.hosts)]) as hosts:
            hosts.slow_down(args.rate)
            commands = network.launcher(hosts, LAUNCHERS[args.backend], *own, each=args.each)
            started = [hosts.begin(*one) for one in commands.items()]
            for process in started:
                try:
                    said, _ = process.communicate(timeout=args.limit_s)
                except subprocess.TimeoutExpired:
                    hosts.kill_all()
                    sys.exit(f"not done after {args.limit_s:g} s")
                if process.returncode:
                    sys.exit(said)
        found = json.loads(results.read_text())
    names = ("backend", "model", "rate", "hosts", "each", "steps", "lr", "turns")
    about = {name: getattr(args, name) for name in names}
    about |= {"torch": torch.__version__, "machine": platform.machine(), "cores": os.cpu_count()}
    about["load"] = [round(load, 1), round(os.getloadavg()[0], 1)]
    return {**about, **(hidden(found, *args.hides) if args.hides else {"ways": compared(found)})}


def compared(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Each way's medians over turns, and its seconds to the loss that the first way had at the end."""
    first, *_ = found.values()
    target = first[0]["loss"]
    ways: dict[str, Any] = {}
    for way, turns in found.items():
        reached = [next(((s, at) for at, s, loss, _ in one["curve"] if loss <= target), None) for one in turns]
        seconds = [one[0] for one in reached if one]
        ways[way] = {
            "ms_per_step": statistics.median(one["ms_per_step"] for one in turns),
            "turns_ms": [one["ms_per_step"] for one in turns],
            "sent_bytes_per_step": turns[0]["sent_bytes_per_step"],
            "loss": turns[0]["loss"],
            "accuracy": turns[0]["accuracy"],
            "target": target,
            "steps_to_target": reached[0][1] if reached[0] else None,
            "seconds_to_target": round(statistics.median(seconds), 1) if len(seconds) == len(turns) else None,
        }
    return ways


def table(found: dict[str, Any]) -> str:
    """All that was measured, for people."""
    rows = [
        "| | ms a step | bytes a step | of plain | last loss | accuracy | steps to plain's | s to it | times as fast |"
    ]
    rows.append("|" + "---|" * 9)
    for name, one in found.items():
        hosts = f"{one['hosts']} hosts" + (f" of {one['each']} ranks" if one["each"] > 1 else "")
        load = "-".join(map(str, one["load"]))
        title = f"{name or 'run'}: {one['model']}, {one['backend']}, {hosts}, {one['rate']}, {one['steps']} steps, load {load}"
        rows.append(f"| **{title}** |" + " |" * 8)
        if "hidden" in one:
            held = ", ".join(f"{way}: {turns}" for way, turns in one["held_up_s"].items())
            rows.append(f"| {100 * one['hidden']:.1f} % hidden; s an exchange holds training up: {held} |" + " |" * 8)
            continue
        plain = next(iter(one["ways"].values()))
        for way, of in one["ways"].items():
            seconds = of["seconds_to_target"]
            part = plain["sent_bytes_per_step"] / max(1, of["sent_bytes_per_step"])
            cells = [way, f"{of['ms_per_step']:.0f}", f"{of['sent_bytes_per_step']:,}", f"1/{part:.3g}"]
            cells += [f"{of['loss']:.3f}", f"{of['accuracy']:.3f}"]
            cells += (
                [str(of["steps_to_target"]), f"{seconds:.1f}", f"{plain['seconds_to_target'] / seconds:.1f}"]
                if seconds
                else [""] * 3
            )
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def hidden(found: dict[str, list[dict[str, Any]]], every: int, delay: int) -> dict[str, Any]:
    """Seconds that an exchange holds training up, waited for and not, in each turn, and the part that is hidden, by medians."""
    held_up: dict[str, list[float]] = {}
    for way, turns in found.items():
        for one in turns:
            taken = one["step_s"]
            usual = statistics.median(taken)
            # sent, weighed and begun, taken in
            touched = (every, every + 1, every + delay) if "delay" in way else (every,)
            extra = [[round(taken[begin + at - 1] - usual, 3) for at in touched] for begin in (0, every)]
            held_up.setdefault(way, []).append(round(statistics.mean(map(sum, extra)), 3))
    waited, beside = (statistics.median(turns) for turns in held_up.values())
    return {"held_up_s": held_up, "hidden": round(1 - beside / waited, 4)}


if __name__ == "__main__":
    main()

"""Ways to send less, over a slow network: two hosts as network namespaces, each of which may send so much a second.

python benchmarks/slow_network.py --backend torch --rate 100mbit

Needs root, iproute2 and sshd (see tests/cluster/hosts.py). The ways take turns in one job of one rank a host, on an MLP of 8.5
million parameters that learns what a random teacher says. Held-out losses are taken off the clock, of the weights that all
ranks have in common; they would wait for what is under way, and with a delay there is the last one alone. The last line of the output is one JSON object.

python benchmarks/slow_network.py --hides 40 35

How much of DiLoCo's exchange after every 40 steps is hidden where it has 35 steps' time: by how much the calls of `replica.step`
that send weights or take them in are longer than the median one, with an exchange that is waited for and with one that is not.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hvdtrain
from hvdtrain.backends.base import Backend

WAYS: dict[str, dict[str, str]] = {
    "plain": {},
    "compression bf16": {"compression": "bf16"},
    "compression int8": {"compression": "int8"},
    "compression fp8": {"compression": "fp8"},
    "compression 1bit": {"compression": "1bit"},
    "compression topk:0.01": {"compression": "topk:0.01"},
    "compression randomk:0.01": {"compression": "randomk:0.01"},
    "compression powersgd:2": {"compression": "powersgd:2"},
    "sync local-sgd:8": {"sync": "local-sgd:8"},
    "sync diloco:20": {"sync": "diloco:20"},
    "sync diloco:20, int8": {"sync": "diloco:20", "compression": "int8"},
    "sync diloco:20,delay=15,fragments=2": {"sync": "diloco:20,delay=15,fragments=2"},
    "sync diloco:500": {"sync": "diloco:500"},
}
LAUNCHERS = {"torch": "torchrun", "mpi": "mpirun", "horovod": "horovodrun-gloo"}
WIDTH, INPUTS, CLASSES, BATCH = 2048, 64, 10, 32


def made() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(INPUTS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(),
        nn.Linear(WIDTH, CLASSES),
    )  # fmt: skip


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(INPUTS, 32, generator=generator), torch.randn(32, CLASSES, generator=generator)
    x = torch.randn(count, INPUTS, generator=torch.Generator().manual_seed(seed))
    return x, (torch.tanh(x @ first / 4) @ second).argmax(1)


def measure(backend: Backend, steps: int, every: int, lr: float, options: dict[str, str]) -> dict[str, Any]:
    model = made()
    replica = backend.replicate(model, torch.optim.AdamW(model.parameters(), lr=lr), **options)  # type: ignore[arg-type]
    x, y = samples(BATCH * steps, seed=100 + backend.rank)
    held_x, held_y = samples(1000, seed=2)
    seconds, steps_s, curve, sent = [], [], [], 0.0
    for step in range(steps):
        if "sync" not in options:  # else ranks do not wait for each other
            backend.barrier()
        began, before = time.perf_counter(), backend.traffic.sent_bytes
        rows = slice(BATCH * step, BATCH * (step + 1))
        loss = nn.functional.cross_entropy(replica.model(x[rows]), y[rows])
        replica.backward(loss, samples=BATCH, total=BATCH * backend.world_size)
        stepped = time.perf_counter()
        replica.step()
        steps_s.append(time.perf_counter() - stepped)
        sent += backend.traffic.sent_bytes - before
        seconds.append(time.perf_counter() - began)
        if (step + 1) % every == 0 and (step == steps - 1 or "delay" not in options.get("sync", "")):
            with replica.shared_weights(), torch.no_grad():
                out = model(held_x)
                held = float(nn.functional.cross_entropy(out, held_y))
                accuracy = float((out.argmax(1) == held_y).float().mean())
            curve.append((round(sum(seconds), 3), round(held, 4), round(accuracy, 4)))
    replica.settle()
    return {
        "ms_per_step": round(1000 * sum(seconds) / steps, 1),
        "median_ms": round(1000 * statistics.median(seconds), 1),
        "sent_bytes_per_step": round(sent / steps),
        "loss": curve[-1][1],
        "accuracy": curve[-1][2],
        "curve": curve,
        "step_s": [round(one, 4) for one in steps_s],
    }


def work(args: argparse.Namespace) -> None:
    """One rank."""
    torch.set_num_threads(1)
    with hvdtrain.init(args.backend) as backend:
        found = {}
        for turn, way in enumerate(args.ways):
            name = way if args.ways.count(way) == 1 else f"{way} ({turn})"
            found[name] = measure(backend, args.steps, args.every, args.lr, WAYS.get(way) or {"sync": way})
            if backend.rank == 0:
                args.results.write_text(json.dumps(found))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="torch", choices=list(LAUNCHERS))
    parser.add_argument("--rate", default="100mbit", help="what each host can send, as tc has it")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10, help="steps between held-out losses")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--target", type=float, default=1.0, help="the held-out loss to which the seconds are said")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), help=f"of {', '.join(WAYS)}, or what --sync takes")
    parser.add_argument("--hides", nargs=2, type=int, metavar=("STEPS", "DELAY"), help="measure what a delay hides")
    parser.add_argument("--turns", type=int, default=3, help="of --hides; medians are shown")
    parser.add_argument("--limit-s", type=float, default=1800)
    parser.add_argument("--results", type=Path, default=None, help=argparse.SUPPRESS)  # given to ranks
    return parser


def main() -> None:
    args = arguments().parse_args()
    if args.hides:
        every, delay = args.hides
        args.steps = 2 * every + delay  # two exchanges, both taken in
        args.every = args.steps
        args.ways = [f"diloco:{every}", f"diloco:{every},delay={delay}"] * args.turns
    if args.results is not None:
        work(args)
        return
    tests = Path(__file__).resolve().parents[1] / "tests"
    sys.path[:0] = [str(tests), str(tests / "cluster")]
    network = importlib.import_module("hosts")
    if why := network.missing():
        sys.exit(f"skipped: {why}")
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        own = [str(Path(__file__).resolve()), "--results", str(results), "--backend", args.backend]
        own += ["--steps", str(args.steps), "--every", str(args.every), "--lr", str(args.lr), "--ways", *args.ways]
        with network.Hosts(Path(folder) / "net", *[f"host{number}" for number in range(args.hosts)]) as hosts:
            hosts.slow_down(args.rate)
            started = [hosts.begin(*one) for one in network.launcher(hosts, LAUNCHERS[args.backend], *own).items()]
            for process in started:
                try:
                    said, _ = process.communicate(timeout=args.limit_s)
                except subprocess.TimeoutExpired:
                    hosts.kill_all()
                    sys.exit(f"not done after {args.limit_s:g} s")
                if process.returncode:
                    sys.exit(said)
        found = json.loads(results.read_text())
    if args.hides:
        said = hidden(found, *args.hides)
        print(json.dumps({**facts(args), **said}))
        return
    shown = [
        f"| {args.backend}, {args.rate} | ms a step | bytes a step | s to loss {args.target:g} | last loss | accuracy |"
    ]
    shown.append("|---|---|---|---|---|---|")
    for way, one in found.items():
        reached = next((f"{seconds:.1f}" for seconds, loss, _ in one["curve"] if loss <= args.target), "")
        del one["step_s"]
        one["seconds_to_target"] = float(reached) if reached else None
        shown.append(
            f"| {way} | {one['ms_per_step']:.0f} | {one['sent_bytes_per_step']:,} | {reached} | {one['loss']:.3f} | {one['accuracy']:.3f} |"
        )
    print("\n".join(shown))
    print(json.dumps({**facts(args), "ways": found}))


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """What was run, and where."""
    asked = {name: getattr(args, name) for name in ("backend", "rate", "hosts", "steps", "lr", "target")}
    return {**asked, "torch": torch.__version__, "machine": platform.machine()}


def hidden(found: dict[str, Any], every: int, delay: int) -> dict[str, Any]:
    """Seconds that an exchange holds training up, waited for and not, in each turn, and the part that is hidden, by medians."""
    held_up: dict[str, list[float]] = {}
    for name, one in found.items():
        taken = one["step_s"]
        usual = statistics.median(taken)
        touched = (
            (every, every + 1, every + delay) if "delay" in name else (every,)
        )  # sent, weighed and begun, taken in
        extra = [[round(taken[begin + at - 1] - usual, 3) for at in touched] for begin in (0, every)]
        print(f"{name}: {extra} s")
        held_up.setdefault(name.partition(" (")[0], []).append(round(statistics.mean(map(sum, extra)), 3))
    waited, beside = (statistics.median(turns) for turns in held_up.values())
    print("\n".join(f"| {way} | {', '.join(map(str, turns))} s an exchange |" for way, turns in held_up.items()))
    print(f"hidden: {100 * (1 - beside / waited):.1f} %")
    return {"held_up_s": held_up, "hidden": round(1 - beside / waited, 4)}


if __name__ == "__main__":
    main()

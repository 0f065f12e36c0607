"""What a rank holds after much work, as JSON lines: ``endurance_job.py BACKEND STEPS GROUPS STARTS``."""

import gc
import json
import os
import sys
import time

import torch
from torch import nn

import hvdtrain
from hvdtrain.backends import load


def held():
    gc.collect()
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "rss_mb": round(resident / 1e6, 1),
    }


def settled(backend, before=None):
    """What is held once nothing is on its way out any more, at most 5 s later."""
    backend.barrier()
    end = time.monotonic() + 5
    while (now := held()) and before and now["threads"] > before["threads"] and time.monotonic() < end:
        time.sleep(0.05)
    return now


def tell(what, number, before, after):
    print("endurance " + json.dumps({"what": what, "number": number, "before": before, "after": after}), flush=True)


def train(backend, steps):
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    replica = backend.replicate(model, torch.optim.Adam(model.parameters()))
    before = None
    for step in range(steps):
        if step == steps // 10:
            before = settled(backend)
        loss = replica.model(torch.randn(8, 32)).square().mean()
        replica.backward(loss, samples=8)
        replica.step(clip_norm=1.0)
    tell("steps", steps, before, settled(backend, before))


def make_groups(backend, number):
    lists = [list(range(backend.world_size)), [0], [backend.world_size - 1]]

    def use(turn):
        group = backend.group(lists[turn % len(lists)])
        if group is not None:
            group.all_reduce(torch.ones(100))
            if turn % 2:
                group.close()

    for turn in range(12):
        use(turn)
    before = settled(backend)
    for turn in range(number):
        use(turn)
    tell("groups", number, before, settled(backend, before))


def main():
    name, steps, groups, starts = sys.argv[1], *map(int, sys.argv[2:])
    if starts and load(name).restartable:
        before = None
        for start in range(starts):
            with hvdtrain.init(name, device="cpu", timeout_s=60) as backend:
                backend.all_reduce(torch.ones(10))
                if start == starts // 5:
                    before = settled(backend)
                if start == starts - 1:
                    tell("starts", starts, before, settled(backend, before))
    with hvdtrain.init(name, device="cpu", timeout_s=60) as backend:
        if groups:
            make_groups(backend, groups)
        if steps:
            train(backend, steps)


if __name__ == "__main__":
    main()

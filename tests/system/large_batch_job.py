"""Trains by optimizers for large batches, on all ranks and by a plain loop in one process; prints the largest differences."""

import json
import sys

import pytorch_optimizer
import torch
from torch import nn

import hvdtrain

KINDS = {
    "Lamb": lambda ps: pytorch_optimizer.Lamb(ps, lr=0.02, weight_decay=0.01),
    "LARS": lambda ps: pytorch_optimizer.LARS(ps, lr=5.0, momentum=0.9, weight_decay=0.01),
}
MICRO_BATCHES, SAMPLES, STEPS, CLIP_NORM = 2, 13, 12, 0.2


def made() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3)).double()


def micro_batch(step, number):
    x = torch.sin(torch.arange(6.0 * SAMPLES, dtype=torch.float64).reshape(SAMPLES, 6) * (1 + step + STEPS * number))
    return x, (x.sum(1) * 7).long() % 3


def one_process(kind):
    model = made()
    optimizer = KINDS[kind](model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        for number in range(MICRO_BATCHES):
            x, y = micro_batch(step, number)
            (nn.functional.cross_entropy(model(x), y) / MICRO_BATCHES).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
    return model


def all_ranks(backend, kind):
    model = made()
    replica = backend.replicate(model, KINDS[kind](model.parameters()))
    clipped = 0
    for step in range(STEPS):
        for number in range(MICRO_BATCHES):
            x, y = (part[backend.rank :: backend.world_size] for part in micro_batch(step, number))
            with replica.accumulate(last=number == MICRO_BATCHES - 1):
                replica.backward(nn.functional.cross_entropy(replica.model(x), y), samples=len(x))
        clipped += replica.step(clip_norm=CLIP_NORM).gradient_norm > CLIP_NORM
    return model, int(clipped)


def refusal(backend, kind):
    try:
        hvdtrain.ShardedOptimizer(KINDS[kind](made().parameters()), backend)
    except hvdtrain.errors.ConfigError as error:
        return str(error)
    return ""


def main() -> None:
    with hvdtrain.init(sys.argv[1], device="cpu", timeout_s=60) as backend:
        said = {}
        for kind in KINDS:
            expected, (model, clipped) = one_process(kind), all_ranks(backend, kind)
            pairs = list(zip(model.parameters(), expected.parameters(), made().parameters(), strict=True))
            said[kind] = {
                "difference": max(float((ours - theirs).detach().abs().max()) for ours, theirs, _ in pairs),
                "moved": min(float((theirs - start).detach().abs().max()) for _, theirs, start in pairs),
                "clipped": clipped,
                "sharded": refusal(backend, kind),
            }
        everyone = backend.all_gather_object(said)
        if backend.rank == 0:
            print(json.dumps(everyone))


if __name__ == "__main__":
    main()

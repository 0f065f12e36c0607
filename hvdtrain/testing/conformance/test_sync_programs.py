"""Random programs of steps, averages and resumes under a sync, against the documented equations for all ranks in one process."""

import random

import pytest
import torch

import hvdtrain
from hvdtrain.backends.fragments import cut
from hvdtrain.testing.conformance.test_sync import INNER, batch, flat, loss_of, made

pytestmark = pytest.mark.feature("sync")

OUTER = [(1.0, 0.0), (0.7, 0.9), (0.5, 0.0), (1.0, 0.5)]
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


class Simulated:
    """All ranks: their weights, the common ones, and by fragment the steps left, what losses were means over, and what is under way."""

    def __init__(self, world_size, sync, inner):
        self.sync = sync
        self.models = [made() for _ in range(world_size)]
        self.optimizers = [INNER[inner](model.parameters()) for model in self.models]
        self.own = [list(model.parameters()) for model in self.models]
        self.common = [p.detach().clone() for p in self.own[0]]
        self.momentum = [torch.zeros_like(p) for p in self.common]
        parts = cut([p.numel() for p in self.common], sync.fragments)
        self.members = [[at for at, part in enumerate(parts) if part == k] for k in range(sync.fragments)]
        self.begin()

    def begin(self):
        self.left = [self.sync.first_due(k) for k in range(self.sync.fragments)]
        self.seen = [[0.0] * len(self.models) for _ in self.left]
        self.since, self.under_way = [0] * len(self.left), {}

    def step(self, batches):
        for model, optimizer, mine in zip(self.models, self.optimizers, batches, strict=True):
            optimizer.zero_grad()
            for x, y in mine:
                (loss_of(model, x, y) * (len(y) / sum(len(y) for _, y in mine))).backward()
            optimizer.step()
        for k in range(len(self.left)):
            self.seen[k] = [n + sum(len(y) for _, y in mine) for n, mine in zip(self.seen[k], batches, strict=True)]
            self.left[k], self.since[k] = self.left[k] - 1, self.since[k] + 1
            if k in self.under_way:
                self.under_way[k][0] -= 1
                self.take_in(k)
            if self.left[k] == 0:
                sent = {at: [p[at].detach().clone() for p in self.own] for at in self.members[k]}
                ways = {at: self.way(k, at, rows, self.common[at]) for at, rows in sent.items()}
                self.under_way[k] = [self.sync.delay, sent, ways]
                self.left[k], self.since[k], self.seen[k] = self.sync.steps, 0, [0.0] * len(self.models)
                self.take_in(k)

    def way(self, k, at, rows, common):
        whole = sum(self.seen[k]) or 1.0
        return sum((row - common) * (n / whole) for row, n in zip(rows, self.seen[k], strict=True))

    @torch.no_grad()
    def landed(self):
        """By parameter under way: new common weights and momentum, and each rank's weights."""
        found = {}
        for _, sent, ways in self.under_way.values():
            for at, way in ways.items():
                momentum = self.sync.outer_momentum * self.momentum[at] + way
                new = self.common[at] + self.sync.outer_lr * (way + self.sync.outer_momentum * momentum)
                found[at] = new, momentum, [p[at] + (new - row) for p, row in zip(self.own, sent[at], strict=True)]
        return found

    @torch.no_grad()
    def take_in(self, k):
        if self.under_way[k][0]:
            return
        landed = self.landed()
        for at in self.members[k]:
            self.common[at], self.momentum[at], rows = landed[at]
            for p, row in zip(self.own, rows, strict=True):
                p[at].copy_(row)
        del self.under_way[k]

    @torch.no_grad()
    def average(self):
        landed, found = self.landed(), list(self.common)
        for k, members in enumerate(self.members):
            for at in members:
                common, _, rows = landed.get(at, (self.common[at], None, [p[at].clone() for p in self.own]))
                found[at] = common + self.way(k, at, rows, common) if self.since[k] else common
        return found

    @torch.no_grad()
    def settle(self):
        if not self.under_way and not any(self.since):
            return
        average = self.average()
        for at, (_, momentum, _) in self.landed().items():
            self.momentum[at] = momentum
        self.common = average
        for p in self.own:
            for mine, value in zip(p, average, strict=True):
                mine.copy_(value)
        self.begin()


@pytest.mark.costly(2)
@pytest.mark.parametrize("seed", range(12))
def test_a_random_program_is_the_documented_equations(backend, tmp_path, seed):
    folder = backend.broadcast_object(str(tmp_path))
    draw = random.Random(seed)
    steps = draw.randint(1, 7)
    sync = hvdtrain.Sync(
        steps, *draw.choice(OUTER), delay=draw.randrange(steps), fragments=draw.randint(1, min(steps, 4))
    )
    inner, compression = draw.choice(list(INNER)), draw.choice([None, "topk:1", "randomk:1"])

    def looped():
        model = made()
        replica = backend.replicate(model, INNER[inner](model.parameters()), sync=sync, compression=compression)
        return replica, hvdtrain.LoopState(backend, replica)

    wanted = Simulated(backend.world_size, sync, inner)
    replica, state = looped()
    for number in range(20):
        act = draw.choices(["step", "shared", "settle", "resume"], [8, 1, 1, 1])[0]
        if act == "step":
            counts = [draw.choice([0, 1, 1, 2, 3]) for _ in range(backend.world_size)]
            batches = [[batch(r, 100 * number + i, draw.randint(2, 5)) for i in range(n)] for r, n in enumerate(counts)]
            for i, (x, y) in enumerate(batches[backend.rank]):
                with replica.accumulate(last=i == counts[backend.rank] - 1):
                    replica.backward(loss_of(replica.model, x, y), samples=len(y))
            replica.step()
            wanted.step(batches)
        elif act == "shared":
            with replica.shared_weights():
                torch.testing.assert_close(
                    flat(replica.module), torch.cat([p.flatten() for p in wanted.average()]), **CLOSE
                )
        elif act == "settle":
            replica.settle()
            wanted.settle()
        else:
            state.save(hvdtrain.Checkpoints(f"{folder}/{number}"), number)
            replica, state = looped()
            assert state.load(hvdtrain.Checkpoints(f"{folder}/{number}")) == number
        torch.testing.assert_close(flat(replica.module), flat(wanted.models[backend.rank]), **CLOSE)
    replica.settle()
    wanted.settle()
    torch.testing.assert_close(flat(replica.module), flat(wanted.models[backend.rank]), **CLOSE)

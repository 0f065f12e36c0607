"""Bytes are counted where they are handed to the engine."""

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset

pytestmark = pytest.mark.feature("traffic")


def sent(backend, work):
    before = backend.traffic.sent_bytes
    work()
    return backend.traffic.sent_bytes - before


def test_a_collective_counts_its_share_of_a_ring(backend):
    n = backend.world_size
    tensor = torch.ones(3000, dtype=torch.float64)
    backend.barrier()
    assert sent(backend, lambda: backend.all_reduce(tensor)) == pytest.approx(2 * 24000 * (n - 1) / n)
    assert sent(backend, lambda: backend.broadcast(tensor)) == pytest.approx(24000 * (n - 1) / n)
    own = sent(backend, lambda: backend.all_gather(tensor)) / max(1, n - 1)  # and where shapes may differ, these
    assert own == pytest.approx(24000 * (n > 1), abs=200)


def test_a_group_counts_too(backend):
    group = backend.group([0])
    assert sent(backend, lambda: group is None or group.all_reduce(torch.ones(100))) == 0
    if group is not None:
        group.close()
    everyone = backend.group(list(range(backend.world_size)))
    n = backend.world_size
    assert sent(backend, lambda: everyone.all_reduce(torch.ones(100))) == pytest.approx(2 * 400 * (n - 1) / n)
    everyone.close()


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({}, 1),
        ({"find_unused_parameters": True}, 1),
        ({"reduce_dtype": "bf16"}, 1 / 2),
        ({"compression": "randomk:0.01"}, 1 / 100),
    ],
    ids=["plain", "find-unused", "bf16", "randomk"],
)
def test_a_step_counts_its_gradients_once_however_many_micro_batches(backend, options, share):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(400, 300, bias=False), nn.Linear(300, 400, bias=False))
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    n = backend.world_size
    whole = 2 * 4 * 240_000 * (n - 1) / n

    def step():
        for last in (False, True):
            with replica.accumulate(last=last):
                replica.backward(replica.model(torch.ones(2, 400)).square().mean(), samples=2, total=4 * n)
        replica.step()

    step()
    for _ in range(2):
        assert sent(backend, step) == pytest.approx(share * whole, rel=0.01, abs=300 * (n > 1))


def test_the_trainer_says_what_a_step_sends_without_evaluations_and_checkpoints(backend, tmp_path):
    torch.manual_seed(1)
    model = nn.Linear(200, 300, bias=False)
    records = []
    trainer = hvdtrain.Trainer(
        backend,
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss=nn.functional.cross_entropy,
        progress=records.append,
        checkpoints=hvdtrain.Checkpoints(backend.broadcast_object(str(tmp_path))),
    )
    data = ArrayDataset(torch.ones(24, 200), torch.arange(24))
    result = trainer.fit(data, data, epochs=2, global_batch_size=6)
    n = backend.world_size
    assert result.sent_bytes_per_step == pytest.approx(2 * 240_000 * (n - 1) / n, rel=0.01)
    assert records[-1].sent_bytes_per_step == pytest.approx(result.sent_bytes_per_step, rel=0.01)


@pytest.mark.parametrize("evaluated", [False, True], ids=["", "evaluated"])
@pytest.mark.parametrize("sync", ["local-sgd:4", "local-sgd:4,delay=3"])
def test_an_exchange_under_way_that_is_waited_for_counts_in_the_steps(backend, sync, evaluated):
    torch.manual_seed(1)
    model = nn.Linear(200, 300, bias=False)
    trainer = hvdtrain.Trainer(
        backend,
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss=nn.functional.cross_entropy,
        sync=sync,
    )
    data, n = ArrayDataset(torch.ones(24, 200), torch.arange(24)), backend.world_size
    for epochs in (2, 4):
        result = trainer.fit(data, data if evaluated else None, epochs=epochs, global_batch_size=6)
        assert result.sent_bytes_per_step == pytest.approx(2 * 240_000 * (n - 1) / n / 4, rel=0.01)

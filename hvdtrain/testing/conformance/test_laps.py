"""Where a step's time goes, told for each rank, and what else a logged step says."""

import time

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.observe.logger import NullLogger

pytestmark = pytest.mark.feature("trainer")

DELAY_S = 0.1
STEPS = 6


class Kept(NullLogger):
    def __init__(self):
        self.records = []

    def log_step(self, record):
        self.records.append(record)


class Slow(ArrayDataset):
    def __init__(self, delay_s):
        super().__init__(torch.randn(240, 4), torch.randn(240, 1))
        self._delay_s = delay_s

    def __getitem__(self, index):
        time.sleep(self._delay_s / 5)  # there are 5 samples in a rank's step
        return super().__getitem__(index)


class SlowSgd(torch.optim.SGD):
    delay_s = 0.0

    def step(self, closure=None):
        time.sleep(self.delay_s)
        return super().step(closure)


def trained(backend, phase, *, slow_rank, log_every=3, **options):
    """The records of a run in which one phase of one rank is slow, and how long it took."""
    delay_s = DELAY_S if backend.rank == slow_rank else 0.0
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = SlowSgd(model.parameters(), lr=0.01)
    optimizer.delay_s = delay_s if phase == "optimizer" else 0.0

    class LateGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            time.sleep(delay_s)
            return gradient

    def loss(output, target):
        time.sleep(delay_s if phase == "forward" else 0.0)
        found = mse_loss(output, target)
        return LateGradient.apply(found) if phase == "backward" else found

    class Callback:
        def on_step(self, trainer, event):
            time.sleep(delay_s if phase == "other" else 0.0)

    logger = Kept()
    trainer = hvdtrain.Trainer(
        backend,
        model,
        optimizer,
        loss=loss,
        logger=logger,
        log_every=log_every,
        callbacks=[Callback()],
        **options,
    )
    began = time.perf_counter()
    trainer.fit(
        Slow(delay_s if phase == "data" else 0.0), epochs=1, global_batch_size=5 * backend.world_size, max_steps=STEPS
    )
    return logger.records, time.perf_counter() - began


@pytest.mark.timing
@pytest.mark.parametrize("phase", ["data", "forward", "backward", "optimizer", "other"])
def test_the_phase_and_the_rank_that_are_slow_are_told_and_the_others_wait_in_the_exchange(backend, phase):
    slow_rank = backend.world_size - 1
    records, wall_s = trained(backend, phase, slow_rank=slow_rank)
    assert [record.step for record in records] == [3, 6]
    seconds = records[-1].phase_seconds
    assert all(len(ranks) == backend.world_size for ranks in seconds.values())
    assert seconds[phase][slow_rank] > 0.95 * DELAY_S
    for rank in range(backend.world_size):
        if rank != slow_rank:
            assert seconds[phase][rank] < seconds[phase][slow_rank] - 0.4 * DELAY_S
            assert seconds["exchange"][rank] > 0.4 * DELAY_S
        assert sum(of[rank] for of in seconds.values()) * STEPS < wall_s * 1.5
    everyone = backend.all_gather_object(seconds)
    assert all(theirs == seconds for theirs in everyone)


def test_between_logged_steps_no_phases_are_told(backend):
    between = []
    _, _ = trained(backend, "forward", slow_rank=0, log_every=100, progress=between.append)
    assert between
    assert all(record.phase_seconds is None for record in between)


def test_a_logged_step_has_the_norm_of_the_averaged_gradient_without_being_asked_to_clip(backend):
    records, _ = trained(backend, "none", slow_rank=0, log_every=STEPS)
    (record,) = records
    assert set(record.phase_seconds) >= {"data", "forward", "backward", "optimizer"}
    assert all(len(ranks) == backend.world_size for ranks in record.phase_seconds.values())
    assert all(theirs == record.phase_seconds for theirs in backend.all_gather_object(record.phase_seconds))
    clipped, _ = trained(backend, "none", slow_rank=0, log_every=STEPS, clip_norm=1e9)
    assert record.gradient_norm is not None
    assert record.gradient_norm == pytest.approx(clipped[0].gradient_norm, rel=1e-6)
    assert record.gradient_norm > 0
    assert len(set(backend.all_gather_object(record.gradient_norm))) == 1
    assert record.memory_bytes > 1e7
    assert 0 < record.train_seconds < 60


def test_an_epoch_of_ranks_without_samples_is_measured_too(backend):
    model = nn.Linear(4, 1)
    logger = Kept()
    trainer = hvdtrain.Trainer(
        backend, model, torch.optim.SGD(model.parameters(), lr=0.01), loss=mse_loss, logger=logger, log_every=1
    )
    trainer.fit(ArrayDataset(torch.randn(3, 4), torch.randn(3, 1)), epochs=2, global_batch_size=1)
    assert [record.step for record in logger.records] == [1, 2, 3, 4, 5, 6]
    assert all(min(map(min, record.phase_seconds.values())) >= 0 for record in logger.records)


@pytest.mark.timing
def test_an_exchange_of_weights_is_an_exchange(backend):
    records, _ = trained(backend, "other", slow_rank=backend.world_size - 1, sync="local-sgd:3")
    seconds = records[-1].phase_seconds
    if backend.world_size > 1:  # the others wait for it in every third step, for three delays
        assert seconds["exchange"][0] > 0.5 * DELAY_S
        assert seconds["optimizer"][0] < seconds["exchange"][0]

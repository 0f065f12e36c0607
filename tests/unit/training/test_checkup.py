"""The loop's small exchange: rank 0's clock decides for all when it is time for a checkpoint."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import ConfigError
from hvdtrain.testing.threads import run_ranks
from hvdtrain.training.checkpoint import Checkpoints
from hvdtrain.training.checkup import Checkup, Tally


def test_time_for_a_checkpoint_is_by_the_clock_of_rank_0_alone():
    def body(communicator):
        rank = communicator.wire.rank
        seconds = [0.0]
        checkup = Checkup(
            communicator, log_every=1, stop_requested=lambda: False, save_every_s=60, clock=lambda: seconds[0]
        )
        checkup.begin(0)
        said = []
        for step in range(1, 9):
            seconds[0] += 25.0 if rank == 0 else 1000.0
            verdict = checkup.hold(step, Tally(float(rank), 1))
            said.append(verdict.save)
            if verdict.save:
                checkup.saved()
        assert verdict.tally == Tally(3.0, 3)
        return said

    assert run_ranks(3, body) == [[False, False, True, False, False, True, False, False]] * 3


def test_without_a_time_between_checkpoints_it_is_never_time():
    def body(communicator):
        checkup = Checkup(communicator, log_every=1, stop_requested=lambda: False, clock=lambda: 1e300)
        checkup.begin(0)
        return checkup.hold(1, Tally()).save

    assert run_ranks(2, body) == [False, False]


class Slow(ArrayDataset):
    def __getitem__(self, index):
        time.sleep(0.005)
        return super().__getitem__(index)


def test_checkpoints_are_written_by_time_besides_the_others(tmp_path, alone):
    def steps(folder, **options):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        trainer = hvdtrain.Trainer(
            alone, model, torch.optim.SGD(model.parameters(), lr=0.1), loss=nn.functional.cross_entropy,
            checkpoints=Checkpoints(tmp_path / folder, keep=99), log_every=1, **options,
        )  # fmt: skip
        trainer.fit(Slow(torch.ones(40, 4), torch.zeros(40, dtype=torch.int64)), epochs=1, global_batch_size=2)
        return sorted(int(path.name[5:]) for path in (tmp_path / folder).iterdir() if path.name.startswith("step-"))

    assert steps("never") == [20]
    by_time = steps("by time", checkpoint_minutes=0.05 / 60, checkpoint_every=7)
    assert {7, 14, 20} < set(by_time)


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_no_time_between_checkpoints_is_refused(alone, minutes):
    with pytest.raises(ConfigError, match="checkpoint_minutes must be more than 0"):
        hvdtrain.Trainer(
            alone, nn.Linear(1, 1), torch.optim.SGD([nn.Parameter(torch.ones(1))]), loss=len, checkpoint_minutes=minutes
        )


def test_a_talk_before_the_first_step_says_nothing_of_how_long_steps_take():
    def body(communicator):
        checkup = Checkup(communicator, log_every=10**6, stop_requested=lambda: False)
        checkup.begin(0)
        checkup.hold(0, Tally())
        return checkup.due(1), checkup.wants_norm(1)

    assert run_ranks(2, body) == [(True, True)] * 2


@pytest.mark.parametrize(("norm_s", "every"), [(0.0, 1), (0.0003, 1), (0.002, 7), (0.003, 10)])
def test_the_norm_is_wanted_at_steps_where_ranks_talk_if_it_takes_half_a_percent_of_the_time(norm_s, every):
    def body(communicator):
        seconds = [0.0]
        checkup = Checkup(
            communicator, log_every=1, stop_requested=lambda: False, norm_s=norm_s, clock=lambda: seconds[0]
        )
        checkup.begin(0)
        wanted = []
        for step in range(1, 100):
            seconds[0] += 0.0625
            if checkup.wants_norm(step):
                wanted.append(step)
            checkup.hold(step, Tally())
        return wanted

    assert run_ranks(2, body) == [[*range(1, 100, every)]] * 2

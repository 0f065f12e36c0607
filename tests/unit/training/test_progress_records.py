"""Steps between logged ones are reported too, so that a slow run shows that it lives."""

from __future__ import annotations

import time

import torch
from torch.nn.functional import mse_loss

import hvdtrain
from hvdtrain.observe.logger import NullLogger


class Steps(NullLogger):
    def __init__(self) -> None:
        self.logged: list[int] = []

    def log_step(self, record) -> None:
        self.logged.append(record.step)


def slow_loss(output, target):
    time.sleep(0.25)
    return mse_loss(output, target)


def test_slow_steps_are_reported_about_every_second_and_logged_ones_only_to_the_logger():
    data = torch.utils.data.TensorDataset(torch.randn(12, 2), torch.randn(12, 1))
    logger, between = Steps(), []
    with hvdtrain.init("local") as backend:
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = hvdtrain.Trainer(
            backend, model, optimizer, loss=slow_loss, logger=logger, log_every=6, progress=between.append
        )
        trainer.fit(data, epochs=1, global_batch_size=1)
    assert logger.logged == [6, 12]
    steps = [record.step for record in between]
    assert steps[0] == 1
    assert not {6, 12} & {*steps}
    assert 2 <= len(steps) <= 6
    assert all(record.total_steps == 12 and record.loss >= 0 for record in between)

"""Metrics are means over samples, or refused by name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import ConfigError

LENGTH = 11
VALUES = torch.arange(LENGTH, dtype=torch.float64)


class Measured:
    """Reports, beside the loss, whatever a function makes of a batch of numbers."""

    def __init__(self, metric, loss=lambda x: x.mean()):
        self._metric, self._loss = metric, loss

    def loss(self, model, batch):
        return model(batch[0]).mean()

    def metrics(self, model, batch):
        assert not torch.is_grad_enabled()
        assert not model.training
        return {"loss": self._loss(batch[0]), "it": self._metric(batch[0])}


def evaluate(alone, task, batch_size=4):
    model = nn.Linear(1, 1).double()
    trainer = hvdtrain.Trainer(alone, model, torch.optim.SGD(model.parameters()), task=task, precision="fp64")
    found = trainer.evaluate(ArrayDataset(VALUES.unsqueeze(1)), batch_size=batch_size)
    assert model.training
    return found


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (lambda x: x.mean(), 5.0),
        (lambda x: x.mean().float().requires_grad_(), 5.0),
        (lambda x: float(x.mean()), 5.0),
        (lambda x: np.float32(x.mean()), 5.0),
        (lambda x: np.array(float(x.mean())), 5.0),
        (lambda x: 3, 3.0),
        (lambda x: torch.tensor(3), 3.0),
        (lambda x: torch.tensor(2, dtype=torch.uint8), 2.0),
        (lambda x: True, 1.0),
        (lambda x: torch.tensor(True), 1.0),
        (lambda x: np.bool_(False), 0.0),
        (lambda x: torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    ],
    ids=range(12),
)
def test_a_number_of_any_type_is_averaged_over_samples(alone, metric, expected):
    found = evaluate(alone, Measured(metric))
    assert found["it"] == pytest.approx(expected, abs=1e-12)
    assert found["loss"] == pytest.approx(5.0, abs=1e-12)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda x: torch.zeros(3), r"metric 'it' has shape \(3,\); return a mean over samples"),
        (lambda x: x.mean(0), r"metric 'it' has shape \(1,\)"),
        (lambda x: np.zeros((2, 2)), r"metric 'it' has shape \(2, 2\)"),
        (lambda x: [1.0], "metric 'it' is a list"),
        (lambda x: None, "metric 'it' is a NoneType"),
        (lambda x: "good", "metric 'it' is a str"),
        (lambda x: torch.tensor(1j), "metric 'it' is of type torch.complex64"),
    ],
    ids=range(7),
)
def test_what_is_no_number_is_refused_by_name(alone, metric, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(alone, Measured(metric))


class Fixed(Measured):
    def __init__(self, returned):
        self._returned = iter(returned)

    def metrics(self, model, batch):
        return next(self._returned)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([{"accuracy": 1.0}], "metrics lack 'loss'.*they are: accuracy"),
        ([{}], "metrics lack 'loss'.*they are: none"),
        ([None], "must return a dictionary.*returned a NoneType"),
        ([[("loss", 1.0)]], "returned a list"),
        ([{"loss": 1.0, "top5": 1.0}, {"loss": 1.0}], "the same names for every batch; top5 came with only some"),
        ([{"loss": 1.0}, {"loss": 1.0}, {"loss": 1.0, "b": 0, "a": 0}], "a, b came with only some"),
    ],
    ids=range(6),
)
def test_metrics_that_cannot_be_averaged_are_refused(alone, returned, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(alone, Fixed(returned))


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, torch.tensor(-2)])
def test_a_metric_with_a_weight_that_cannot_be_is_refused(alone, weight):
    """Also where the other batches' weights would outweigh it."""
    returned = [{"loss": (1.0, 5.0)}, {"loss": (1.0, weight)}, {"loss": (1.0, 5.0)}]
    with pytest.raises(ConfigError, match="weight of metric loss is negative, NaN or infinite"):
        evaluate(alone, Fixed(returned))


def test_not_finite_metrics_are_reported_as_they_are(alone):
    assert evaluate(alone, Measured(lambda x: float("inf")))["it"] == float("inf")

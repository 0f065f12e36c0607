"""Whatever becomes of the last batch, and whoever orders the samples: a run that is resumed is the run that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import hvdtrain
from hvdtrain.errors import CheckpointError, ConfigError
from hvdtrain.training.checkpoint import Checkpoints
from hvdtrain.training.lone_sample import lone_samples_explained

X = torch.sin(torch.arange(46.0)).reshape(23, 2)
DATA = TensorDataset(X, X.square().sum(1, keepdim=True))


def train(folder: Path, data: Any, *, max_steps: int | None = None, resume_from: str | None = None, **fit: Any) -> Any:
    torch.manual_seed(0)
    with hvdtrain.init("local", device="cpu") as backend:
        model = nn.Linear(2, 1)
        trainer = hvdtrain.Trainer(
            backend,
            model,
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            loss=nn.functional.mse_loss,
            checkpoints=Checkpoints(folder, keep=100),
            checkpoint_every=1,
            seed=4,
        )
        result = trainer.fit(data, epochs=3, max_steps=max_steps, resume_from=resume_from, **{"batch_size": 5} | fit)
        return result, model.weight.tolist()


def checkpoint(folder: Path, step: int) -> str:
    (path,) = (
        one for one in folder.iterdir() if one.name.endswith(f"-{step:08d}") or one.name.rpartition("-")[2] == str(step)
    )
    return str(path)


@pytest.mark.parametrize(("last_batch", "steps", "samples"), [("keep", 15, 69), ("drop", 12, 60), ("merge", 12, 69)])
def test_a_resumed_run_is_the_uninterrupted_one_at_every_step(
    tmp_path: Path, last_batch: str, steps: int, samples: int
) -> None:
    whole, weight = train(tmp_path / "whole", DATA, last_batch=last_batch)
    assert (whole.steps, whole.samples, whole.epochs) == (steps, samples, 3)
    for step in (3, 4, 5, 7):  # before, at and after the end of an epoch
        folder = tmp_path / str(step)
        train(folder, DATA, last_batch=last_batch, max_steps=step)
        resumed, same = train(folder, DATA, last_batch=last_batch, resume_from=checkpoint(folder, step))
        assert (resumed.steps, same) == (steps, weight)


def test_a_users_sampler_goes_on_where_it_was(tmp_path: Path) -> None:
    def loader() -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(9)
        return DataLoader(DATA, 5, sampler=WeightedRandomSampler(torch.arange(1.0, 24), 18, generator=generator))

    whole, weight = train(tmp_path / "whole", loader(), batch_size=None)
    assert (whole.steps, whole.samples) == (12, 54)
    train(tmp_path / "6", loader(), batch_size=None, max_steps=6)
    assert train(tmp_path / "6", loader(), batch_size=None, resume_from=checkpoint(tmp_path / "6", 6))[1] == weight


def test_a_run_that_merges_cannot_go_on_with_the_short_batch_alone(tmp_path: Path) -> None:
    train(tmp_path, DATA, max_steps=4)
    with pytest.raises(CheckpointError, match=r"20 of 23 samples.*last_batch=.*now merge"):
        train(tmp_path, DATA, last_batch="merge", resume_from=checkpoint(tmp_path, 4))


def test_only_what_batch_normalisation_says_of_one_value_is_explained() -> None:
    with pytest.raises(ConfigError, match="--last-batch merge"), lone_samples_explained():
        nn.BatchNorm1d(3)(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"^of the user's own$"), lone_samples_explained():
        raise ValueError("of the user's own")

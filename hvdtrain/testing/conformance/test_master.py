"""The master test: the same seed and global batch give the parameters of one process, whatever the number of ranks."""

import pytest
import torch
from torch import nn

import hvdtrain

pytestmark = pytest.mark.feature("accumulation")

LENGTH = 53


def cnn():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 10))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def data():
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(LENGTH, 1, 8, 8, generator=generator)
    return torch.utils.data.TensorDataset(images, torch.randint(0, 10, (LENGTH,), generator=generator))


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def train(backend, make, optimizer, batch, accumulate):
    torch.manual_seed(3)
    model = make()
    trainer = hvdtrain.Trainer(
        backend,
        model,
        OPTIMIZERS[optimizer](model.parameters()),
        loss=nn.functional.cross_entropy,
        precision="fp64",
        accumulate=accumulate,
        clip_norm=1.0,
        seed=5,
    )
    result = trainer.fit(data(), data(), epochs=20, max_steps=20, global_batch_size=batch)
    return result, [p.detach().clone() for p in model.parameters()]


@pytest.mark.costly(2)
@pytest.mark.parametrize("make", [cnn, mlp])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("batch", "accumulate"), [(16, 1), (7, 2), (26, 3)])
def test_twenty_steps_equal_those_of_one_process(backend, reference, make, optimizer, batch, accumulate):
    one, expected = train(reference, make, optimizer, batch, accumulate)
    many, found = train(backend, make, optimizer, batch, accumulate)
    assert (many.steps, many.epochs) == (one.steps, one.epochs) == (20, one.epochs)
    for mine, theirs in zip(found, expected, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-12
    assert many.eval_metrics["accuracy"] == one.eval_metrics["accuracy"]
    assert abs(many.eval_metrics["loss"] - one.eval_metrics["loss"]) < 1e-12
    assert abs(many.train_loss - one.train_loss) < 1e-12


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_data_smaller_than_the_world_trains_and_evaluates_exactly(backend, reference, length):
    few = torch.utils.data.Subset(data(), range(length))

    def go(where):
        torch.manual_seed(3)
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = hvdtrain.Trainer(where, model, optimizer, loss=nn.functional.cross_entropy, precision="fp64")
        return trainer.fit(few, few, epochs=3, global_batch_size=4), model

    (one, expected), (many, found) = go(reference), go(backend)
    assert many.steps == one.steps
    assert abs(many.eval_metrics["loss"] - one.eval_metrics["loss"]) < 1e-12
    for mine, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)

"""Callbacks over ranks: one rank's word ends all, states go on, averages and best checkpoints are the same on every rank."""

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import ConfigError

pytestmark = pytest.mark.feature("callbacks")


def data(length):
    return ArrayDataset(torch.linspace(-1, 1, 4 * length).reshape(length, 4), torch.arange(length) % 3)


class Task:
    """Keeps what was evaluated."""

    def __init__(self):
        self.evaluated = []
        self.epoch = 0

    def on_epoch(self, trainer, event):
        self.epoch = event.epoch

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def metrics(self, model, batch):
        self.evaluated.append(torch.cat([t.detach().flatten() for t in model.state_dict().values()]))
        return {"loss": self.loss(model, batch), "best in the second": float(self.epoch == 2)}


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def trainer_on(backend, callbacks=(), model=None, **options):
    model = (model or net()).to(backend.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    task = Task()
    return hvdtrain.Trainer(backend, model, optimizer, task=task, callbacks=[task, *callbacks], **options)


def fit(trainer, epochs=2, **options):
    size = 2 * trainer.backend.world_size + 1  # ranks have unequal shares
    return trainer.fit(data(3 * size), data(2 * size), epochs=epochs, global_batch_size=size, **options)


def alike(backend, *tensors):
    return all(torch.equal(t, backend.broadcast(t.detach())) for t in tensors)


class StopOnOneRank:
    def on_step(self, trainer, event):
        if event.step == 2 and trainer.backend.rank == trainer.backend.world_size - 1:
            trainer.stop("one rank has had enough")


def test_one_ranks_word_ends_all_ranks_alike(backend):
    trainer = trainer_on(backend, [StopOnOneRank()], log_every=1)
    result = fit(trainer)
    assert (result.steps, result.stopped) == (2, "one rank has had enough")
    assert result.eval_metrics
    assert alike(backend, *trainer.replica.module.parameters())


def test_ranks_with_other_callbacks_are_told_so(backend):
    if backend.world_size == 1:
        return
    with pytest.raises(ConfigError, match="called fit differently: callbacks is"):
        fit(trainer_on(backend, [StopOnOneRank()] if backend.rank else []))


def test_a_run_that_was_stopped_early_does_not_go_on(backend, tmp_path):
    folder = backend.broadcast_object(str(tmp_path))
    checkpoints = hvdtrain.Checkpoints(folder)

    def early():
        return [hvdtrain.EarlyStopping(patience=1, min_delta=100.0)]

    first = fit(trainer_on(backend, early(), checkpoints=checkpoints), epochs=5)
    assert first.epochs == 2
    again = fit(trainer_on(backend, early()), epochs=5, resume_from=checkpoints.find(backend))
    assert (again.epochs, again.samples, again.stopped) == (2, 0, first.stopped)
    assert len(set(backend.all_gather_object(again.stopped))) == 1
    assert again.stopped.endswith("in 1 evaluations")


@pytest.mark.costly(1)
@pytest.mark.parametrize("stop", [2, 3])
def test_averaged_weights_are_the_same_everywhere_and_go_on_exactly(backend, tmp_path, stop):
    folder = backend.broadcast_object(str(tmp_path))
    checkpoints = hvdtrain.Checkpoints(folder)
    whole = trainer_on(backend, [hvdtrain.ExponentialMovingAverage(0.8)])
    fit(whole)
    assert alike(backend, whole.task.evaluated[-1])
    plain = trainer_on(backend)
    fit(plain)
    assert all(torch.equal(a, b) for a, b in zip(*(t.replica.module.parameters() for t in (whole, plain)), strict=True))
    assert not torch.equal(whole.task.evaluated[-1], plain.task.evaluated[-1])
    fit(trainer_on(backend, [hvdtrain.ExponentialMovingAverage(0.8)], checkpoints=checkpoints), max_steps=stop)
    again = trainer_on(backend, [hvdtrain.ExponentialMovingAverage(0.8)])
    fit(again, resume_from=checkpoints.find(backend))
    assert torch.equal(again.task.evaluated[-1], whole.task.evaluated[-1])


def test_the_best_checkpoint_is_kept_beside_the_run_and_gone_on_from(backend, tmp_path):
    folder = tmp_path / "best"
    best = hvdtrain.BestCheckpoint(folder, "best in the second", mode="max")
    fit(trainer_on(backend, [best], checkpoints=hvdtrain.Checkpoints(tmp_path / "all", keep=1)), epochs=4)
    found = best.checkpoints.find(backend)
    assert found.step == 6
    assert len(set(backend.all_gather_object(best.best))) == 1
    again = hvdtrain.BestCheckpoint(folder, "best in the second", mode="max")
    result = fit(trainer_on(backend, [again]), epochs=3, resume_from=found)
    assert (result.epochs, result.steps, again.best) == (3, 9, best.best)
    if backend.rank == 0:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "best"]

"""What needs all samples: metrics that are no means over them, and predictions in their order."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import ConfigError, OutputError

pytestmark = pytest.mark.feature("whole data")


def data(length):
    return ArrayDataset(torch.linspace(-1, 1, 2 * length).reshape(length, 2), torch.arange(length))


class Median:
    """A metric that is no mean: the median of all values, and how many there were."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.values = torch.empty(0)

    def update(self, values):
        self.values = torch.cat([self.values, values.cpu()])

    def compute(self):
        return {"of": float(self.values.median()), "last": float(self.values[-1]), "count": len(self.values)}

    def merge_state(self, others):
        self.values = torch.cat([self.values, *(other.values for other in others)]).sort().values


class Task:
    """Looks at the outputs of a linear model."""

    def __init__(self, metric=None):
        self.epoch_metrics = {"median": metric or Median()}

    def loss(self, model, batch):
        return model(batch[0]).mean()

    def metrics(self, model, batch):
        outputs = model(batch[0])
        self.epoch_metrics["median"].update(outputs.flatten())
        return {"loss": outputs.mean()}

    def predict(self, model, batch):
        x, y = batch
        return {"y": model(x), "told": [{"n": n, "twice": torch.tensor([n, n])} for n in y.tolist()]}


def trainer_on(backend, task, model=None):
    torch.manual_seed(0)
    model = model or nn.Linear(2, 1)
    model = model.to(backend.device)
    return hvdtrain.Trainer(backend, model, torch.optim.SGD(model.parameters()), task=task)


def lengths(backend):
    return [1, backend.world_size, 5 * backend.world_size + 1]


def test_a_metric_that_is_no_mean_equals_one_process(backend, reference):
    for length in lengths(backend):
        expected = trainer_on(reference, Task()).evaluate(data(length), batch_size=2)
        found = trainer_on(backend, Task()).evaluate(data(length), batch_size=2)
        assert found.keys() == expected.keys()
        assert found["median/count"] == length
        assert found == pytest.approx(expected, abs=1e-6)
        assert len(set(map(str, backend.all_gather_object(found)))) == 1


def test_it_stands_among_the_metrics_of_fit_and_begins_anew_each_time(backend):
    task = Task()
    result = trainer_on(backend, task).fit(data(9), data(7), epochs=3, global_batch_size=4)
    assert result.eval_metrics["median/count"] == 7
    assert len(task.epoch_metrics["median"].values) == 0


class Vector(Median):
    def compute(self):
        return self.values


class Broken(Median):
    def compute(self):
        raise ZeroDivisionError("nothing positive")


@pytest.mark.parametrize(
    ("metric", "message"), [(Vector, r"'median' has shape \(7,\)"), (Broken, "ZeroDivisionError .* nothing positive")]
)
def test_what_is_no_number_is_refused_on_every_rank(backend, metric, message):
    trainer = trainer_on(backend, Task(metric()))
    with pytest.raises(ConfigError, match=message):
        trainer.evaluate(data(7), batch_size=2)
    trainer.task = Task()
    assert trainer.evaluate(data(7), batch_size=2)["median/count"] == 7


def test_ranks_with_other_metrics_are_told_so(backend):
    if backend.world_size == 1:
        return
    trainer = trainer_on(backend, Task(Vector() if backend.rank == 1 else None))
    with pytest.raises(ConfigError, match="evaluate differently: epoch_metrics is"):
        trainer.evaluate(data(7))


@pytest.mark.parametrize("to", ["rank0", "all"])
def test_predictions_are_in_the_data_sets_order(backend, to):
    trainer = trainer_on(backend, Task())
    for length in lengths(backend):
        found = trainer.predict(data(length), batch_size=2, to=to)
        if backend.rank and to == "rank0":
            assert found is None
            continue
        expected = trainer.replica.module(data(length).tensors[0].to(backend.device)).detach().cpu()
        assert torch.allclose(found["y"], expected, atol=1e-6)
        assert repr(found["told"]) == repr([{"n": n, "twice": torch.tensor([n, n])} for n in range(length)])


def test_predictions_are_of_rank_zeros_buffers_in_evaluation_mode(backend):
    class Shift(nn.Linear):
        def __init__(self):
            super().__init__(2, 1)
            self.register_buffer("shift", torch.zeros(()))

        def forward(self, x):
            return super().forward(x) * 0 + self.shift + self.training

    trainer = trainer_on(backend, Task(), Shift())
    trainer.replica.module.shift.fill_(backend.rank + 5)
    found = trainer.predict(data(9), batch_size=2, to="all")["y"]
    assert found.flatten().tolist() == [5.0] * 9
    assert trainer.replica.module.training


def test_predictions_in_a_folder_are_written_by_rank_zero_alone(backend, tmp_path):
    folder = tmp_path / "found"
    length = 6 * backend.world_size + 1
    told = trainer_on(backend, Task()).predict(data(length), batch_size=1, to=folder)
    assert str(told) == backend.broadcast_object(str(folder))
    assert folder.exists() == (backend.rank == 0)
    if backend.rank == 0:
        assert np.load(folder / "y.npy", mmap_mode="r").shape == (length, 1)
        lines = (folder / "told.jsonl").read_text().splitlines()
        assert [json.loads(line)["twice"] for line in lines] == [[n, n] for n in range(length)]


class Uneven(Task):
    """Gives the last sample another form."""

    def predict(self, model, batch):
        return batch[0].repeat(1, 2) if 6 in batch[1] else batch[0]


def test_predictions_that_do_not_fit_together_are_refused_on_every_rank(backend, tmp_path):
    trainer = trainer_on(backend, Uneven())
    for to in ("rank0", "all", tmp_path / "found"):
        with pytest.raises(
            ConfigError, match="predictions differ between batches: output is a tensor of float32 of shape"
        ):
            trainer.predict(data(7), batch_size=1, to=to)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_refused_on_every_rank(backend, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(OutputError, match="is there already"):
        trainer_on(backend, Task()).predict(data(7), to=tmp_path)

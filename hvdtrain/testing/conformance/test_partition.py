"""A data set that is cut once over the ranks: the gradients are those of one process on the same global batches."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

import hvdtrain
from hvdtrain.data.partition import SamplePartition
from hvdtrain.data.shards import PARTITIONS, own_shard, shard_of
from hvdtrain.errors import CheckpointError, ConfigError
from hvdtrain.launch.launchers import node_of

pytestmark = pytest.mark.feature("partition")

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
CUT_ONCE = [kind for kind in PARTITIONS if kind not in ("batch", "sample-own")]


class Own(Dataset):
    """A data set of which this rank has some samples only; reading another one fails."""

    def __init__(self, length, kept):
        self.x = torch.sin(torch.arange(length * 4, dtype=torch.float64)).reshape(length, 4)
        self.kept = kept

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if index not in self.kept:
            raise FileNotFoundError(f"sample {index} is on another disk")
        return self.x[index], self.x[index, :2].square()


def shards(backend, kind, length):
    nodes = backend.all_gather_object(node_of(backend.topology))
    return [shard_of(kind, length, rank, nodes) for rank in range(backend.world_size)]


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 2).double()


def trainer(backend, model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return hvdtrain.Trainer(
        backend, model, optimizer, loss=nn.functional.mse_loss, precision="fp64", seed=3, accumulate=2, **options
    )


def on_one_process(data, everyone, global_batch_size, epochs):
    """The plain loop over the global batches that the shards make together."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    cut = [
        SamplePartition(
            length=len(data),
            global_batch_size=global_batch_size,
            world_size=len(everyone),
            rank=shard.place,
            sizes=shard.sizes,
        )
        for shard in everyone
    ]
    for epoch in range(epochs):
        orders = [shard.order(shuffle=True, seed=3, epoch=epoch) for shard in everyone]
        for step in range(cut[0].steps_per_epoch):
            indices = []
            for part, order in zip(cut, orders, strict=True):
                for positions in part.step(step).micro_batches:
                    offset = 0 if part.sizes is None else sum(part.sizes[: part.rank])  # in the data of all ranks
                    indices += [offset + index for index in order[positions.start : positions.stop]]
            x, y = (torch.stack(column) for column in zip(*(data[index] for index in indices), strict=True))
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    return model


@pytest.mark.parametrize("kind", CUT_ONCE)
@pytest.mark.parametrize("length", [2, 17, 24])
def test_parts_that_stay_with_their_ranks_train_and_evaluate_as_one_process_does(backend, kind, length):
    everyone = shards(backend, kind, length)
    data = Own(length, everyone[backend.rank].kept)
    model = linear()
    result = trainer(backend, model).fit(data, data, epochs=2, global_batch_size=7, partition=kind)
    whole = Own(length, range(length))
    expected = on_one_process(whole, everyone, 7, epochs=2)
    assert result.samples == 2 * length
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    x, y = (torch.stack(column) for column in zip(*(whole[index] for index in range(length)), strict=True))
    with torch.no_grad():
        loss = float(nn.functional.mse_loss(expected(x), y))
    torch.testing.assert_close(result.eval_metrics["loss"], loss, **CLOSE)
    alone = trainer(backend, model).evaluate(data, batch_size=2, partition=kind)
    torch.testing.assert_close(alone["loss"], loss, **CLOSE)


def test_data_sets_of_their_own_and_of_any_length_train_and_evaluate_as_one_process_does(backend):
    sizes = [1 + 6 * rank for rank in range(backend.world_size)]
    everyone = [own_shard(rank, sizes) for rank in range(backend.world_size)]
    first, whole = sum(sizes[: backend.rank]), Own(sum(sizes), range(sum(sizes)))
    data = Subset(whole, range(first, first + sizes[backend.rank]))
    model = linear()
    result = trainer(backend, model).fit(data, data, epochs=2, global_batch_size=5, partition="sample-own")
    expected = on_one_process(whole, everyone, 5, epochs=2)
    assert result.samples == 2 * sum(sizes)
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    x, y = (torch.stack(column) for column in zip(*(whole[index] for index in range(len(whole))), strict=True))
    with torch.no_grad():
        torch.testing.assert_close(result.eval_metrics["loss"], float(nn.functional.mse_loss(expected(x), y)), **CLOSE)


def test_a_run_goes_on_in_the_middle_of_an_epoch_with_the_same_cut_alone(backend, tmp_path):
    folder = hvdtrain.Checkpoints(backend.broadcast_object(str(tmp_path)), keep=9)
    data = Own(17, range(17))

    def fit(**options):
        model = linear()
        arguments = {"partition": "sample", "epochs": 2, "global_batch_size": 4} | options
        trainer(backend, model, checkpoints=folder).fit(data, **arguments)
        return model

    expected = fit()
    fit(max_steps=3)
    middle = folder.find(backend)
    resumed = fit(resume_from=middle)
    for mine, theirs in zip(resumed.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(CheckpointError, match=r"which was 'sample over \d ranks' and is 'batch' now"):
        fit(resume_from=middle, partition="batch")


def test_a_length_that_promises_too_much_is_refused_on_every_rank(backend):
    class Lying(Own):
        def __getitem__(self, index):
            if index >= 8:
                raise IndexError(f"no sample {index}")
            return super().__getitem__(index)

    for kind in PARTITIONS:
        with pytest.raises(ConfigError, match=r"no sample 8\), and its length says 9 samples") as caught:
            trainer(backend, linear()).fit(Lying(9, range(9)), epochs=1, global_batch_size=4, partition=kind)
        assert len(set(backend.all_gather_object(str(caught.value)))) == 1

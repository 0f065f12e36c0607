"""Losses that are no means over samples: tokens, weighted classes, sums; batches in which nothing counts."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import hvdtrain
from hvdtrain.data.samplers import epoch_order
from hvdtrain.errors import ConfigError, TrainingError

pytestmark = pytest.mark.feature("weights")

IGNORED = -100
SENTENCES = 23
WORDS = 7


class Sentences(torch.utils.data.Dataset):
    """Of 1 to 9 words, some of which do not count; in every fifth, none does."""

    def __len__(self):
        return SENTENCES

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(index)
        length = 1 + index * 7 % 9
        words = torch.randint(WORDS, (length,), generator=draw)
        targets = torch.where(torch.rand(length, generator=draw) < 0.3, IGNORED, words.roll(-1))
        return words, torch.full_like(targets, IGNORED) if index % 5 == 0 else targets


def collate(samples):
    words, targets = zip(*samples, strict=True)
    pad = nn.utils.rnn.pad_sequence
    return pad(words, batch_first=True), pad(targets, batch_first=True, padding_value=IGNORED)


class Language:
    """Means over the words that count, which a batch may have none of: the loss is then NaN."""

    collate = staticmethod(collate)

    def loss(self, model, batch):
        words, targets = batch
        return cross_entropy(model(words).flatten(0, 1), targets.flatten())

    def weight_of(self, batch):
        return (batch[1] != IGNORED).sum()

    def metrics(self, model, batch):
        words, targets = batch
        right = (model(words).argmax(-1) == targets)[targets != IGNORED]
        return {"loss": self.loss(model, batch), "accuracy": (right.double().mean(), len(right))}


class Weighted(Language):
    """Means over the weights of the words' classes."""

    weights = torch.linspace(0.1, 2.3, WORDS, dtype=torch.float64)

    def loss(self, model, batch):
        words, targets = batch
        return cross_entropy(model(words).flatten(0, 1), targets.flatten(), self.weights)

    def weight_of(self, batch):
        targets = batch[1]
        return self.weights[targets[targets != IGNORED]].sum()


class Summed(Language):
    loss_reduction = "sum"
    weight_of = None

    def loss(self, model, batch):
        words, targets = batch
        return cross_entropy(model(words).flatten(0, 1), targets.flatten(), reduction="sum")

    def metrics(self, model, batch):
        return {"loss": self.loss(model, batch) / len(batch[0])}


def model_of():
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(WORDS, 5), nn.Linear(5, WORDS)).double()


def optimizer_of(model, lr=0.2):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def one_process(task, global_batch_size, epochs, lr):
    """The same with torch alone, a global batch at a time."""
    model, data = model_of(), Sentences()
    optimizer = optimizer_of(model, lr)
    for epoch in range(epochs):
        order = epoch_order(SENTENCES, shuffle=True, seed=0, epoch=epoch)
        for begin in range(0, SENTENCES, global_batch_size):
            batch = collate([data[int(i)] for i in order[begin : begin + global_batch_size]])
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
    with torch.no_grad():
        return model, task.metrics(model, collate([data[i] for i in range(SENTENCES)]))


def difference(model, other):
    return max(float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.costly(5)
@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("task", [Language, Weighted, Summed])
def test_the_mean_is_over_what_the_task_says(backend, task, accumulate):
    lr = 0.01 if task is Summed else 0.2
    model = model_of()
    trainer = hvdtrain.Trainer(
        backend, model, optimizer_of(model, lr), task=task(), precision="fp64", accumulate=accumulate
    )
    result = trainer.fit(Sentences(), Sentences(), epochs=2, global_batch_size=9, eval_batch_size=3)
    expected, metrics = one_process(task(), 9, 2, lr)
    assert difference(model, expected) < 1e-12
    for name, value in metrics.items():
        whole = value[0] if isinstance(value, tuple) else value
        assert math.isclose(result.eval_metrics[name], float(whole), rel_tol=1e-12)
    assert result.samples == 2 * SENTENCES


def test_the_logged_loss_is_a_mean_over_the_same(backend):
    model, task, data = model_of(), Language(), Sentences()
    trainer = hvdtrain.Trainer(backend, model, optimizer_of(model, lr=0.0), task=task, precision="fp64")
    result = trainer.fit(data, epochs=1, global_batch_size=5)
    whole = task.loss(model, collate([data[i] for i in range(SENTENCES)]))
    assert math.isclose(result.train_loss, whole.item(), rel_tol=1e-12)


def test_an_own_loop_weighs_by_tokens(backend):
    """Each rank has another number of words, and the last one none that count."""
    data = Sentences()
    mine = collate([data[i] for i in range(backend.rank, SENTENCES, backend.world_size)])
    if backend.rank == backend.world_size - 1 > 0:
        mine = mine[0], torch.full_like(mine[1], IGNORED)
    model, task = model_of(), Language()
    replica = backend.replicate(model, optimizer_of(model))
    for accumulate in (False, True):
        if accumulate:
            with replica.accumulate(last=False):
                replica.backward(task.loss(model, mine), samples=len(mine[0]), weight=task.weight_of(mine))
        replica.backward(task.loss(model, mine), samples=len(mine[0]), weight=task.weight_of(mine))
        assert replica.step().samples == SENTENCES * (1 + accumulate)
    alone = model_of()
    optimizer = optimizer_of(alone)
    counted = [
        (words[targets != IGNORED], targets[targets != IGNORED]) for words, targets in backend.all_gather_object(mine)
    ]
    words, targets = (torch.cat(part) for part in zip(*counted, strict=True))
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(alone(words), targets).backward()
        optimizer.step()
    assert difference(model, alone) < 1e-12


def test_a_known_total_weight_gives_the_same(backend):
    results = []
    for total in (None, sum(range(1, backend.world_size + 1)) / 3):
        model = model_of()
        replica = backend.replicate(model, optimizer_of(model))
        loss = model(torch.tensor([backend.rank])).square().mean()
        replica.backward(loss, samples=1, weight=(backend.rank + 1) / 3, total=total)
        replica.step()
        results.append(model)
    assert difference(*results) < 1e-12


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_that_cannot_be_is_refused(backend, weight):
    model = model_of()
    replica = backend.replicate(model, optimizer_of(model))
    with pytest.raises(TrainingError, match="0 or more"):
        replica.backward(model(torch.tensor([1])).mean(), samples=1, weight=weight)

    class Wrong(Language):
        def weight_of(self, batch):
            return weight

    trainer = hvdtrain.Trainer(backend, model, optimizer_of(model), task=Wrong(), precision="fp64")
    with pytest.raises(ConfigError, match="weight_of"):
        trainer.fit(Sentences(), epochs=1, global_batch_size=8)


class Nothing(Language):
    def weight_of(self, batch):
        return 0


def test_a_step_in_which_nothing_counts_is_refused_or_skipped_on_every_rank(backend):
    model = model_of()
    replica = backend.replicate(model, optimizer_of(model))
    for end in (replica.step, replica.reduce_gradients):
        replica.backward(model(torch.tensor([1])).mean() * math.nan, samples=1, weight=0)
        with pytest.raises(TrainingError, match="no loss of this step had any weight"):
            end()
        replica.clear()
    replica.backward(model(torch.tensor([1])).mean() * math.nan, samples=1, weight=0)
    assert replica.step(skip_nonfinite=True).skipped
    assert difference(model, model_of()) == 0
    trainer = hvdtrain.Trainer(backend, model, optimizer_of(model), task=Nothing(), precision="fp64", on_nan="skip")
    assert trainer.fit(Sentences(), epochs=1, global_batch_size=8).skipped_steps == 3
    assert difference(model, model_of()) == 0
    with pytest.raises(ConfigError, match="no mean"):
        trainer.evaluate(Sentences(), batch_size=4)


@pytest.mark.parametrize("value", ["many", None, torch.ones(2), [1, 2]])
def test_what_weighs_is_one_number(backend, value):
    class Wrong(Language):
        def weight_of(self, batch):
            return value

    model = model_of()
    trainer = hvdtrain.Trainer(backend, model, optimizer_of(model), task=Wrong(), precision="fp64")
    with pytest.raises(ConfigError, match="weight_of must return"):
        trainer.fit(Sentences(), epochs=1, global_batch_size=8)


def test_a_reduction_is_mean_or_sum(backend):
    for change, message in (({"loss_reduction": "max"}, "'mean' or 'sum'"), ({"loss_reduction": "sum"}, "leave one")):
        wrong = type("Wrong", (Language,), change)
        model = model_of()
        with pytest.raises(ConfigError, match=message):
            hvdtrain.Trainer(backend, model, optimizer_of(model), task=wrong(), precision="fp64")


# -- batches with other numbers of samples than they were made of ------------------------------------------------------


class Damaged(torch.utils.data.Dataset):
    """Numbers, some of them broken; the first ten are whole."""

    def __len__(self):
        return 26

    def __getitem__(self, index):
        x = torch.sin(torch.arange(3.0, dtype=torch.float64) + index)
        return x, x[:1].square(), index in (11, 12, 13, 20)


def without_the_broken(samples):
    x, y, broken = (torch.stack([torch.as_tensor(value) for value in column]) for column in zip(*samples, strict=True))
    return x[~broken], y[~broken]


class Counted:
    """A batch may have no sample left: the mean is then NaN."""

    collate = staticmethod(without_the_broken)

    def loss(self, model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    def samples_of(self, batch):
        return len(batch[0])

    def metrics(self, model, batch):
        return {"loss": self.loss(model, batch)}


def on_damaged(backend, task, global_batch_size=6, evaluate=True, **options):
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = hvdtrain.Trainer(backend, model, optimizer, task=task, precision="fp64", seed=2, accumulate=2, **options)
    held_out = Damaged() if evaluate else None
    result = trainer.fit(Damaged(), held_out, epochs=2, global_batch_size=global_batch_size, eval_batch_size=2)
    return result, model


def test_a_step_weighs_the_samples_that_a_batch_has_left(backend):
    result, model = on_damaged(backend, Counted())
    torch.manual_seed(0)
    alone = nn.Linear(3, 1).double()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for epoch in range(2):
        order = epoch_order(26, shuffle=True, seed=2, epoch=epoch).tolist()
        losses = []
        for start in range(0, 26, 6):
            batch = without_the_broken([Damaged()[index] for index in order[start : start + 6]])
            optimizer.zero_grad()
            loss = Counted().loss(alone, batch)
            losses.append((loss.item(), len(batch[0])))
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(model.weight, alone.weight, rtol=1e-12, atol=1e-12)
    mean = sum(loss * samples for loss, samples in losses) / 22
    assert result.train_loss == pytest.approx(mean, rel=1e-10)
    whole = Counted().metrics(alone, without_the_broken([Damaged()[index] for index in range(26)]))
    assert result.eval_metrics["loss"] == pytest.approx(whole["loss"].item(), rel=1e-10)


def test_samples_that_a_collate_function_drops_without_a_word_are_refused(backend):
    def dropping(samples):
        first = samples[0][0]
        return without_the_broken([(x, y, x is not first and not x.equal(first)) for x, y, _ in samples])

    class Silent(Counted):
        collate = staticmethod(dropping)
        samples_of = None

    with pytest.raises(
        ConfigError, match=r"a batch of \d samples has 1 after collate= .*batch\[0\], dimension 0.*samples_of"
    ):
        on_damaged(backend, Silent(), global_batch_size=12)


@pytest.mark.parametrize("found", [-1, 2.5, "2", None, True])
def test_a_number_of_samples_that_is_none_is_refused(backend, found):
    class Odd(Counted):
        def samples_of(self, batch):
            return found

    with pytest.raises(ConfigError, match=r"samples_of must return how many samples the batch has"):
        on_damaged(backend, Odd())


def test_a_step_without_any_sample_left_is_refused_or_skipped(backend):
    class Broken(Counted):
        def samples_of(self, batch):
            return 0

    with pytest.raises(TrainingError, match="weight"):
        on_damaged(backend, Broken())
    result, _ = on_damaged(backend, Broken(), on_nan="skip", evaluate=False)
    assert (result.steps, result.skipped_steps) == (10, 10)

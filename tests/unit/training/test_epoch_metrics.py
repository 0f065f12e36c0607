"""Metrics that are no means over samples: over ranks they are what one process computes, or are refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import ConfigError
from hvdtrain.testing.threads import run_ranks
from hvdtrain.training.epoch_metrics import EpochMetrics, numbers_of
from hvdtrain.training.metric_state import merge, prepare, state_of

torchmetrics = pytest.importorskip("torchmetrics")
classification, detection, wrappers = torchmetrics.classification, torchmetrics.detection, torchmetrics.wrappers

LENGTH, CLASSES, BATCH = 23, 4, 3
CPU = torch.device("cpu")


def scores():
    torch.manual_seed(0)
    return torch.rand(LENGTH, CLASSES).softmax(1), torch.randint(CLASSES, (LENGTH,))


def tokens():
    torch.manual_seed(1)
    return torch.randn(LENGTH, 7, CLASSES), torch.randint(CLASSES, (LENGTH, 7))


def choices():
    outputs, targets = tokens()
    return outputs.argmax(-1), targets


def values():
    torch.manual_seed(2)
    return (torch.randn(LENGTH, dtype=torch.float64),)


def two_values():
    torch.manual_seed(3)
    x = torch.randn(LENGTH)
    return x, x + torch.randn(LENGTH)


def texts():
    said = [f"the cat {i % 5} sat on {i % 3}" for i in range(LENGTH)]
    return said, [f"a cat {i % 4} sat on {i % 3}" for i in range(LENGTH)]


def boxes(masks=False):
    torch.manual_seed(4)
    found, there = [], []
    for i in range(LENGTH):
        corners = torch.rand(i % 4 + 1, 2) * 40
        truth = torch.cat([corners, corners + 20], 1)
        label = torch.randint(3, (len(truth),))
        guess = truth + torch.randn_like(truth) * 2
        found.append({"boxes": guess, "scores": torch.rand(len(truth)), "labels": label})
        there.append({"boxes": truth, "labels": label})
        if masks:
            for one in (found[-1], there[-1]):
                one["masks"] = torch.stack([box_mask(box) for box in one["boxes"]])
    return found, there


def box_mask(box):
    mask = torch.zeros(64, 64, dtype=torch.bool)
    left, top, right, bottom = box.clamp(0, 63).int().tolist()
    mask[top : bottom + 1, left : right + 1] = True
    return mask


def collection(**options):
    one = {"f1": classification.MulticlassF1Score(CLASSES), "recall": classification.MulticlassRecall(CLASSES)}
    return torchmetrics.MetricCollection(one | {"auroc": classification.MulticlassAUROC(CLASSES)}, **options)


class Tasks(wrappers.MultitaskWrapper):
    """Two heads, one of them measured by a collection, which shares states once it has been updated."""

    def __init__(self):
        super().__init__({"one": classification.MulticlassAccuracy(CLASSES), "other": collection()})

    def update(self, outputs, targets):
        super().update({"one": outputs, "other": outputs}, {"one": targets, "other": targets})


TABLE = {
    "F1 macro": (lambda: classification.MulticlassF1Score(CLASSES, average="macro"), scores),
    "F1 of each class": (lambda: classification.MulticlassF1Score(CLASSES, average=None), scores),
    "accuracy macro": (lambda: classification.MulticlassAccuracy(CLASSES, average="macro"), scores),
    "of each sample": (lambda: classification.MulticlassExactMatch(CLASSES, multidim_average="samplewise"), choices),
    "AUROC": (lambda: classification.MulticlassAUROC(CLASSES), scores),
    "AUROC in bins": (lambda: classification.MulticlassAUROC(CLASSES, thresholds=20), scores),
    "confusion matrix": (lambda: classification.MulticlassConfusionMatrix(CLASSES), scores),
    "perplexity": (torchmetrics.text.Perplexity, tokens),
    "mean": (torchmetrics.MeanMetric, values),
    "sum": (torchmetrics.SumMetric, values),
    "max": (torchmetrics.MaxMetric, values),
    "min": (torchmetrics.MinMetric, values),
    "all values": (torchmetrics.CatMetric, values),
    "Pearson": (torchmetrics.PearsonCorrCoef, two_values),
    "Spearman": (torchmetrics.SpearmanCorrCoef, two_values),
    "R2": (torchmetrics.R2Score, two_values),
    "PSNR": (lambda: torchmetrics.image.PeakSignalNoiseRatio(data_range=2.0), two_values),
    "BLEU": (torchmetrics.text.BLEUScore, texts),
    "word error rate": (torchmetrics.text.WordErrorRate, texts),
    "collection": (collection, scores),
    "collection without groups": (lambda: collection(compute_groups=False), scores),
    "collection with a prefix": (lambda: collection(prefix="val/"), scores),
    "collection of two": (lambda: torchmetrics.MetricCollection([collection(prefix="a_"), collection(prefix="b_")]), scores),
    "composition": (lambda: classification.MulticlassF1Score(CLASSES) * 2 + classification.MulticlassRecall(CLASSES), scores),
    "each class by name": (lambda: wrappers.ClasswiseWrapper(classification.MulticlassRecall(CLASSES, average=None)), scores),
    "several tasks": (Tasks, scores),
    "least and most": (lambda: wrappers.MinMaxMetric(classification.MulticlassRecall(CLASSES)), scores),
    "mean average precision": (detection.MeanAveragePrecision, boxes),
    "mean average precision of masks": (lambda: detection.MeanAveragePrecision(iou_type="segm"), lambda: boxes(masks=True)),
}  # fmt: skip


def updated(metric, content, part, batch=BATCH):
    for start in range(part.start, part.stop, batch):
        metric.update(*(one[start : min(start + batch, part.stop)] for one in content))
    return metric


def over_ranks(make, content, parts):
    """What the first rank with samples computes of all ranks' parts."""
    by = next(rank for rank, part in enumerate(parts) if len(part))

    def body(communicator):
        rank = communicator.wire.rank
        metric = make()
        prepare(metric, CPU)
        states = communicator.gather_object(state_of(updated(metric, content, parts[rank])), by)
        if states is None:
            return None
        merge(metric, states, by)
        return metric.compute()

    return run_ranks(len(parts), body)[by]


def assert_equal(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_equal(found[key], expected[key])
    else:
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize(
    "lengths",
    [[23], [12, 11], [8, 8, 7], [0, 23], [23, 0, 0], [1, 0, 20, 2]],
    ids=lambda lengths: "+".join(map(str, lengths)),
)
def test_a_metric_over_ranks_is_what_one_process_computes(name, lengths):
    make, content = TABLE[name]
    content = content()
    ends = torch.tensor(lengths).cumsum(0).tolist()
    parts = [range(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    assert_equal(over_ranks(make, content, parts), updated(make(), content, range(LENGTH)).compute())


class Classes:
    """A task that measures a classifier of numbers by whatever it is given."""

    def __init__(self, epoch_metrics, update=lambda metric, outputs, targets: metric.update(outputs, targets)):
        self.epoch_metrics, self._update = epoch_metrics, update

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def metrics(self, model, batch):
        outputs = model(batch[0])
        given = self.epoch_metrics
        for metric in given.values() if isinstance(given, dict) else [given]:
            self._update(metric, outputs, batch[1])
        return {"loss": nn.functional.cross_entropy(outputs, batch[1])}


def evaluate(alone, task):
    torch.manual_seed(5)
    model = nn.Linear(CLASSES, CLASSES)
    trainer = hvdtrain.Trainer(alone, model, torch.optim.SGD(model.parameters()), task=task)
    return trainer.evaluate(ArrayDataset(*scores()), batch_size=BATCH)


def test_a_trainer_reports_what_is_no_mean_beside_what_is_one(alone):
    metrics = {"f1": classification.MulticlassF1Score(CLASSES), "all": collection()}
    task = Classes(metrics)
    first, second = evaluate(alone, task), evaluate(alone, task)
    assert list(first) == ["loss", "f1", "all/auroc", "all/f1", "all/recall"]
    assert first == second
    assert first["f1"] == first["all/f1"]
    assert metrics["f1"].update_count == 0


def test_a_collection_alone_keeps_its_names(alone):
    assert list(evaluate(alone, Classes(collection(prefix="val/")))) == ["loss", "val/auroc", "val/f1", "val/recall"]


class Counter:
    """A metric of nobody's library: how many samples there were, and how many batches."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.samples = self.batches = 0

    def update(self, outputs, targets):
        self.samples += len(targets)
        self.batches += 1

    def compute(self):
        return {"samples": self.samples, "batches": self.batches}

    def merge_state(self, others):
        for other in others:
            self.samples += other.samples
            self.batches += other.batches


def test_an_object_of_ones_own_is_merged_by_itself(alone):
    found = evaluate(alone, Classes({"seen": Counter()}))
    assert (found["seen/samples"], found["seen/batches"]) == (LENGTH, 8)


def test_what_was_updated_before_does_not_count(alone):
    f1 = classification.MulticlassF1Score(CLASSES)
    clean = evaluate(alone, Classes({"f1": f1}))
    f1.update(*scores())
    assert evaluate(alone, Classes({"f1": f1})) == clean


SHARED = classification.MulticlassF1Score(CLASSES)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"f": SHARED, "g": SHARED}, "'f' and 'g' hold the same MulticlassF1Score"),
        ({"f": SHARED, "g": torchmetrics.MetricCollection({"x": SHARED})}, "'f' and 'g' hold the same MulticlassF1Score"),
        ({"f": object()}, "'f' cannot be computed over ranks: a object has not the methods update, compute and reset"),
        ({"f": torchmetrics.wrappers.MetricTracker(SHARED)}, "give it merge_state"),
        ({"f": wrappers.Running(torchmetrics.SumMetric(), 3)}, "a Running is computed over the last updates alone"),
        ({"f": torchmetrics.aggregation.RunningMean(3)}, "a RunningMean is computed over the last updates alone"),
        ([SHARED], "epoch_metrics must be a dictionary of metrics by name, got a list"),
        ({1: SHARED}, "epoch_metrics must be a dictionary of metrics by name"),
    ],
    ids=["twice", "twice inside", "no metric", "no merging", "window", "running mean", "list", "number"],
)  # fmt: skip
def test_what_cannot_be_computed_over_ranks_is_refused_when_the_trainer_is_made(alone, metrics, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(alone, Classes(metrics))


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (torchmetrics.CatMetric, r"epoch metric 'it' has shape \(72,\), and must give a number or a dictionary"),
        (lambda: classification.MulticlassF1Score(CLASSES, average=None), r"'it' has shape \(4,\).*ClasswiseWrapper"),
        (lambda: torchmetrics.MetricCollection([torchmetrics.CatMetric()]), "'it' gives no number"),
    ],
    ids=["each sample", "each class", "a dictionary of vectors"],
)  # fmt: skip
def test_what_is_no_number_is_refused_by_name(alone, metric, message):
    def update(metric, outputs, targets):
        if isinstance(metric, classification.MulticlassF1Score):
            metric.update(outputs, targets)
        else:
            metric.update(torch.arange(9.0))

    with pytest.raises(ConfigError, match=message):
        evaluate(alone, Classes({"it": metric()}, update))


def test_a_metric_that_the_task_never_updates_is_named(alone):
    task = Classes({"f1": classification.MulticlassF1Score(CLASSES)}, update=lambda *_: None)
    with pytest.raises(ConfigError, match="'f1' was never updated; call its update"):
        evaluate(alone, task)


def test_two_results_of_one_name_are_refused(alone):
    with pytest.raises(ConfigError, match="two metrics are called 'loss'"):
        evaluate(alone, Classes({"loss": classification.MulticlassF1Score(CLASSES)}))


def test_of_a_dictionary_the_numbers_are_reported():
    assert numbers_of("map", {"map": torch.tensor(0.5), "classes": torch.tensor([0, 2])}) == {"map/map": 0.5}


class Failing(Counter):
    def compute(self):
        raise ValueError("no positive sample")


class OfOneRank:
    def __init__(self, metric):
        self.epoch_metrics = {"it": metric}


def body(communicator, make, update):
    task = OfOneRank(make())
    metrics = EpochMetrics(task, CPU)
    update(task.epoch_metrics["it"], communicator.wire.rank)
    try:
        return metrics.compute(communicator, {})
    except ConfigError as error:
        return str(error)


def test_every_rank_is_told_the_same_and_an_error_too():
    told = run_ranks(3, lambda ranks: body(ranks, Counter, lambda it, rank: it.update(None, range(rank))))
    assert told == [{"it/samples": 3.0, "it/batches": 3.0}] * 3
    told = run_ranks(3, lambda ranks: body(ranks, Failing, lambda it, rank: None))
    assert told == ["ValueError in the task's epoch_metrics: no positive sample"] * 3


def test_a_collection_that_groups_its_metrics_otherwise_on_one_rank_is_refused():
    def make():
        one = {"all": classification.MulticlassAccuracy(2, average="micro")}
        return torchmetrics.MetricCollection(
            one | {"some": classification.MulticlassAccuracy(2, average="micro", ignore_index=0)}
        )

    def update(it, rank):
        it.update(torch.tensor([1, 1]), torch.tensor([1, rank]))  # no 0 among rank 1's first: both metrics look alike

    told = run_ranks(2, lambda ranks: body(ranks, make, update))
    assert set(told) == {told[0]}
    assert "compute_groups=False" in told[0]

import pytest
import torch
from torch import nn

from hvdtrain.training.task import MANY_CLASSES, Supervised


@pytest.mark.parametrize("classes", [5, MANY_CLASSES - 1, MANY_CLASSES, 1000])
def test_top_5_accuracy_of_many_classes(classes):
    torch.manual_seed(0)
    scores, targets = torch.randn(40, classes), torch.randint(classes, (40,))
    found = Supervised(nn.functional.cross_entropy).metrics(nn.Identity(), (scores, targets))
    ranks = [(row > row[target]).sum() for row, target in zip(scores, targets, strict=True)]
    assert float(found["accuracy"]) == sum(rank == 0 for rank in ranks) / 40
    assert ("accuracy_top5" in found) == (classes >= MANY_CLASSES)
    if classes >= MANY_CLASSES:
        assert float(found["accuracy_top5"]) == sum(rank < 5 for rank in ranks) / 40

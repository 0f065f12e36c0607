"""What comes of a compression of one's own is looked at before gradients are made of it."""

import pytest
import torch

from hvdtrain import Compression, Gather, Sent, Sum
from hvdtrain.backends.coded import Coded, begun
from hvdtrain.backends.wire import SelfWire
from hvdtrain.errors import TrainingError


class Ending(Compression):
    name = "ending"

    def __init__(self, end):
        self.end = end

    def exchange(self, tensor, memory, seed):
        total = yield Sum(tensor)
        return self.end(total, tensor)


class Yielding(Compression):
    name = "yielding"

    def __init__(self, item):
        self.item = item

    def exchange(self, tensor, memory, seed):
        yield Sum(tensor)
        yield self.item(tensor)
        return Sent(tensor.clone())


class Returning(Compression):
    name = "returning"

    def exchange(self, tensor, memory, seed):
        return Sent(tensor)


def exchanged(compression, part):
    coded = Coded(SelfWire(torch.device("cpu")), [begun(compression, part, {}, 1)], torch.zeros(()))
    coded.wait()
    return coded.sent[0]


@pytest.mark.parametrize(
    ("compression", "said"),
    [
        (
            Returning(),
            r"compression returning: exchange\(\) must yield hvdtrain.Sum or hvdtrain.Gather, and returned Sent",
        ),
        (Ending(lambda total, part: None), r"compression ending: exchange\(\) must end with .*, not None"),
        (Ending(lambda total, part: total), r"must end with `return hvdtrain.Sent\(total, own, memory\)`, not tensor"),
        (Ending(lambda total, part: Sent(total.sum())), r"Sent's total must be .*\(2, 3\), not one of shape \(\)"),
        (Ending(lambda total, part: Sent(total.view(-1))), r"Sent's total must be .*, not one of shape \(6,\)"),
        (Ending(lambda total, part: Sent(1.0)), r"Sent's total must be .*, not 1.0"),
        (Ending(lambda total, part: Sent(total, part[:1])), r"Sent's own must be .*, not one of shape \(1, 3\)"),
        (Ending(lambda total, part: Sent(total, part, {"n": 3})), r"memory must be tensors, .* and 'n' is 3"),
        (Yielding(lambda part: part), r"a compression yielded tensor.*; what travels is a hvdtrain.Sum"),
        (Yielding(lambda part: ()), r"a compression yielded \(\); what travels"),
        (Yielding(lambda part: (Gather(part), part)), r"a compression yielded \(Gather.*; what travels"),
        (Yielding(lambda part: Sum(part.long())), r"a compression yielded Sum of torch.int64; float32 and float64"),
    ],
)
def test_what_is_no_exchange_is_refused(compression, said):
    with pytest.raises(TrainingError, match=f"(?s){said}"):
        exchanged(compression, torch.ones(2, 3))


def test_numbers_of_another_type_and_with_a_graph_are_taken_as_the_parts():
    scale = torch.ones((), requires_grad=True)
    sent = exchanged(Ending(lambda total, part: Sent((total * scale).bfloat16(), part.double())), torch.ones(2, 3))
    assert (sent.total.dtype, sent.own.dtype, sent.total.requires_grad) == (torch.float32, torch.float32, False)


def test_what_is_remembered_does_not_change_with_the_part():
    part = torch.ones(2, 3)
    sent = exchanged(Ending(lambda total, part: Sent(total, part, {"last": part.view(-1)})), part)
    part.sub_(1)  # as is done to find what was not sent
    assert torch.equal(sent.memory["last"], torch.ones(6))

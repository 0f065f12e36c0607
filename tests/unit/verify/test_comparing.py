"""Which difference is named, and which cause, from notes of two ranks and of one process."""

from __future__ import annotations

import copy

import pytest
import torch

from hvdtrain.verify.comparing import between, twice, uncompared
from hvdtrain.verify.notes import Call, Notes, Step, numbers, part_digests, read, sample_digests

CLOSE = 1e-9


def step(samples, loss, gradient, *, random, parameter=1.0, buffer=0.0, changed=()):
    return Step(
        calls=[Call(samples=list(samples), loss=loss, changed=list(changed), random=random, weight=len(samples))],
        gradients={"w": torch.tensor([gradient, -2 * gradient], dtype=torch.float64)},
        buffers={"b": torch.tensor([buffer], dtype=torch.float64)},
        parameters={"w": torch.tensor([parameter, 2.0], dtype=torch.float64)},
    )


def notes(rank, world, *steps):
    return Notes(rank=rank, world_size=world, initial={"w": torch.zeros(2, dtype=torch.float64)}, steps=list(steps))


def alone():
    return [notes(0, 1, step("abcd", 2.5, 1.0, random="x"), step("efgh", 2.0, 3.0, random="y"))]


def together():
    """The same on two ranks, which have one and three samples in the first step."""
    return [
        notes(0, 2, step("a", 1.0, 1.0, random="x0"), step("ef", 1.0, 3.0, random="y0")),
        notes(1, 2, step("dcb", 3.0, 1.0, random="x1"), step("hg", 3.0, 3.0, random="y1")),
    ]


def test_what_is_alike_is_not_named():
    assert list(between(alone(), together(), close=CLOSE)) == []
    assert list(twice(alone(), alone(), close=CLOSE)) == []


def all_steps(ranks, change):
    for each in ranks:
        for one in each.steps:
            change(one)


def scale(factor):
    def change(ranks):
        all_steps(ranks, lambda one: one.gradients.update(w=one.gradients["w"] * factor))

    return change


def other_start(ranks):
    ranks[1].initial["w"][1] = 5


def one_sample_twice(ranks):
    ranks[1].steps[1].calls[0].samples[0] = "e"


def alike_random(ranks):
    all_steps(ranks, lambda one: setattr(one.calls[0], "random", "same"))


def in_place(ranks):
    ranks[0].steps[0].calls[0].changed.append("batch['x']")


def own_buffer(ranks):
    ranks[1].steps[1].buffers["b"][0] = 7


def turned(ranks):
    all_steps(ranks, lambda one: one.gradients.update(w=one.gradients["w"].flip(0)))


def normed(ranks):
    turned(ranks)
    ranks[0].norms.append("layers.1")


def other_loss(ranks):
    ranks[0].steps[0].calls[0].loss = 9.0


def other_parameter(ranks):
    for each in ranks:
        each.steps[1].parameters["w"][0] = 1.5


def too_few(ranks):
    ranks[1].steps.pop()


@pytest.mark.parametrize(
    ("change", "where", "what", "cause"),
    [
        (other_start, "before training", "rank 1 makes another w", "depends on the rank"),
        (one_sample_twice, "step 2, data", "1 of 4 samples", "depends on the rank"),
        (alike_random, "step 1, loss", "random numbers of all ranks are the same", "torch.manual_seed"),
        (in_place, "step 1, data", "changes batch['x'] in place", "x = x * 2"),
        (scale(2), "step 1, gradients", "w is 2 times", "summed over the ranks"),
        (scale(0.5), "step 1, gradients", "w is 0.5 times", "sum over the samples"),
        (scale(1.7), "step 1, gradients", "w is 1.7 times", "size of the batch"),
        (turned, "step 1, gradients", "w is not one process's", "which samples are together"),
        (normed, "step 1, gradients", "w is not one process's", "--sync-batch-norm"),
        (other_loss, "step 1, loss", "one process has 2.5, the ranks' mean is 4.5", "no mean over the samples"),
        (own_buffer, "step 2, buffers", "b of rank 1 is not rank 0's", "its rank's samples alone"),
        (other_parameter, "step 2, parameters", "w is not one process's", "depends on the rank"),
        (too_few, "step 2", "some rank has not made it", "output"),
    ],
)
def test_the_first_difference_is_named_with_its_cause(change, where, what, cause):
    ranks = together()
    change(ranks)
    found = next(between(alone(), ranks, close=CLOSE))
    assert found.where == where
    assert what in found.what
    assert cause in found.cause


def loss_draws(ranks):
    turned(ranks)
    all_steps(ranks, lambda one: setattr(one.calls[0], "loss_drew", True))


def data_draw(ranks):
    turned(ranks)
    one_sample_twice(ranks)
    all_steps(ranks, lambda one: setattr(one.calls[0], "data_drew", True))


@pytest.mark.parametrize(("draw", "why"), [(loss_draws, "the loss"), (data_draw, "the data set")])
def test_random_numbers_are_no_fault_and_ranks_are_still_compared(draw, why):
    ranks = together()
    draw(ranks)
    assert why in uncompared(alone(), ranks)
    assert list(between(alone(), ranks, close=CLOSE)) == []
    ranks[1].steps[1].parameters["w"][0] = 7
    assert next(between(alone(), ranks, close=CLOSE)).what == "w of rank 1 is not rank 0's"
    assert uncompared(alone(), together()) == ""


def test_losses_are_compared_as_the_task_reduces_them():
    ranks = together()
    for each, weight, loss in zip(ranks, (9.0, 1.0), (1.0, 16.0), strict=True):  # by tokens, say: (9 + 16) / 10
        each.steps[0].calls[0].weight, each.steps[0].calls[0].loss = weight, loss
    assert list(between(alone(), ranks, close=CLOSE)) == []
    summed = together()
    for each in summed:
        each.summed = True
    summed[0].steps[0].calls[0].loss, summed[1].steps[0].calls[0].loss = 1.5, 1.0
    summed[0].steps[1].calls[0].loss, summed[1].steps[1].calls[0].loss = 1.5, 0.5
    assert list(between(alone(), summed, close=CLOSE)) == []


def test_padding_depends_on_the_batch_and_is_no_fault():
    ranks = together()
    one_sample_twice(ranks)
    ranks[1].steps[1].calls[0].shapes = "[(5,)]"
    assert list(between(alone(), ranks, close=CLOSE)) == []


def test_what_no_seed_governs_is_seen_by_running_twice():
    other = alone()
    other[0].steps[1].calls[0].samples[0] = "z"
    assert [found.where for found in twice(alone(), other, close=CLOSE)] == ["step 2, data"]
    other = alone()
    other[0].initial["w"][0] = 3
    assert [found.where for found in twice(alone(), other, close=CLOSE)] == ["before training"]


def test_rounding_is_no_difference_and_a_nan_is_one():
    ranks = together()
    all_steps(ranks, lambda one: one.gradients["w"].mul_(1 + 1e-12))
    assert list(between(alone(), ranks, close=CLOSE)) == []
    ranks[0].steps[0].gradients["w"][0] = torch.nan
    assert next(between(alone(), ranks, close=CLOSE)).where == "step 1, gradients"


def test_notes_come_back_as_they_were_written(tmp_path):
    written = together()
    for each in reversed(written):
        each.write(tmp_path)
    found = read(tmp_path)
    assert [each.rank for each in found] == [0, 1]
    assert found[1].steps[0].calls == written[1].steps[0].calls
    assert torch.equal(found[1].steps[1].gradients["w"], written[1].steps[1].gradients["w"])


def test_samples_are_known_wherever_they_lie_and_whatever_holds_them():
    x, y = torch.arange(12.0).reshape(4, 3), torch.arange(4)
    whole = sample_digests({"x": x, "y": y.numpy(), "nothing": None})
    parts = [sample_digests({"x": x[i : i + 2].t().contiguous().t(), "y": y[i : i + 2].numpy()}) for i in (0, 2)]
    assert whole is not None
    assert whole == [*parts[0], *parts[1]]
    assert len(set(whole)) == 4
    assert sample_digests((x, y[:3])) is None
    assert sample_digests((x, torch.tensor(1.0))) is None
    assert sample_digests((x[:0], y[:0])) == []


def test_a_change_in_place_is_seen_by_the_part_that_it_changed():
    batch = {"x": torch.ones(2, 2, dtype=torch.bfloat16), "words": ["a", "b"]}
    before = part_digests(batch)
    kept = copy.deepcopy(batch)
    batch["x"].mul_(2)
    batch["words"][1] = "c"
    changed = [path for path, digest in part_digests(batch).items() if before[path] != digest]
    assert changed == ["batch['x']", "batch['words'][1]"]
    assert part_digests(kept) == before


def test_large_tensors_are_noted_by_some_of_their_numbers():
    found = numbers([("w", torch.arange(1_000_000.0)), ("c", torch.tensor([1 + 2j])), ("e", torch.empty(0))])
    assert 10_000 <= found["w"].numel() <= 20_000
    assert found["c"].tolist() == [1.0, 2.0]
    assert found["e"].numel() == 0

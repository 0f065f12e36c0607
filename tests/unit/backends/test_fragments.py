import pytest
import torch

from hvdtrain.backends.fragments import cut
from hvdtrain.errors import ConfigError
from hvdtrain.settings.sync import Sync, sync_of


@pytest.mark.parametrize(
    ("sizes", "number", "parts"),
    [
        ([1, 1, 1, 1], 2, [0, 0, 1, 1]),
        ([4, 1, 1], 3, [0, 1, 2]),
        ([1, 1, 100], 2, [0, 0, 1]),
        ([100, 1, 1], 2, [0, 1, 1]),
        ([5], 1, [0]),
        ([0, 0, 0], 2, [0, 0, 1]),
        ([10, 10, 10, 10, 10, 10], 3, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_parts_are_runs_of_about_equally_many_numbers_and_none_is_empty(sizes, number, parts):
    assert cut(sizes, number) == parts


@pytest.mark.parametrize("number", range(1, 8))
def test_no_part_is_empty_whatever_the_sizes(number):
    for sizes in ([1000, *[1] * 6], [*[1] * 6, 1000], [1, 50, 3, 900, 2, 2, 70], [0] * 7):
        parts = cut(sizes, number)
        assert sorted(set(parts)) == list(range(number))
        assert parts == sorted(parts)


def test_each_fragment_has_a_step_of_its_own_and_the_last_is_due_after_all_of_them():
    for steps in range(1, 12):
        for fragments in range(1, steps + 1):
            due = [Sync(steps, fragments=fragments).first_due(number) for number in range(fragments)]
            assert len(set(due)) == fragments
            assert due[0] >= 1
            assert due[-1] == steps


def test_a_sync_is_read_from_text():
    assert sync_of("diloco:100,delay=10,fragments=4") == Sync(100, 0.7, 0.9, delay=10, fragments=4)
    assert sync_of("local-sgd:8,fragments=2") == Sync(8, fragments=2)
    assert sync_of("every-step") is None


@pytest.mark.parametrize("value", ["1", None, True, 1j, float("nan"), float("inf"), -1, torch.tensor(0.5)])
@pytest.mark.parametrize("name", ["outer_lr", "outer_momentum"])
def test_an_outer_optimizer_that_cannot_be_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"sync's {name} must be"):
        Sync(3, **{name: value})


def test_a_sync_is_the_same_whether_its_numbers_were_whole():
    assert (
        repr(Sync(3, 1, 0)) == repr(Sync(3, 1.0, 0.0)) == repr(sync_of("local-sgd:3"))
    )  # checkpoints compare the text

"""The ledger: whatever the order, every rank comes to the same decisions, and nothing that all ask for is left out."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdtrain.horovod import ledger as module
from hvdtrain.horovod.ledger import JOIN, LEAVE, Ledger, Message
from hvdtrain.horovod.requests import Form


def form(name="x", kind="allreduce", shape=(3,), **details):
    details = details or {"op": 1}
    return Form(kind=kind, name=name, tensors=(("float32", shape),), details=tuple(details.items()))


def told(message):
    """As it arrives."""
    return Message.read(message.flags, message.known, message.rest, message.steps)


class Ranks:
    """Ledgers of several ranks that hear each other."""

    def __init__(self, size):
        self.ledgers = [Ledger(range(size)) for _ in range(size)]

    def round(self, asked, flags=None, trouble=""):
        flags = flags or [0] * len(self.ledgers)
        messages = [
            told(ledger.compose([(one.text(), number) for one, number in each], flag, trouble if rank == 0 else ""))
            for rank, (ledger, each, flag) in enumerate(zip(self.ledgers, asked, flags, strict=True))
        ]
        outcomes = [ledger.hear(messages) for ledger in self.ledgers]
        assert all(
            [(d.key, d.absent, d.error) for d in one.decisions]
            == [(d.key, d.absent, d.error) for d in outcomes[0].decisions]
            for one in outcomes
        )
        return outcomes[0]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 4), count=st.integers(1, 20), seed=st.integers(0, 10_000), most=st.sampled_from([3, 8192]))
def test_what_all_ask_for_is_decided_once_in_any_order(size, count, seed, most):
    before, module._MOST_KNOWN = module._MOST_KNOWN, most
    try:
        ranks, luck = Ranks(size), random.Random(seed)
        for _ in range(2):  # the second time forms are known, unless they were forgotten
            left = [luck.sample(range(count), count) for _ in range(size)]
            decided = []
            while any(left):
                taken = [luck.randint(0, len(each)) for each in left]
                asked = [
                    [(form(f"t{i}", shape=(i,)), 0) for i in each[:n]] for each, n in zip(left, taken, strict=True)
                ]
                left = [each[n:] for each, n in zip(left, taken, strict=True)]
                decided += [d.key for d in ranks.round(asked).decisions]
            assert sorted(decided) == sorted(("allreduce", f"name t{i}") for i in range(count))
    finally:
        module._MOST_KNOWN = before


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (form(shape=(4,)), r"float32 \(4\)"),
        (form(op=3), "op=Min"),
        (Form(kind="allreduce", name="x", tensors=(("int64", (3,)),), details=(("op", 1),)), "int64"),
    ],
)
def test_a_mismatch_names_who_said_what_and_is_over(other, said):
    ranks = Ranks(3)
    (decision,) = ranks.round([[(form(), 0)], [(other, 0)], [(form(), 0)]]).decisions
    assert "rank" in decision.error
    assert re.search(rf"ranks 0, 2: float32 \(3\), op=Sum; rank 1: .*{said}", decision.error)
    (again,) = ranks.round([[(form(), 0)]] * 3).decisions
    assert not again.error


def test_ranks_that_have_joined_are_absent_from_reductions_and_missed_elsewhere():
    ranks = Ranks(3)
    ranks.round([[], [], []], [0, JOIN, 0])
    (decision,) = ranks.round([[(form(), 0)], [], [(form(), 0)]], [0, JOIN, 0]).decisions
    assert (decision.absent, decision.error) == ((1,), "")
    gather = Form(kind="allgather", name="rows", tensors=(("float32", ()),))
    (decision,) = ranks.round([[(gather, 0)], [], [(gather, 0)]], [0, JOIN, 0]).decisions
    assert "rank 1 called hvd.join()" in decision.error
    assert ranks.round([[], [], []], [0, JOIN, JOIN]).last_joined is None
    assert ranks.round([[], [], []], [JOIN, JOIN, JOIN]).last_joined == 0
    assert not ranks.round([[(form(), 0)], [], [(form(), 0)]]).decisions  # all take part again


def test_a_rank_that_leaves_fails_what_it_was_waited_for_in():
    ranks = Ranks(2)
    ranks.round([[(form(), 0)], []])
    (decision,) = ranks.round([[], []], [0, LEAVE]).decisions
    assert "rank 1 called hvd.shutdown()" in decision.error
    assert ranks.round([[], []], [LEAVE, LEAVE]).ended


def test_calls_without_a_name_are_told_apart_by_their_numbers():
    ranks = Ranks(2)
    nameless = form(None)
    assert not ranks.round([[(nameless, 1)], [(nameless, 2)]]).decisions
    assert ranks.ledgers[0].missing(("allreduce", "number 1")) == [1]
    assert ranks.ledgers[0].asked_by(1) == ["allreduce without a name, number 2"]
    assert len(ranks.round([[(nameless, 2)], [(nameless, 1)]]).decisions) == 2


def test_trouble_reaches_everybody():
    assert Ranks(2).round([[], []], trouble="too late").trouble == "too late"


def test_a_form_has_a_number_of_its_own_only_while_nobody_waits_joins_or_leaves():
    ranks = Ranks(2)
    first = ranks.ledgers[0]
    assert first.number_if_alone(form().text()) is None
    ranks.round([[(form(), 0)], [(form(), 0)]])
    assert first.number_if_alone(form().text()) == 0
    ranks.round([[], [(form("y"), 0)]])
    assert first.number_if_alone(form().text()) is None
    ranks.round([[(form("y"), 0)], []])
    assert first.number_if_alone(form().text()) == 0
    ranks.round([[], []], flags=[0, JOIN])
    assert first.number_if_alone(form().text()) is None


@pytest.mark.parametrize(("steps", "last"), [((0, 0, 0), 2), ((5, 3, 3), 0), ((2, 9, 4), 1)])
def test_of_those_that_are_heard_to_join_at_once_the_last_took_the_most_steps(steps, last):
    ledgers = [Ledger(range(3)) for _ in range(3)]
    messages = [told(ledger.compose([], JOIN, steps=count)) for ledger, count in zip(ledgers, steps, strict=True)]
    assert {ledger.hear(messages).last_joined for ledger in ledgers} == {last}


def test_ranks_agree_on_a_layout_only_when_none_has_joined():
    ranks = Ranks(2)
    layout = form("DistributedOptimizer 0", "gradients")
    (decision,) = ranks.round([[(layout, 0)], []], [0, JOIN]).decisions
    assert (decision.absent, decision.error) == ((1,), "")


@pytest.mark.parametrize("together", [True, False])
def test_who_has_joined_is_told_that_a_rank_leaves_without_it(together):
    ranks = Ranks(3)
    if not together:
        assert not ranks.round([[], [], []], [0, JOIN, JOIN]).join_error
    outcome = ranks.round([[], [], []], [LEAVE, JOIN, JOIN])
    assert outcome.last_joined is None
    assert outcome.join_error == "hvd.join(): rank 0 called hvd.shutdown(), or left the program, without it"
    assert ranks.round([[], [], []], [LEAVE, LEAVE, LEAVE]).ended

"""Which samples an elastic sampler gives to whom, now and after the ranks have changed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hvdtrain.horovod as hvd
from hvdtrain.horovod.elastic import sampler as module
from hvdtrain.horovod.elastic.sampler import ElasticSampler


def samplers(monkeypatch, length, ranks, *, shuffle=True, state=None):
    """One sampler for each rank of a job of so many."""
    made = []
    for rank in range(ranks):
        monkeypatch.setattr(module, "size", lambda: ranks)
        monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        made.append(ElasticSampler(range(length), shuffle=shuffle, seed=3))
        if state is not None:
            made[-1].load_state_dict(state)
    return made


@given(length=st.integers(0, 40), ranks=st.integers(1, 5), epoch=st.integers(0, 3))
def test_all_ranks_get_as_many_and_every_sample_is_there(length, ranks, epoch):
    with pytest.MonkeyPatch.context() as patch:
        made = samplers(patch, length, ranks)
        given_out = []
        for rank, one in enumerate(made):
            patch.setattr(module, "rank", lambda rank=rank: rank)
            one.set_epoch(epoch)
            given_out.append(list(one))
    assert {len(part) for part in given_out} == {-(-length // ranks)} == {len(one) for one in made}
    assert {sample for part in given_out for sample in part} == set(range(length))


@given(length=st.integers(1, 40), before=st.integers(1, 4), after=st.integers(1, 4), batches=st.integers(0, 12))
def test_what_is_done_is_not_given_out_again_to_other_ranks(length, before, after, batches):
    with pytest.MonkeyPatch.context() as patch:
        made = samplers(patch, length, before, shuffle=False)
        done = set()
        for batch in range(batches):
            for one in made:
                done.update(list(one)[batch * 2 : batch * 2 + 2])
                one.record_batch(batch, 2)
        assert len({one.processed_num for one in made}) == 1
        assert made[0].processed_num <= length
        left = [set(one) for one in samplers(patch, length, after, shuffle=False, state=made[0].state_dict())]
    assert set().union(*left) == set(range(length)) - done


def test_restore_takes_the_sampler_back(one_rank):
    sampler = hvd.elastic.ElasticSampler(range(10))
    state = hvd.elastic.TorchState(sampler=sampler)
    sampler.record_batch(0, 4)
    state.commit()
    sampler.record_batch(1, 4)
    state.restore()
    assert (sampler.processed_num, len(sampler)) == (4, 6)
    sampler.set_epoch(1)
    assert (sampler.processed_num, len(sampler)) == (0, 10)

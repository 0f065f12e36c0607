"""Each compression against NumPy, for ranks that are generators in this process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hvdtrain.compression.base import Compression, Gather, Sum
from hvdtrain.compression.choosing import chosen
from hvdtrain.compression.low_rank import PowerSGD, orthonormal, start
from hvdtrain.compression.sparse import RandomK, TopK, places, terms
from hvdtrain.errors import ConfigError
from hvdtrain.settings.compression import FORMS

RANKS = 3
SEED = 7
ALL = ["int8", "fp8", "1bit", "powersgd:2", "topk:0.1", "randomk:0.1"]


def made(name):
    compression, reduced = chosen(name)
    assert reduced is None
    return compression


def exchanged(compression, tensors, memories=None):
    """What each rank gets of an exchange, and how many bytes each hands to the wire."""
    memories = memories or [{}] * len(tensors)
    kept = [tensor.clone() for tensor in tensors]
    ranks = [compression.exchange(t, m, SEED) for t, m in zip(tensors, memories, strict=True)]
    answers, results, size = [None] * len(ranks), [], 0
    while not results:
        asked = []
        for rank, answer in zip(ranks, answers, strict=True):
            try:
                asked.append(rank.send(answer))
            except StopIteration as end:
                results.append(end.value)
        assert not (results and asked)  # all end together
        rows = [item if isinstance(item, tuple) else (item,) for item in asked]
        answered = []
        for items in zip(*rows, strict=True):
            assert len({(type(item), item.tensor.shape, item.tensor.dtype) for item in items}) == 1
            size += items[0].tensor.nbytes
            stacked = torch.stack([item.tensor for item in items])
            assert isinstance(items[0], Sum | Gather)
            answered.append(stacked.sum(0) if isinstance(items[0], Sum) else stacked)
        as_tuple = bool(asked) and isinstance(asked[0], tuple)
        answers = [tuple(answered) if as_tuple else next(iter(answered), None)] * len(ranks)
    for before, now in zip(kept, tensors, strict=True):
        torch.testing.assert_close(now, before, rtol=0, atol=0, equal_nan=True)
    return results, size


def numbers(*shape, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=dtype) * 10.0**-rank for rank in range(RANKS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_all_ranks_have_the_same_total_and_their_own_parts_add_up_to_it(name, dtype):
    tensors = numbers(40, 5, 7, dtype=dtype)
    results, _ = exchanged(made(name), tensors)
    for result in results:
        assert torch.equal(result.total, results[0].total)
        assert result.total.dtype == dtype
        assert result.total.shape == (40, 5, 7)
        assert {k: v.tolist() for k, v in result.memory.items()} == {
            k: v.tolist() for k, v in results[0].memory.items()
        }
    if results[0].own is not None:
        whole = torch.stack([result.own for result in results]).sum(0)
        torch.testing.assert_close(whole, results[0].total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("int8", 0.26),
        ("fp8", 0.26),
        ("1bit", 0.036),
        ("powersgd:2", 0.017),
        ("topk:0.01", 0.0201),
        ("randomk:0.01", 0.0101),
    ],
)
def test_so_much_less_is_handed_over(name, share):
    tensors = numbers(256, 240)
    _, size = exchanged(made(name), tensors)
    assert size <= share * tensors[0].nbytes
    assert size >= 0.9 * share * tensors[0].nbytes


def power_sgd(matrices, q, rank):
    """Algorithm 1 of Vogels et al. 2019, with Gram-Schmidt; sums instead of means."""
    p = sum(m @ q for m in matrices)
    for i in range(rank):
        p[:, i] /= np.linalg.norm(p[:, i])
        p[:, i + 1 :] -= np.outer(p[:, i], p[:, i] @ p[:, i + 1 :])
    q = sum(m.T @ p for m in matrices)
    return p @ q.T, q


def test_powersgd_is_the_papers_with_its_warm_start_and_error_feedback():
    compression = PowerSGD(2)
    gradients = [numbers(12, 5, 3, dtype=torch.float64, seed=s) for s in range(4)]
    errors = [torch.zeros(12, 5, 3, dtype=torch.float64)] * RANKS
    their_errors = [np.zeros((12, 15))] * RANKS
    memories = [{}] * RANKS
    q = start(15, 2, SEED).numpy()
    for step in gradients:
        tensors = [g + e for g, e in zip(step, errors, strict=True)]
        results, _ = exchanged(compression, tensors, memories)
        errors = [t - r.own for t, r in zip(tensors, results, strict=True)]
        memories = [r.memory for r in results]
        theirs = [g.numpy().reshape(12, 15) + e for g, e in zip(step, their_errors, strict=True)]
        total, q = power_sgd(theirs, q, 2)
        their_errors = [m - total / RANKS for m in theirs]  # the paper's, whose sum over the ranks is the same
        np.testing.assert_allclose(results[0].total.numpy().reshape(12, 15), total, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(sum(errors).numpy().reshape(12, 15), sum(their_errors), rtol=1e-9, atol=1e-11)


def test_powersgd_finds_a_matrix_of_its_rank_in_one_step():
    a, b = torch.randn(30, 2, dtype=torch.float64), torch.randn(2, 20, dtype=torch.float64)
    results, _ = exchanged(PowerSGD(2), [a @ b, 2 * a @ b, torch.zeros(30, 20, dtype=torch.float64)])
    torch.testing.assert_close(results[0].total, 3 * a @ b)


def test_powersgd_of_zeros_is_zero_and_the_next_step_is_not_lost():
    zeros = [torch.zeros(6, 5)] * RANKS
    results, _ = exchanged(PowerSGD(1), zeros)
    assert not results[0].total.any()
    full = [torch.ones(6, 5)] * RANKS
    results, _ = exchanged(PowerSGD(1), full, [r.memory for r in results])
    assert float(results[0].total.abs().sum()) > 0


def test_powersgd_leaves_alone_what_would_not_be_smaller():
    compression = PowerSGD(2)
    assert compression.takes((5, 5))  # 20 numbers of 25
    assert not compression.takes((4, 4))
    assert not compression.takes((1, 1000))
    assert not compression.takes((1000,))
    assert compression.takes((64, 3, 3, 3))


def test_an_orthonormal_basis_of_what_is_not_finite_is_nan():
    assert orthonormal(torch.tensor([[1.0], [torch.inf]])).isnan().all()
    torch.testing.assert_close(orthonormal(torch.tensor([[3.0], [4.0]])).abs(), torch.tensor([[0.6], [0.8]]))


def blocks(array, size=256):
    flat = array.reshape(-1)
    return [flat[i : i + size] for i in range(0, len(flat), size)]


def test_int8_rounds_to_127ths_of_a_blocks_largest_number():
    tensors = numbers(7, 50)
    results, _ = exchanged(made("int8"), tensors)
    expected = sum(
        np.concatenate(
            [
                np.round(b / (np.abs(b).max() / np.float32(127))) * (np.abs(b).max() / np.float32(127))
                for b in blocks(t.numpy())
            ]
        )
        for t in tensors
    )
    np.testing.assert_allclose(results[0].total.numpy().reshape(-1), expected, rtol=1e-5, atol=1e-7)


def e4m3fn():
    """Every finite float of 4 bits of exponent and 3 of digits."""
    found = []
    for code in range(127):
        exponent, digits = code >> 3, code & 7
        found.append(digits / 8 * 2.0**-6 if exponent == 0 else (1 + digits / 8) * 2.0 ** (exponent - 7))
    return np.array([-f for f in found[::-1]] + found)


def test_fp8_rounds_to_the_nearest_float_of_8_bits():
    table = e4m3fn()
    assert table.max() == 448
    tensors = numbers(7, 50)
    results, _ = exchanged(made("fp8"), tensors)
    expected = np.zeros(350)
    for tensor in tensors:
        row = []
        for block in blocks(tensor.numpy()):
            scale = np.abs(block).max() / np.float32(448)
            row.append(table[np.abs(block[:, None] / scale - table).argmin(1)] * scale)
        expected += np.concatenate(row)
    np.testing.assert_allclose(results[0].total.numpy().reshape(-1), expected, rtol=1e-4, atol=1e-6)


def test_1bit_is_the_sign_times_a_blocks_mean_magnitude_also_of_a_short_block():
    tensors = numbers(7, 50)
    results, _ = exchanged(made("1bit"), tensors)
    expected = sum(
        np.concatenate([np.where(b >= 0, 1, -1) * np.abs(b).mean() for b in blocks(t.numpy())]) for t in tensors
    )
    np.testing.assert_allclose(results[0].total.numpy().reshape(-1), expected, rtol=1e-5, atol=1e-7)


def test_topk_sends_each_ranks_largest_numbers():
    tensors = numbers(7, 50)
    results, _ = exchanged(made("topk:0.1"), tensors)
    expected = np.zeros(350, dtype=np.float32)
    for tensor in tensors:
        flat = tensor.numpy().reshape(-1)
        largest = np.argsort(-np.abs(flat))[:35]
        expected[largest] += flat[largest]
    np.testing.assert_allclose(results[0].total.numpy().reshape(-1), expected, rtol=1e-6)


def test_randomk_sends_the_same_places_of_all_ranks_and_other_ones_in_the_next_step():
    tensors = numbers(7, 50)
    results, _ = exchanged(made("randomk:0.1"), tensors)
    whole = sum(t.numpy() for t in tensors).reshape(-1)
    total = results[0].total.numpy().reshape(-1)
    sent = np.flatnonzero(total)
    assert len(sent) == 35
    np.testing.assert_allclose(total[sent], whole[sent], rtol=1e-6)
    later, _ = exchanged(made("randomk:0.1"), tensors, [r.memory for r in results])
    assert set(np.flatnonzero(later[0].total.numpy())) != set(sent)


@pytest.mark.parametrize("numel", [1, 2, 12, 97, 1000])
def test_places_differ_and_every_one_comes(numel):
    count = max(1, numel // 3)
    seen = np.zeros(numel, dtype=int)
    for step in range(400):
        where = places(numel, count, f"1:{step}").tolist()
        assert len(set(where)) == count
        seen[where] += 1
    expected = 400 * count / numel
    assert seen.min() > expected * 0.7 - 1
    assert seen.max() < expected * 1.3 + 1


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_ends_no_exchange(name, bad):
    tensors = numbers(20, 30)
    tensors[1][3, 4] = bad
    results, _ = exchanged(made(name), tensors)
    assert results[0].total.shape == (20, 30)


def test_every_form_is_known():
    for form in FORMS:
        name = form.replace("RANK", "2").replace("RATIO", "0.5")
        compression, reduced = chosen(name)
        assert (compression is None) == (reduced is not None)
        if compression is not None:
            assert compression.name == name


def test_places_are_exact_where_products_do_not_fit_into_64_bits():
    numel, start_, step = 2**40 - 87, 2**39 + 5, 2**40 - 1001
    which = torch.tensor([0, 1, 2**20 - 1, 2**20, 3_100_000_007, numel - 1])
    assert terms(which, numel, start_, step).tolist() == [(w * step + start_) % numel for w in which.tolist()]
    assert terms(torch.arange(7), 7, 3, 7).tolist() == [3] * 7
    assert sorted(places(1009, 1009, "7:0").tolist()) == list(range(1009))


@pytest.mark.parametrize(("ratio", "name"), [("0.01", "topk:0.01"), ("1", "topk:1"), ("0.01000001", "topk:0.01000001")])
def test_names_tell_every_ratio_apart(ratio, name):
    assert made(f"topk:{ratio}").name == name


class Halves(TopK):
    def __init__(self):
        super().__init__(0.5)


NO_COMPRESSION = dict


class Nameless(Compression):
    def exchange(self, tensor, memory, seed):
        raise NotImplementedError


@pytest.mark.parametrize("joint", [":", "."])
def test_one_of_ones_own_is_found_by_its_import_path(joint):
    assert isinstance(made(f"{__name__}{joint}Halves"), Halves)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("NO_COMPRESSION", r"made \{\} of dict, which is no hvdtrain.Compression; name a class"),
        ("Nameless", r'has no name; give the class one, .*: name = "nameless"'),
        ("Halfs", r"has no 'Halfs'; did you mean 'Halves'"),
    ],
)
def test_what_is_no_compression_is_refused(name, said):
    with pytest.raises(ConfigError, match=said):
        chosen(f"{__name__}:{name}")


def test_one_without_a_name_is_refused_also_as_an_object():
    with pytest.raises(ConfigError, match=r'compression= of Nameless has no name; .*: name = "nameless"'):
        chosen(Nameless())


@pytest.mark.parametrize("inner", ALL)
def test_one_that_begins_later_sums_exactly_before_and_is_the_other_one_then(inner):
    compression, other = made(f"{inner},after=2"), made(inner)
    assert (compression.name, compression.rounds) == (f"{inner},after=2", other.rounds)
    assert compression.takes((3, 3)) == other.takes((3, 3))
    memories, others = [{}] * RANKS, [{}] * RANKS
    for step in range(2):
        tensors = numbers(30, 20, seed=step)
        results, size = exchanged(compression, tensors, memories)
        assert size == tensors[0].nbytes
        assert all(one.own is None for one in results)  # nothing is left to be sent
        torch.testing.assert_close(results[0].total, sum(tensors))
        memories = [one.memory for one in results]
    for step in range(2, 5):
        tensors = numbers(30, 20, seed=step)
        results, size = exchanged(compression, tensors, memories)
        wanted, wanted_size = exchanged(other, tensors, others)
        assert size == wanted_size
        for have, want in zip(results, wanted, strict=True):
            assert torch.equal(have.total, want.total)
            assert have.own is want.own or torch.equal(have.own, want.own)
        memories, others = [one.memory for one in results], [one.memory for one in wanted]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("int8,", "after=EXCHANGES may follow"),
        ("int8,after", "after=EXCHANGES may follow"),
        ("int8,after=0", "after=EXCHANGES may follow"),
        ("int8,after=-1", "after=EXCHANGES may follow"),
        ("int8,after=1,after=2", "after=EXCHANGES may follow"),
        ("int8,befor=1", "after=EXCHANGES may follow"),
        ("bf16,after=3", "bf16 is a type in which gradients are summed, from the first one; leave 'after=3' out"),
        ("powersgd:\u0662", "needs a rank, a whole number"),
        ("int9,after=3", "did you mean 'int8'"),
    ],
)
def test_what_cannot_follow_a_name_is_refused(asked, said):
    with pytest.raises(ConfigError, match=said):
        chosen(asked)


@pytest.mark.parametrize("kind", [TopK, RandomK])
@pytest.mark.parametrize("ratio", [0, -1, 2, float("nan"), "0.5", True, None])
def test_a_ratio_that_cannot_be_is_refused_before_anything_is_sent(kind, ratio):
    with pytest.raises(ConfigError, match=f"{kind.__name__}'s ratio must be the part that is sent"):
        kind(ratio)


@pytest.mark.parametrize("rank", [0, -1, 1.5, "2", True, None])
def test_a_rank_that_cannot_be_is_refused_before_anything_is_sent(rank):
    with pytest.raises(ConfigError, match="PowerSGD's rank must be a whole number from 1"):
        PowerSGD(rank)


@pytest.mark.parametrize(
    "path", ["hvdtrain.compression.sparse:TopK", "hvdtrain.compression.low_rank.PowerSGD", "json:dumps"]
)
def test_what_cannot_be_called_without_arguments_is_refused_with_what_there_is(path):
    with pytest.raises(ConfigError, match=r"it is called without any: give one of .*topk:RATIO") as raised:
        chosen(path)
    assert "--compression." not in str(raised.value)

"""Formulas of exchanges: against Horovod's published figures, against a simulated ring, and in what must always hold."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdtrain.bench.fitting import fit_ring
from hvdtrain.bench.forms import Cluster, Link, Workload, compressed, hierarchical, projections, ring, tree, waited
from hvdtrain.errors import ConfigError

# Images/s of one P100 with 64 images (TensorFlow's benchmarks of May 2017, synthetic data): Inception V3 142, ResNet-50 219,
# ResNet-152 91.8, VGG-16 154. ResNet-101 lies between its neighbours by their operations (4.1, 7.8 and 11.5 billion): 129.
PUBLISHED = {"Inception V3": (24e6, 142, 0.90), "ResNet-101": (44.5e6, 129, 0.90), "VGG-16": (138e6, 154, 0.68)}


def horovods(latency_us: float = 10.0) -> Cluster:
    """128 servers of 4 GPUs on 25 Gbit/s; their latency is not published."""
    link = Link(latency_s=latency_us / 1e6, bytes_per_s=25e9 / 8)
    return Cluster(ranks=512, ranks_per_node=4, link=link, inner=link)


def efficiency(parameters: float, images_per_s: float, cluster: Cluster) -> float:
    compute_s = 64 / images_per_s
    work = Workload(
        compute_s=compute_s, gradient_bytes=4 * parameters, bucket_bytes=64 * 2**20
    )  # Horovod's fusion buffer
    return compute_s / (compute_s + waited(work, cluster, ring))


@pytest.mark.parametrize("latency_us", [5, 10, 20])
@pytest.mark.parametrize("name", PUBLISHED)
def test_horovods_published_figures_come_out_within_ten_points(name, latency_us):
    parameters, images_per_s, published = PUBLISHED[name]
    assert efficiency(parameters, images_per_s, horovods(latency_us)) == pytest.approx(published, abs=0.10)


def test_with_ten_microseconds_they_come_out_within_two_points():
    for parameters, images_per_s, published in PUBLISHED.values():
        assert efficiency(parameters, images_per_s, horovods()) == pytest.approx(published, abs=0.02)


def simulated_ring(size: float, ranks: int, link: Link) -> float:
    """Every rank sends a part to the next one when it has sent the one before and received it: 2(n-1) rounds."""
    ready = [0.0] * ranks
    for _ in range(2 * (ranks - 1)):
        sent = [at + link.latency_s + size / ranks / link.bytes_per_s for at in ready]
        ready = [max(sent[rank], sent[rank - 1]) for rank in range(ranks)]
    return max(ready)


LINKS = st.builds(Link, latency_s=st.floats(1e-7, 1e-3), bytes_per_s=st.floats(1e6, 1e11))
SIZES = st.floats(4, 1e10)


@given(size=SIZES, ranks=st.integers(1, 20), link=LINKS)
def test_a_ring_is_what_its_messages_add_up_to(size, ranks, link):
    cluster = Cluster(ranks=ranks, ranks_per_node=1, link=link, inner=link)
    assert ring(size, cluster) == pytest.approx(simulated_ring(size, ranks, link))


@given(size=SIZES, nodes=st.integers(2, 500), link=LINKS)
def test_one_rank_a_node_makes_a_hierarchy_a_ring(size, nodes, link):
    cluster = Cluster(ranks=nodes, ranks_per_node=1, link=link, inner=link)
    assert hierarchical(size, cluster) == pytest.approx(ring(size, cluster))


@given(size=SIZES, ranks=st.integers(2, 10**6), per_node=st.integers(1, 16), link=LINKS, inner=LINKS)
def test_no_form_is_quicker_than_its_bytes_or_its_messages(size, ranks, per_node, link, inner):
    cluster = Cluster(ranks=ranks, ranks_per_node=per_node, link=link, inner=inner)
    slowest = inner if ranks <= per_node else link
    for form in (ring, tree, hierarchical):
        assert form(size, cluster) >= 0.999 * size / slowest.bytes_per_s
        assert form(size, cluster) >= 2 * slowest.latency_s
    assert compressed(ring, 16)(size, cluster) <= ring(size, cluster)


WORK = st.builds(
    Workload, compute_s=st.floats(1e-3, 10), gradient_bytes=st.floats(4, 1e10), bucket_bytes=st.floats(2**20, 2**28),
    backward_share=st.floats(0.1, 0.9),
)  # fmt: skip


@given(work=WORK, ranks=st.integers(2, 5000), link=LINKS)
def test_what_is_waited_for_lies_between_the_last_bucket_and_all_of_them(work, ranks, link):
    cluster = Cluster(ranks=ranks, ranks_per_node=1, link=link, inner=link)
    count = max(1, math.ceil(work.gradient_bytes / work.bucket_bytes))
    each_s = ring(work.gradient_bytes / count, cluster)
    found = waited(work, cluster, ring)
    slack = 1e-9 * (each_s * count + work.compute_s)
    assert each_s - slack <= found <= count * each_s + slack


def test_an_exchange_of_many_buckets_is_hidden_but_for_the_last_one():
    link = Link(latency_s=1e-9, bytes_per_s=1e9)
    cluster = Cluster(ranks=2, ranks_per_node=1, link=link, inner=link)
    work = Workload(compute_s=1.0, gradient_bytes=100e6, bucket_bytes=10e6)
    assert waited(work, cluster, ring) == pytest.approx(0.01, rel=1e-3)
    assert waited(work, Cluster(ranks=1, ranks_per_node=1, link=link, inner=link), ring) == 0


def test_projections_have_every_form_and_diloco_exchanges_seldom():
    cluster = horovods()
    found = projections(Workload(compute_s=0.1, gradient_bytes=4e8), cluster, ratio=16, diloco_steps=100)
    assert set(found) == {"ring", "tree", "hierarchical", "compressed", "diloco"}
    assert found["diloco"] - 0.1 == pytest.approx(ring(4e8, cluster) / 100)
    assert found["compressed"] < found["ring"]


@given(ranks=st.integers(2, 64), link=LINKS)
def test_a_fit_finds_the_link_that_times_were_made_of(ranks, link):
    cluster = Cluster(ranks=ranks, ranks_per_node=1, link=link, inner=link)
    found = fit_ring([(2**power, ring(2**power, cluster)) for power in range(2, 32, 2)], ranks)
    assert found.link.latency_s == pytest.approx(link.latency_s, rel=1e-3)
    assert found.link.bytes_per_s == pytest.approx(link.bytes_per_s, rel=1e-3)
    assert found.error < 1e-3


def test_a_fit_says_how_far_it_is_off_and_never_goes_below_nothing():
    crooked = fit_ring([(4, 1e-4), (1000, 3e-4), (1e6, 1e-3), (2e6, 9e-3)], 2)
    assert crooked.error > 0.3
    for points in ([(4, 3.0), (8, 2.0), (16, 1.0)], [(1e6, 1e-3), (2e6, 3e-3), (4e6, 9e-3)]):
        link = fit_ring(points, 2).link
        assert link.latency_s > 0
        assert link.bytes_per_s > 0
    with pytest.raises(ConfigError, match="at least three sizes"):
        fit_ring([(4, 1.0), (8, 1.0)], 2)

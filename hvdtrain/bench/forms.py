"""How long an exchange takes, and what of it a step waits for, by formulas. Pure.

Links have a latency and a bandwidth (Hockney 1994). A rank that sends S bytes to another one takes ``latency + S / bandwidth``.
What sums cost, and ranks that are slower than others, is left out. See docs/concepts.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What connects two ranks, or two nodes.

    Attributes:
        latency_s: Seconds of a message without content.
        bytes_per_s: Bandwidth, in each direction.
    """

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Ranks and their links.

    Attributes:
        ranks: All of them.
        ranks_per_node: Of these on each node, which share its link.
        link: Between nodes.
        inner: Between the ranks of a node.
    """

    ranks: int
    ranks_per_node: int
    link: Link
    inner: Link


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A step of one rank.

    Attributes:
        compute_s: Seconds without any exchange.
        gradient_bytes: Bytes that are reduced.
        bucket_bytes: In pieces of so many, each as soon as the backward pass has it.
        backward_share: Of ``compute_s``, during which gradients become ready evenly.
    """

    compute_s: float
    gradient_bytes: float
    bucket_bytes: float = 25 * 2**20
    backward_share: float = 2 / 3


def ring(size: float, cluster: Cluster) -> float:
    """Reduce-scatter and all-gather around a ring (Patarasuk and Yuan 2009): 2(n-1) messages of S/n."""
    n = cluster.ranks
    link = cluster.inner if n <= cluster.ranks_per_node else cluster.link
    return 2 * (n - 1) * (link.latency_s + size / n / link.bytes_per_s)


def tree(size: float, cluster: Cluster) -> float:
    """Two binary trees, each of half the bytes, in pieces (Sanders, Speck and Träff 2009; NCCL's "tree")."""
    if cluster.ranks == 1:
        return 0.0
    link = cluster.inner if cluster.ranks <= cluster.ranks_per_node else cluster.link
    return 2 * math.ceil(math.log2(cluster.ranks)) * link.latency_s + 2 * size / link.bytes_per_s


def hierarchical(size: float, cluster: Cluster) -> float:
    """Reduce-scatter inside each node, a ring of nodes for each part, which share the node's link, all-gather inside."""
    local = min(cluster.ranks, cluster.ranks_per_node)
    nodes = math.ceil(cluster.ranks / local)
    inside = 2 * (local - 1) * (cluster.inner.latency_s + size / local / cluster.inner.bytes_per_s)
    return inside + 2 * (nodes - 1) * (cluster.link.latency_s + size / nodes / cluster.link.bytes_per_s)


Exchange = Callable[[float, Cluster], float]


def waited(workload: Workload, cluster: Cluster, exchange: Exchange) -> float:
    """Seconds after the backward pass until the last bucket has been reduced.

    A bucket starts when it is complete and the one before it has been reduced (Li et al. 2020, figure 4). The last one is
    complete when the backward pass ends, so that at least it is waited for.
    """
    if cluster.ranks == 1:
        return 0.0
    count = max(1, math.ceil(workload.gradient_bytes / workload.bucket_bytes))
    backward_s = workload.backward_share * workload.compute_s
    each_s = exchange(workload.gradient_bytes / count, cluster)
    free = 0.0
    for number in range(1, count + 1):
        free = max(free, backward_s * number / count) + each_s
    return free - backward_s


def compressed(exchange: Exchange, ratio: float) -> Exchange:
    """The same with so many times fewer bytes, of forms whose messages can be summed; what compressing costs is left out."""
    return lambda size, cluster: exchange(size / ratio, cluster)


def projections(
    workload: Workload, cluster: Cluster, *, ratio: float = 16.0, diloco_steps: int = 100
) -> Mapping[str, float]:
    """Seconds of a step under each form of exchange.

    Args:
        workload: The step.
        cluster: Its ranks.
        ratio: Of ``compressed``: bytes of a gradient to bytes sent.
        diloco_steps: Steps between two exchanges of all weights, which nothing hides (Douillard et al. 2023).
    """
    whole = {
        "ring": waited(workload, cluster, ring),
        "tree": waited(workload, cluster, tree),
        "hierarchical": waited(workload, cluster, hierarchical),
        "compressed": waited(workload, cluster, compressed(ring, ratio)),
        "diloco": ring(workload.gradient_bytes, cluster) / diloco_steps,
    }
    return {name: workload.compute_s + seconds for name, seconds in whole.items()}

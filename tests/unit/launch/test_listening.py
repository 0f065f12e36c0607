"""Ranks of one node are told to listen to nobody else, and those of several are not."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from hvdtrain.launch import listening
from hvdtrain.topology import Topology

BTL = "OMPI_MCA_btl"
RANKS = 1 + shutil.disk_usage("/").total // 2**24  # more than there is room for, anywhere


def of(ranks: int, nodes: int) -> Topology:
    return Topology(
        rank=0, world_size=ranks, local_rank=0, local_world_size=ranks // nodes, node_rank=0, num_nodes=nodes
    )


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    for name in (BTL, "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "^tcp"),
        ("^openib", "^openib,tcp"),
        ("self,sm,tcp", None),
        ("^sm", None),
        ("", None),
    ],
)
def test_open_mpi_opens_no_tcp_on_one_node_unless_the_user_has_chosen(monkeypatch, tmp_path, given, said):
    if given is not None:
        monkeypatch.setenv(BTL, given)
    assert listening.mpi(of(2, 1), tmp_path) == ({BTL: said} if said else {})
    assert listening.mpi(of(4, 2), tmp_path) == {}


def test_open_mpi_keeps_tcp_where_the_shared_memory_has_no_room(tmp_path):
    assert listening.mpi(of(RANKS, 1), tmp_path) == {}
    assert listening.mpi(of(2, 1), tmp_path / "missing") == {}


def test_gloo_is_bound_to_the_loopback_interface_on_one_node_unless_the_user_has_chosen(monkeypatch):
    (said,) = listening.gloo(of(2, 1)).values()
    assert said in {name for _, name in socket.if_nameindex()}
    assert listening.gloo(of(4, 2)) == {}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert listening.gloo(of(2, 1)) == {}


def test_gloo_heeds_it(monkeypatch):
    for name, value in listening.gloo(of(2, 1)).items():
        monkeypatch.setenv(name, value)
    before = _listening()
    device = dist.ProcessGroupGloo.create_default_device()
    store = dist.HashStore()
    groups = []

    def join(rank: int) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [device]
        groups.append(dist.ProcessGroupGloo(store, rank, 2, options))

    threads = [threading.Thread(target=join, args=[rank]) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    opened = _listening() - before
    assert len(groups) == 2
    assert opened
    assert {address for address, _ in opened} == {"0100007F"}


def _listening() -> set[tuple[str, str]]:
    """Address and port of every TCP socket on which this process listens, as the kernel writes them."""
    mine = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            mine.add(os.readlink(link))
        except OSError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in mine:
                address, _, port = words[1].partition(":")
                found.add((address, port))
    return found

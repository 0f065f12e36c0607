"""An engine of your own: a wire, and a backend on it, whose gradients leave by the wire's all-reduce. Here: torch's Gloo group, without torch.distributed.

torchrun --nproc-per-node 2 examples/own_backend.py

As backend "gloo" for every program, in a package that registers it ([project.entry-points."hvdtrain.backends"] gloo = "own_backend:GlooBackend"):

torchrun --nproc-per-node 2 -m hvdtrain --backend gloo
torchrun --nproc-per-node 3 -m hvdtrain.testing --backend gloo      # does it keep every promise?
"""

from datetime import timedelta

import torch
from torch import distributed as dist

from hvdtrain.backends.base import Backend
from hvdtrain.backends.group import Group
from hvdtrain.backends.wire import Together, Wire
from hvdtrain.launch.detect import detect
from hvdtrain.ranks.engine_store import EngineStore

OPS = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX, "product": dist.ReduceOp.PRODUCT}


class GlooWire(Wire):
    def __init__(self, group, rank, ranks):
        super().__init__(rank, ranks, torch.device("cpu"))
        self.group = group

    def all_reduce_(self, tensor, op):
        self.traffic.all_reduce(tensor.nbytes, self.size)
        return self.group.allreduce([tensor], OPS[op])

    def all_gather_into(self, out, tensor):
        self.traffic.all_gather(tensor.nbytes, self.size)
        return self.group.allgather([list(out.unbind())], [tensor])

    def all_to_all_into(self, out, tensor, receive, send):
        self.traffic.all_to_all([count * tensor.itemsize for count in send], self.rank)
        return self.group.alltoall_base(out, tensor, list(receive), list(send))

    def broadcast_(self, tensor, src):
        self.traffic.rooted(tensor.nbytes, self.size)
        return self.group.broadcast(tensor, src)

    def barrier(self):
        return self.group.barrier()

    def send_receive(self, sent, dst, out, src):
        self.traffic.message(0 if sent is None else sent.nbytes)
        works = [] if out is None else [self.group.recv([out], src, 0)]
        return Together(works if sent is None else [*works, self.group.send([sent], dst, 0)])


class GlooBackend(Backend):
    name = "gloo"

    def _connect(self):
        self.store = self._meet().store
        self._wire = self.make_wire("all", list(self.ranks))

    def make_wire(self, name, ranks):
        store = EngineStore(self.store.under(name), self.timeout_s, self._watch.raise_if_failed)
        place = ranks.index(self.rank)
        group = dist.ProcessGroupGloo(store, place, len(ranks), timedelta(seconds=self.timeout_s))
        return GlooWire(group, place, ranks)

    def _group(self, ranks):
        self.made = getattr(self, "made", 0) + 1  # on every rank, also those that are not in the group
        if self.rank not in ranks:
            return None
        return Group(self.make_wire(f"group{self.made}", ranks), self._watch, check=self._check, label=f"group {ranks}")


if __name__ == "__main__":
    with GlooBackend(detect(), device="cpu") as backend:
        total = backend.all_reduce(torch.tensor(backend.rank + 1.0))
        if backend.rank == 0:
            print(f"{backend.world_size} rank(s): the sum is {total.item():g}")

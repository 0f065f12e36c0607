"""Horovod's elastic API: a state that is committed, restored and copied from rank 0 in memory.

The ranks stay those that were started: forming the job anew after a loss is not offered yet.
"""

from __future__ import annotations

from hvdtrain.errors import HorovodInternalError as HorovodInternalError
from hvdtrain.horovod.elastic.interrupts import HostsUpdatedInterrupt as HostsUpdatedInterrupt
from hvdtrain.horovod.elastic.running import run as run
from hvdtrain.horovod.elastic.sampler import ElasticSampler as ElasticSampler
from hvdtrain.horovod.elastic.state import ObjectState as ObjectState
from hvdtrain.horovod.elastic.state import State as State
from hvdtrain.horovod.elastic.state import TorchState as TorchState

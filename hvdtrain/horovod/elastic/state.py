"""What an elastic job remembers in memory: committed, restored, and copied from rank 0.

Everything is kept by value: what changed after a commit, inside a list or a dictionary too, is undone by `restore`.
"""

from __future__ import annotations

import copy
import queue
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hvdtrain.horovod.elastic.interrupts import HostsUpdatedInterrupt, HostUpdate
from hvdtrain.horovod.elastic.sampler import ElasticSampler
from hvdtrain.horovod.functions import broadcast_object, broadcast_optimizer_state, broadcast_parameters
from hvdtrain.horovod.state import rank


class State:
    """Something with a state to be saved, restored and synchronised; fill in `save`, `restore` and `sync`.

    Args:
        bcast_object: Gives every rank rank 0's object.
        get_rank: Returns this rank.
    """

    def __init__(self, bcast_object: Callable[[Any], Any], get_rank: Callable[[], int]) -> None:
        self._bcast_object = bcast_object
        self._rank = get_rank
        self._host_messages: queue.SimpleQueue[tuple[float, HostUpdate]] = queue.SimpleQueue()
        self._last_updated_timestamp = 0.0
        self._reset_callbacks: list[Callable[[], Any]] = []

    def register_reset_callbacks(self, callbacks: Iterable[Callable[[], Any]]) -> None:
        """Call these when the ranks have changed, before `sync`: for a learning rate that depends on their number."""
        self._reset_callbacks += callbacks

    def on_reset(self) -> None:
        """The ranks have changed."""
        self._host_messages = queue.SimpleQueue()
        self.reset()
        for callback in self._reset_callbacks:
            callback()

    def on_hosts_updated(self, timestamp: float, update_res: int) -> None:
        """The hosts have changed; every rank is told at the next commit."""
        self._host_messages.put((timestamp, HostUpdate(update_res)))

    def commit(self) -> None:
        """Save the state in memory, and look whether hosts have changed; every rank must call it.

        Raises:
            HostsUpdatedInterrupt: They have; on all ranks.
        """
        self.save()
        self.check_host_updates()

    def check_host_updates(self) -> None:
        """Look whether rank 0 has heard of other hosts; every rank must call it.

        Raises:
            HostsUpdatedInterrupt: It has; on all ranks.
        """
        before = newest = self._last_updated_timestamp
        update = HostUpdate.NONE
        while not self._host_messages.empty():
            timestamp, one = self._host_messages.get()
            if timestamp > newest:
                newest, update = timestamp, update | one
        before, self._last_updated_timestamp, update = self._bcast_object((before, newest, update))
        if self._last_updated_timestamp > before:
            raise HostsUpdatedInterrupt(skip_sync=update == HostUpdate.REMOVED)

    def save(self) -> None:
        """Keep the state as it is now."""
        raise NotImplementedError

    def restore(self) -> None:
        """Go back to what was kept."""
        raise NotImplementedError

    def sync(self) -> None:
        """Take rank 0's state; every rank must call it."""
        raise NotImplementedError

    def reset(self) -> None:
        """Prepare for other ranks, before `sync`."""


class ObjectState(State):
    """Plain objects, each an attribute.

    Args:
        bcast_object: Gives every rank rank 0's object.
        get_rank: Returns this rank.
        kwargs: Names and first values.
    """

    def __init__(self, bcast_object: Callable[[Any], Any], get_rank: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(bcast_object, get_rank)
        self._saved_state = kwargs
        for name, value in kwargs.items():
            setattr(self, name, value)
        self._saved_state = copy.deepcopy(kwargs)

    def save(self) -> None:
        """Keep the objects as they are now."""
        self._saved_state = copy.deepcopy({name: getattr(self, name) for name in self._saved_state})

    def restore(self) -> None:
        """Go back to the objects that were kept."""
        for name, value in copy.deepcopy(self._saved_state).items():
            setattr(self, name, value)

    def sync(self) -> None:
        """Take the objects that rank 0 has now, and keep them."""
        if not self._saved_state:
            return
        self._saved_state = self._bcast_object({name: getattr(self, name) for name in self._saved_state})
        self.restore()


class TorchState(ObjectState):
    """Models, optimizers, `ElasticSampler`s and plain objects, each an attribute.

    Args:
        model: A module, or None.
        optimizer: An optimizer, or None.
        kwargs: Further ones, or plain objects.
    """

    def __init__(self, model: nn.Module | None = None, optimizer: Optimizer | None = None, **kwargs: Any) -> None:
        given = {**kwargs, "model": model, "optimizer": optimizer}
        self._handlers = {name: _Handler(value) for name, value in given.items() if isinstance(value, _HANDLED)}
        plain = {name: value for name, value in given.items() if name not in self._handlers}
        super().__init__(broadcast_object, rank, **plain)
        for name, handler in self._handlers.items():
            object.__setattr__(self, name, handler.value)

    def __setattr__(self, name: str, value: Any) -> None:
        handlers: dict[str, _Handler] = self.__dict__.get("_handlers", {})
        if name in handlers:
            handlers[name] = _Handler(value)
        super().__setattr__(name, value)

    def save(self) -> None:
        """Keep everything as it is now."""
        for handler in self._handlers.values():
            handler.save()
        super().save()

    def restore(self) -> None:
        """Go back to what was kept."""
        for handler in self._handlers.values():
            handler.restore()
        super().restore()

    def sync(self) -> None:
        """Take what rank 0 has now, and keep it."""
        for handler in self._handlers.values():
            handler.sync()
        super().sync()


class _Handler:
    """Something with ``state_dict`` and ``load_state_dict``, and a copy of the former."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.save()

    def save(self) -> None:
        self._saved = copy.deepcopy(self.value.state_dict())

    def restore(self) -> None:
        self.value.load_state_dict(copy.deepcopy(self._saved))

    def sync(self) -> None:
        if isinstance(self.value, nn.Module):
            broadcast_parameters(self.value.state_dict(), root_rank=0)
        elif isinstance(self.value, Optimizer):
            broadcast_optimizer_state(self.value, root_rank=0)
        else:
            self.value.load_state_dict(broadcast_object(self.value.state_dict()))
        self.save()


_HANDLED = (nn.Module, Optimizer, ElasticSampler)

"""Random numbers of a run: seeded alike on all ranks, apart while they train, and remembered.

The rule: outside of training every rank draws what the program seeded, so that models and data are made alike on all ranks.
While it trains (`OwnRandomNumbers`) each rank draws numbers of its own, so that dropout and augmentation differ. Rank 0, and
with it a world of one, always goes on with what the program seeded.

States are captured by value and are plain (`hvdtrain.training.plain_state`): tensors, numbers, text, and lists and
dictionaries of these.
"""

from __future__ import annotations

import hashlib
import random
from types import TracebackType
from typing import Any, cast

import numpy as np
import torch

from hvdtrain.backends.communicator import Communicator


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed torch (CPU and GPUs), NumPy and `random`.

    Args:
        seed: The run's.
        rank: Leave it out before models and data are made, which must be alike on all ranks. Given later, by a loop that
            does not use `OwnRandomNumbers`, it gives every rank unrelated numbers, and the same ones again next time.
    """
    mixed = hashlib.sha256(f"{seed}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(mixed[:8], "little") >> 1)
    random.seed(mixed)
    np.random.seed(int.from_bytes(mixed[8:12], "little"))


def random_state() -> dict[str, Any]:
    """Return the state of every random generator of this process."""
    state: dict[str, Any] = {
        "python": _python_state(random.getstate()),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else [],
    }
    state["numpy"] = _numpy_state(np.random.get_state(legacy=True))
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Continue from `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(torch.as_tensor(words).tolist()), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached))


class OwnRandomNumbers:
    """Inside its ``with`` block every rank draws random numbers of its own; every rank must enter and leave it.

    Ranks whose generator (torch, CUDA, NumPy and `random` are looked at one by one) is in the state that a lower rank's is in
    get numbers derived from that state and their rank: the same ones in the next run. Ranks that the program has seeded
    differently are left alone, and so is rank 0. At the end of the block those that were alike are again, in the state of
    the lowest of them. Entered a second time with nothing drawn or seeded in between, the ranks go on with their own
    numbers where they were.

    Args:
        communicator: All ranks; a world of one exchanges nothing and changes nothing.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._leaders: dict[
            str, list[int]
        ] = {}  # of each generator: for each rank, the lowest that is in the same state
        self._resting: dict[
            str, tuple[str, Any]
        ] = {}  # state outside, as a digest, and this rank's own at the last exit

    def __enter__(self) -> OwnRandomNumbers:
        if self._communicator.wire.size == 1:
            return self
        state = random_state()
        digests = {name: _digest(value) for name, value in state.items()}
        everyone = self._communicator.all_gather_object(digests)
        rank = self._communicator.wire.rank
        for name, mine in digests.items():
            at = [theirs.get(name) for theirs in everyone]
            self._leaders[name] = [at.index(one) for one in at]
            if self._leaders[name][rank] == rank:
                continue
            outside, own = self._resting.get(name, ("", None))
            state[name] = own if outside == mine else _derived(name, state[name], f"{mine}/{rank}")
        set_random_state(state)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._communicator.wire.size == 1 or error is not None:  # who fails may be alone here
            return
        state, rank = random_state(), self._communicator.wire.rank
        for leader in sorted({leader for leaders in self._leaders.values() for leader in leaders}):
            followed = [name for name, leaders in self._leaders.items() if leaders.count(leader) > 1]
            if not followed:
                continue
            theirs = self._communicator.broadcast_object({name: state[name] for name in followed}, leader)
            for name in followed:
                if self._leaders[name][rank] == leader != rank:
                    self._resting[name] = (_digest(theirs[name]), state[name])
                    state[name] = theirs[name]
        set_random_state(state)


def _python_state(state: Any) -> list[Any]:
    version, words, gauss = state
    return [version, torch.tensor(words), gauss]


def _numpy_state(state: Any) -> list[Any]:
    name, keys, position, has_gauss, cached = cast("tuple[str, Any, int, int, float]", state)
    return [name, torch.from_numpy(keys.astype("int64")), int(position), int(has_gauss), float(cached)]


def _digest(value: Any) -> str:
    """Of one generator's state, equal for equal ones."""
    digest = hashlib.sha256()
    parts = value if isinstance(value, list) else [value]
    for part in parts:
        digest.update(part.cpu().numpy().tobytes() if isinstance(part, torch.Tensor) else repr(part).encode())
    return digest.hexdigest()


def _derived(name: str, state: Any, key: str) -> Any:
    """A generator's state that follows from a text."""
    mixed = hashlib.sha256(f"{name}/{key}".encode()).digest()
    if name == "python":
        return _python_state(random.Random(mixed).getstate())
    if name == "numpy":
        return _numpy_state(np.random.RandomState(np.frombuffer(mixed, np.uint32)).get_state(legacy=True))
    seed = int.from_bytes(mixed[:8], "little") >> 1
    if name == "torch":
        return torch.Generator().manual_seed(seed).get_state()
    return [torch.Generator(f"cuda:{index}").manual_seed(seed).get_state() for index in range(len(state))]

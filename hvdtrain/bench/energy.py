"""Energy of the machine while something is measured: RAPL for packages and memory, NVML for GPUs, or why there is none."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
_EVERY_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Counter:
    """Something that counts joules from some time on.

    Attributes:
        name: What it measures.
        read: Joules by now.
        most: Where it begins anew, in joules; 0 if it does not.
    """

    name: str
    read: Callable[[], float]
    most: float = 0.0


@dataclass(kw_only=True, slots=True)
class Meter:
    """Joules over time.

    Attributes:
        counters: What is read.
        why_not: Why nothing can be read; "" if something can.
        readings: Wall-clock seconds, and joules since the first reading.
    """

    counters: Sequence[Counter]
    why_not: str
    readings: list[tuple[float, float]] = field(default_factory=list)

    def between(self, began: float, ended: float) -> float | None:
        """Joules between two wall-clock times; None where there are no readings of both."""
        times = [at for at, _ in self.readings]
        if not times or not times[0] <= began < ended <= times[-1]:
            return None
        return self._at(ended) - self._at(began)

    def _at(self, when: float) -> float:
        after = next(i for i, (at, _) in enumerate(self.readings) if at >= when)
        if after == 0:
            return self.readings[0][1]
        (t0, j0), (t1, j1) = self.readings[after - 1], self.readings[after]
        return j0 + (j1 - j0) * (when - t0) / (t1 - t0)


@contextmanager
def metered(counters: tuple[Sequence[Counter], str] | None = None) -> Iterator[Meter]:
    """Read all counters ten times a second while the block runs.

    Args:
        counters: What `find_counters` returned; None looks for them.
    """
    found, why_not = find_counters() if counters is None else counters
    meter = Meter(counters=found, why_not=why_not)
    if not found:
        yield meter
        return
    ended = threading.Event()
    reader = threading.Thread(target=_read_on, args=(meter, ended), name="energy", daemon=True)
    reader.start()
    try:
        yield meter
    finally:
        ended.set()
        reader.join(10)


def find_counters(folder: Path = POWERCAP) -> tuple[Sequence[Counter], str]:
    """What can be read here, and otherwise why nothing can.

    Args:
        folder: Of Linux's powercap framework.
    """
    cpus, no_cpus = _rapl(folder)
    gpus, no_gpus = _nvml()
    return [*cpus, *gpus], "" if cpus or gpus else f"{no_cpus}; {no_gpus}"


def _read_on(meter: Meter, ended: threading.Event) -> None:
    total, before = 0.0, [counter.read() for counter in meter.counters]
    meter.readings.append((time.time(), total))
    last = False
    while not last:
        last = ended.wait(_EVERY_S)
        try:
            now = [counter.read() for counter in meter.counters]
        except OSError as error:
            meter.why_not = f"it could not be read on ({error.strerror})"
            meter.readings.clear()
            return
        for counter, old, new in zip(meter.counters, before, now, strict=True):
            total += new - old + (counter.most if new < old else 0.0)
        before = now
        meter.readings.append((time.time(), total))


def _rapl(folder: Path) -> tuple[list[Counter], str]:
    """Packages and what lies beside them; what a package contains is counted with it, but for memory."""
    zones = sorted(folder.glob("*-rapl:*")) if folder.is_dir() else []
    if not zones:
        return [], f"no RAPL in {folder}"
    found = []
    for zone in zones:
        try:
            name = (zone / "name").read_text().strip()
            if not (zone.name.count(":") == 1 and name.startswith("package")) and name != "dram":
                continue
            most = int((zone / "max_energy_range_uj").read_text()) / 1e6
            counter = Counter(name=name, read=_reader(zone / "energy_uj"), most=most)
            counter.read()
        except (OSError, ValueError) as error:
            return (
                [],
                f"{zone} cannot be read ({getattr(error, 'strerror', None) or error}; only root may, in most systems)",
            )
        found.append(counter)
    return found, "" if found else f"no package in {folder}"


def _reader(file: Path) -> Callable[[], float]:
    return lambda: int(file.read_text()) / 1e6


def _nvml() -> tuple[list[Counter], str]:
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return [], "no NVML (pip install nvidia-ml-py, on machines with NVIDIA GPUs)"
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        counters = [Counter(name=f"GPU {i}", read=_gpu(nvml, handle)) for i, handle in enumerate(handles)]
        for counter in counters:
            counter.read()
    except nvml.NVMLError as error:
        return [], f"NVML has no energy counters here ({error})"
    return counters, "" if counters else "NVML sees no GPU"


def _gpu(nvml: Any, handle: Any) -> Callable[[], float]:
    return lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

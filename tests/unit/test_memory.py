"""What is freed stays with the process, in a real one."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

CHOICES = {
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "GLIBC_TUNABLES": "glibc.malloc.check=0",
    "LD_PRELOAD": "libjemalloc.so.2",
}
FAULTS = """
import resource, sys, torch
from hvdtrain.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(4)])  # 4 MB a gradient
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
def step():
    model(torch.ones(4, 1024)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
before = faults()
for _ in range(50):
    step()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone can be told")
def test_a_step_gets_no_new_pages():
    environment = {name: value for name, value in os.environ.items() if name not in CHOICES}

    def faults(how):
        ended = subprocess.run(
            [sys.executable, "-c", FAULTS, how],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return int(ended.stdout)

    gradients = 50 * 4 * 1024  # pages of 4 KiB in fifty steps
    kept = faults("keep")
    assert kept < gradients / 20  # a gradient now and then, where the heap had no room yet
    # How much glibc gives back hangs on where the heap's blocks came to lie: a fifth to four fifths were seen.
    assert faults("leave") > max(gradients / 20, 4 * kept)  # else there is nothing to mend any more


@pytest.mark.parametrize("name", CHOICES)
def test_who_has_chosen_is_left_alone(name, monkeypatch):
    from hvdtrain import memory

    for other in CHOICES:
        monkeypatch.delenv(other, raising=False)
    assert not memory.chosen_by_user()
    monkeypatch.setenv(name, CHOICES[name])
    assert memory.chosen_by_user()
    assert not memory.keep_freed_memory()

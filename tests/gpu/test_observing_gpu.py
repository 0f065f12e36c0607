"""Laps and profiles on a GPU, whose work is only queued."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import hvdtrain
from hvdtrain.backends.laps import PHASES, Laps
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.observe.memory_use import memory_in_use
from hvdtrain.profiling.profiler import Profiler
from hvdtrain.settings.profiling import ProfiledSteps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here"),
]


def test_a_lap_is_what_the_gpu_takes_and_steps_that_are_not_timed_are_not_waited_for():
    device = torch.device("cuda", 0)
    laps = Laps(device)
    a = torch.randn(8192, 8192, device=device)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    began = time.perf_counter()
    laps.begin(timed=False)
    for _ in range(20):
        a @ a
    laps.lap("forward")
    assert time.perf_counter() - began < 0.05  # 20 products of a teraflop are only queued
    torch.cuda.synchronize()
    assert laps.take() == [0.0] * len(PHASES)
    laps.begin(timed=True)
    for _ in range(20):
        a @ a
    laps.lap("forward")
    laps.lap("backward")
    seconds = dict(zip(PHASES, laps.take(), strict=True))
    assert seconds["forward"] > 0.1
    assert seconds["backward"] < 0.01


@pytest.mark.parametrize("planted", ["input", "Python", "compute"])
def test_what_binds_the_step_is_named_and_memory_is_recorded(tmp_path, planted):
    class Slow(ArrayDataset):
        def __getitem__(self, index):
            time.sleep(0.01 if planted == "input" else 0)
            return super().__getitem__(index)

    class Deep(nn.Linear):
        def forward(self, x):
            product = torch.ones(8192, 8192, device=x.device)
            for _ in range(20 if planted == "compute" else 0):
                product = product @ torch.ones_like(product) / 8192
            return super().forward(x) * product.mean()

    def loss(output, target):
        time.sleep(0.05 if planted == "Python" else 0)
        return mse_loss(output, target)

    said = []
    with hvdtrain.init("local", device="cuda") as backend:
        model = Deep(4, 1).to(backend.device)
        profiler = Profiler(backend, ProfiledSteps(3, 6), tmp_path, said.append)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        trainer = hvdtrain.Trainer(backend, model, optimizer, loss=loss, callbacks=[profiler])
        trainer.fit(Slow(torch.randn(64, 4), torch.randn(64, 1)), epochs=1, global_batch_size=4, max_steps=10)
        profiler.finish(trainer)
        assert memory_in_use(backend.device) == torch.cuda.memory_reserved(backend.device) > 0
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["binds"] == planted, verdict
    assert (tmp_path / "memory-rank0.pickle").stat().st_size > 0
    names = {event.get("cat") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert "kernel" in names

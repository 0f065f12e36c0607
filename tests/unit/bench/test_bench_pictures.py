"""What benchmarks draw: the names and figures are in the picture, whatever signs names have."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

from hvdtrain.bench.collectives import COPY, Measured
from hvdtrain.bench.pictures import draw_bandwidths, draw_rates, draw_scaling
from hvdtrain.bench.spread import Spread


def test_rates_are_bars_with_the_fastest_first(tmp_path):
    draw_rates({"slow $x$": Spread.of([1.0, 2.0, 3.0]), "fast": Spread.of([9.0])}, tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn.startswith("<svg")
    assert drawn.index("fast") < drawn.index("slow")
    assert "$x$" in drawn
    assert "samples/s" in drawn


def test_bandwidths_have_a_panel_for_each_collective(tmp_path):
    measured = Measured(ranks=3)
    measured.add("torch", {name: {4: [1e-6, 2e-6], 1024: [3e-6]} for name in ("all-reduce", "broadcast")})
    measured.add(COPY, {COPY: {4: [1e-7]}})
    draw_bandwidths(measured, ["all-reduce", "broadcast"], tmp_path / "b.svg")
    drawn = (tmp_path / "b.svg").read_text()
    assert "all-reduce, 3 ranks" in drawn
    assert "broadcast, 3 ranks" in drawn
    assert "torch" in drawn
    assert "copy" in drawn


def test_scaling_is_drawn_beside_what_was_measured(tmp_path):
    projected = {engine: {"ring": [(4, 0.9), (64, 0.5)]} for engine in ("mpi", "torch")}
    for file in ("c.png", "c.svg"):
        draw_scaling(projected, {engine: [(1, 1.0), (2, 0.95)] for engine in projected}, tmp_path / file)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "c.svg").read_text()
    assert all(word in drawn for word in (">mpi<", ">torch<", ">measured<"))
    assert "ring" in drawn

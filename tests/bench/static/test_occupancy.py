"""How paths fill a GPU."""

import dataclasses

from bench.static import baseline, occupancy
from tests.comparison import is_close
from wn_kernels.plan import devices
from wn_kernels.plan.stages import Costs, Grid, Stage

H200 = devices.GPUS["H200"]


def test_what_a_launch_covers():
    """Its programs' bytes in flight, as many programs as the machine holds, of latency times
    bandwidth, or of all there is to move."""
    device = dataclasses.replace(H200, bandwidth=1e12, latency=1e-6, multiprocessors=100)
    assert Stage(1e9).covers(device) == 1  # a vendor's
    for programs, covers in ((10, 0.1), (50, 0.5), (200, 1.0), (10**6, 1.0)):
        grid = Grid(programs, 10_000, 2)
        assert is_close(Stage(1e9, grid=grid).covers(device), covers)
        assert grid.waves(device) == programs / 200
    assert is_close(Stage(1e9, grid=Grid(10**6, 1_000, 2)).covers(device), 0.2)
    assert is_close(Stage(2e5, grid=Grid(10, 10_000, 2)).covers(device), 0.5)
    assert Stage(0, grid=Grid(10, 10_000, 2)).covers(device) == 1


def test_the_estimate_follows_it():
    grid = Grid(66, 2**13, 1)
    model = Costs({}, {}, H200, H200.rates[0])
    share = Stage(1e8, grid=grid).covers(H200)
    assert 0 < share < 0.5
    whole, part = model.seconds([Stage(1e8)]), model.seconds([Stage(1e8, grid=grid)])
    assert is_close(part - H200.overhead, (whole - H200.overhead) / share)


def test_figures():
    """All lines have a name of their own, and stand in the baseline."""
    found = list(occupancy.lines())
    figures = occupancy.figures(found)
    assert len(figures) == len(found) == len(devices.GPUS) * len(occupancy.CASES)
    assert not baseline.worse("occupancy", figures)
    narrow = min(found, key=lambda line: line.covers)
    assert narrow.covers < occupancy.COVERED
    assert any("covers less" in fault for fault in narrow.faults())
    assert not [line.key for line in found if line.seconds > line.eager], "never above eager"

"""Shows how the kernels of the planned paths fill a GPU, by the cost model: nothing is timed.

A launch covers the share of the memory's bandwidth that its bytes in flight are of latency times
bandwidth, or of all that it moves (`wn_kernels/plan/stages.py`). A line shows the launch of ours
that covers the least, and the estimate of the path beside eager PyTorch's and beside the floor,
which is a launch for each direction and the larger one of

    bytes        inputs and results of each direction, once, over the bandwidth
    operations   those of the products, over the vendor's rate
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from rich.console import Console

from bench.cases import Case
from bench.gpu import predict
from bench.gpu.conv import CASES as CONVOLUTIONS
from bench.gpu.linear import BF16, FLOAT32
from bench.report.tables import Table, printed
from bench.static import baseline
from wn_kernels import plan
from wn_kernels.plan import costs, devices
from wn_kernels.plan.devices import Device
from wn_kernels.plan.stages import Stage, narrowest

CASES = [
    *BF16,
    *(case for case in FLOAT32 if case.precision == "own"),
    *(case for case in CONVOLUTIONS if case.channels_last),
]

# A launch should cover this share.
COVERED = 0.8
# A linear layer of at most FEW rows should take less than this multiple of the floor.
FLOOR, FEW = 1.1, 64


class Line(NamedTuple):
    """Holds a path that the cost model picks on a device. `narrowest` is the launch of ours that
    covers the least, and times are in seconds."""

    device: Device
    case: Case
    path: str
    narrowest: Stage | None
    covers: float
    seconds: float
    eager: float
    floor: float

    @property
    def key(self) -> str:
        """Returns the name of the line in the baseline."""
        return f"{self.device.name}, {self.case.label}, {self.case.dtype}, {self.case.mode}"

    def faults(self) -> list[str]:
        """Returns what it misses."""
        few = self.case.kind == "Linear" and self.case.x_shape[0] <= FEW
        found = {
            f"covers less than {COVERED}": self.covers < COVERED,
            f"above {FLOOR} of the floor": few and self.seconds > FLOOR * self.floor,
            "above eager": self.seconds > self.eager,
        }
        return [name for name, holds in found.items() if holds]


def lines(cases: list[Case] = CASES) -> Iterator[Line]:
    """Yields the picked path of every case on every device."""
    for device in devices.GPUS.values():
        for case in cases:
            yield _line(device, case)


def _line(device: Device, case: Case) -> Line:
    call = case.call()
    found = costs.costs(call, "triton", device)
    choice = plan.by_cost(call, "triton", device)
    steps = predict.stages(found, choice, case.mode)
    least = narrowest(steps, device)
    path = choice.forward if case.mode == "infer" else str(choice)
    return Line(
        *(device, case, path, least, least.covers(device) if least else 1.0),
        found.seconds(steps),
        predict.vendors(case, device)["eager"],
        _floor(case, device, found.rate),
    )


def _floor(case: Case, device: Device, rate: float) -> float:
    """Returns the floor of a case in seconds."""
    layer, x = case.layer(torch.device("meta")), torch.empty(case.x_shape, device="meta")
    y, w = layer(x.to(case.torch_dtype)).numel(), layer.weight.numel()
    # Each direction reads `x` and `V`. The forward writes `y`; the backward reads `dY`, and writes
    # `dX` and `dV`.
    elements, launches = x.numel() + w + y, 1
    if case.mode == "train":
        elements, launches = 3 * (x.numel() + w) + 2 * y, 2
    operations, _ = case.work()
    moved = case.torch_dtype.itemsize * elements
    return max(moved / device.bandwidth, operations / rate) + launches * device.overhead


def figures(found: list[Line]) -> baseline.Figures:
    """Returns what the baseline holds: what no launch covers, and the time beside the floor."""
    return {
        one.key: {
            "uncovered": round(1 - one.covers, 3),
            "over the floor": round(one.seconds / one.floor, 3),
        }
        for one in found
    }


def table(found: list[Line]) -> Table:
    """Returns the table of all lines, those that miss something marked."""
    names = ["programs", "waves", "in flight", "covers", "estimate", "/ floor", "/ eager"]
    lines = [["device", "case", "mode", "path", *names, "misses"]]
    for one in found:
        grid = one.narrowest.grid if one.narrowest else None
        filled = ("", "", "")
        if grid is not None:
            waves, flight = grid.waves(one.device), grid.in_flight(one.device)
            filled = (str(grid.programs), f"{waves:.2f}", f"{flight / 2**20:.2f} MiB")
        lines.append(
            [
                *(one.device.name, f"{one.case.label} {one.case.dtype}", one.case.mode, one.path),
                *(*filled, f"{one.covers:.2f}", f"{one.seconds * 1e6:.0f} µs"),
                *(f"{one.seconds / one.floor:.2f}", f"{one.seconds / one.eager:.2f}"),
                ", ".join(one.faults()),
            ]
        )
    title = "how paths fill a GPU (by the cost model, not timed)"
    return printed(title, lines, numbers=slice(4, -1))


def main(write: bool) -> int:
    """Prints the table. Returns 1 if a figure is worse than the baseline."""
    found = list(lines())
    console = Console()
    (console if console.is_terminal else Console(width=180)).print(table(found))
    missed = sum(bool(one.faults()) for one in found)
    console.print(f"{missed} of {len(found)} miss something")
    return 1 if baseline.settle(console, "occupancy", figures(found), write) else 0

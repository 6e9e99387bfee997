"""A candidate of the cost model is a list of stages that run one after the other.

Its time is estimated as

    Σ launches · overhead + max(bytes / (bandwidth · covered share), operations / rate, least)

over its stages. The share of the bandwidth that a stage covers is that of its bytes in flight in
latency times bandwidth; those of a vendor's cover it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..call import Call, Geometry
from .devices import Device


class Grid(NamedTuple):
    """How the programs of a launch fill a GPU.

    Attributes:
        programs: how many there are.
        flight: the bytes that a program has on their way from memory at a time.
        resident: how many of them a multiprocessor holds at a time.
    """

    programs: int
    flight: float
    resident: int

    def waves(self, device: Device) -> float:
        """Returns how often the programs fill the machine."""
        return self.programs / (self.resident * device.multiprocessors)

    def in_flight(self, device: Device) -> float:
        """Returns the bytes on their way from memory at a time."""
        return min(self.programs, self.resident * device.multiprocessors) * self.flight


class Stage(NamedTuple):
    """A stage is one launched operation of a candidate.

    Attributes:
        bytes: what it moves.
        operations: what it computes.
        least: seconds that it takes whatever it moves and computes.
        launches: how many launches' overhead it has.
        grid: how it fills a GPU, if it is a launch of ours there.
    """

    bytes: float
    operations: float = 0.0
    least: float = 0.0
    launches: int = 1
    grid: Grid | None = None

    def covers(self, device: Device) -> float:
        """Returns the share of the device's bandwidth that its bytes in flight cover. There have to
        be as many as arrive during the memory's latency, or all that there are."""
        if self.grid is None:
            return 1.0
        needed = min(device.latency * device.bandwidth, self.bytes)
        return min(1.0, self.grid.in_flight(device) / needed) if needed else 1.0


def narrowest(stages: list[Stage], device: Device) -> Stage | None:
    """Returns the launch of ours that covers the least of a GPU's bandwidth, if there is one."""
    ours = (stage for stage in stages if stage.grid is not None)
    return min(ours, key=lambda stage: stage.covers(device), default=None)


def can_follow(forward: str, backward: str) -> bool:
    """Returns whether a forward leaves what a backward takes. The form `product` takes `x Vᵀ`,
    which a forward that forms `W` does not compute."""
    return backward != "product" or forward != "materialize"


class Costs(NamedTuple):
    """Holds the candidates of each direction by variant, on a device that computes at `rate`.
    `kept` is the backward of a training step that keeps `W`, if that is a candidate of its own."""

    forward: dict[str, list[Stage]]
    backward: dict[str, list[Stage]]
    device: Device
    rate: float
    kept: list[Stage] | None = None

    def seconds(self, stages: list[Stage]) -> float:
        """Returns the estimated time of a candidate in seconds."""
        return sum(self._seconds(stage) for stage in stages)

    def _seconds(self, stage: Stage) -> float:
        device = self.device
        moving = stage.bytes / (device.bandwidth * stage.covers(device))
        computing = stage.operations / self.rate
        return stage.launches * device.overhead + max(moving, computing, stage.least)

    def keeping_pays(self) -> bool:
        """Returns whether a training step that keeps `W`, if it is a candidate, is faster than one
        of the fastest candidates."""
        if self.kept is None:
            return False
        forward, backward = self.cheapest()
        without = self.forward[forward] + self.backward[backward]
        return self.seconds(self.forward["materialize"] + self.kept) < self.seconds(without)

    def cheapest(self) -> tuple[str, str]:
        """Returns the fastest forward, and the fastest backward that can follow it. The first one
        wins a tie."""
        forward = self.cheapest_forward()
        follows = [name for name in self.backward if can_follow(forward, name)]
        return forward, self._fastest(self.backward, follows)

    def cheapest_forward(self) -> str:
        """Returns the fastest forward. The first one wins a tie."""
        return self._fastest(self.forward, list(self.forward))

    def _fastest(self, candidates: dict[str, list[Stage]], names: list[str]) -> str:
        return min(names, key=lambda name: self.seconds(candidates[name]))


def keeps_product(call: Call) -> bool:
    """Returns whether `x Vᵀ` takes at most an eighth of the bytes of `V`. If it is kept for the
    backward, the layer saves at most 1/8 of its weight more than the plain layer does."""
    row = 8 * math.prod(call.x_shape[:-1]) * call.x_dtype.itemsize
    return call.dim == 0 and row <= call.v_shape[1] * call.v_dtype.itemsize


def convolution_sizes(call: Call, conv: Geometry) -> tuple[float, float, float, float]:
    """Returns the bytes of the input, of the output and of `W`, and the operations of the
    product."""
    size = call.x_dtype.itemsize
    sizes = conv.output_sizes(call.x_shape[2:], call.v_shape[2:])
    batch, weight = call.x_shape[0], math.prod(call.v_shape)
    pixels = batch * math.prod(call.x_shape[2:] if conv.transposed else sizes)
    y = size * batch * conv.out_channels(call.v_shape) * math.prod(sizes)
    return size * math.prod(call.x_shape), y, size * weight, 2.0 * pixels * weight

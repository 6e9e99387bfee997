"""A candidate of the cost model is a list of stages that run one after the other.

Its time is estimated as

    Σ launches · overhead + max(bytes / bandwidth, operations / rate, least)

over its stages.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..call import Call, Geometry
from .devices import Device


class Stage(NamedTuple):
    """A stage is one launched operation of a candidate.

    Attributes:
        bytes: what it moves.
        operations: what it computes.
        least: seconds that it takes whatever it moves and computes.
        launches: how many launches' overhead it has.
    """

    bytes: float
    operations: float = 0.0
    least: float = 0.0
    launches: int = 1


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
        device = self.device
        return sum(
            s.launches * device.overhead
            + max(s.bytes / device.bandwidth, s.operations / self.rate, s.least)
            for s in stages
        )

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
        forward = self._fastest(self.forward, list(self.forward))
        follows = [name for name in self.backward if can_follow(forward, name)]
        return forward, self._fastest(self.backward, follows)

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

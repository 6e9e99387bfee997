"""This file estimates how long a recurrent layer takes on a CPU, as `costs.py` does for the others.

There are two ways. The native library goes through the steps by itself, and forms no weight
(`recurrence.h`). Or the weights are formed for PyTorch's function, which is oneDNN's for an LSTM,
and a product and a few operations for every step of the other layers.
"""

from __future__ import annotations

import functools

from . import costs
from .devices import native
from .stages import Costs, Stage

# A step of PyTorch's own loop has the overhead of this many stages of the native library.
STEP_CALLS = 30


@functools.lru_cache(maxsize=1024)
def pays(
    is_lstm: bool,
    gates: int,
    steps: int,
    batch: int,
    inputs: int,
    units: int,
    itemsize: int,
    recorded: bool,
) -> bool:
    """Returns whether the library is the faster way for one direction of a layer.

    Args:
        gates: how many a unit has.
        recorded: whether there will be a backward.
    """
    device = native()
    rows, outputs = steps * batch, gates * units
    of_x, of_h = (2.0 * rows * n * outputs for n in (inputs, units))
    weights = float(itemsize * (inputs + units) * outputs)
    moved = itemsize * rows * (inputs + outputs + units)
    products = costs.vendors(device, of_x, rows)
    taken = Stage(0, of_h / device.own, launches=steps)
    stepped = [Stage(weights + moved, products), taken]
    form = Stage(2 * weights, launches=costs.FORMED_CALLS)
    if is_lstm:
        rate = costs.CONVOLUTION_EFFICIENCY * device.conv
        layer = Stage(moved, (of_x + of_h) / rate, launches=costs.CONVOLUTION_CALLS)
        formed, grads = [form, Stage(2 * weights), layer], [Stage(2 * weights), layer, layer]
    else:
        loop = Stage(0, costs.vendors(device, of_h, batch), launches=steps * STEP_CALLS)
        formed = [form, Stage(weights + moved, products), loop]
        grads = [Stage(moved, products), Stage(moved, products), loop, loop]
    if recorded:
        of_weight = Stage(moved, costs.vendors(device, of_h, rows))
        stepped += [Stage(moved, products), Stage(moved, products), taken, of_weight]
        formed += grads
    found = Costs({"stepped": stepped, "formed": formed}, {}, device, device.rate(itemsize))
    return found.cheapest_forward() == "stepped"

"""This file estimates how long a recurrent layer takes on a CPU, as `costs.py` does for the others.

There are two ways. The native library goes through the steps by itself, and forms no weight
(`recurrence.h`). Or the weights are formed for PyTorch's function, which is oneDNN's for an LSTM,
and a product and a few operations for every step of the other layers.
"""

from __future__ import annotations

import functools

import torch

from ..call import Call
from . import costs
from .devices import native
from .stages import Costs, Stage

# A step of PyTorch's own loop, of oneDNN's LSTM and of the library's steps has the overhead of this
# many stages of the native library.
LOOP_CALLS, LSTM_CALLS, STEP_CALLS = 30, 6, 2
# A number of a gate costs so many times its bytes in the library's forward and backward.
GATES, GATE_GRADS = 4, 38
# The gradients of oneDNN's LSTM reach this fraction of the rate of its forward.
GRADS_EFFICIENCY = 0.8


@functools.lru_cache(maxsize=1024)
def pays(
    is_lstm: bool,
    gates: int,
    steps: int,
    batch: int,
    inputs: int,
    units: int,
    dtype: torch.dtype,
    recorded: bool,
    is_formed: bool = False,
) -> bool:
    """Returns whether the library is the faster way for one direction of a layer.

    Args:
        gates: how many a unit has.
        recorded: whether there will be a backward.
        is_formed: whether the weights are formed in any case. Then the products of the inputs are
            PyTorch's.
    """
    device = native()
    size, rows, outputs = dtype.itemsize, steps * batch, gates * units

    def layer(columns: int) -> Costs:
        """Returns the costs of a linear layer over all steps at once."""
        shapes = torch.Size((rows, columns)), torch.Size((outputs, columns))
        return costs.native_linear(Call(*shapes, dtype, dtype, 0))

    operations_x, operations_h = (2.0 * rows * n * outputs for n in (inputs, units))
    weights = float(size * (inputs + units) * outputs)
    moved = size * rows * (inputs + outputs + units)
    of_x, of_h = layer(inputs), layer(units)
    forward, backward = of_x.cheapest()
    rate_h = costs.OWN_EFFICIENCY * device.own
    gate_bytes = float(size * rows * outputs)
    taken = Stage(0, operations_h / rate_h, launches=steps * STEP_CALLS)
    packed = Stage(2.0 * size * units * outputs)
    product = Stage(weights + moved, costs.vendors(device, operations_x, rows))
    of_inputs = [product] if is_formed else of_x.forward[forward]
    stepped = [*of_inputs, packed, taken, Stage(GATES * gate_bytes)]
    form = [] if is_formed else [Stage(2 * weights, launches=costs.FORMED_CALLS)]
    if is_lstm:
        # Every call copies the weights into a layout of its own.
        rate = costs.CONVOLUTION_EFFICIENCY * device.conv
        operations = (operations_x + operations_h) / rate
        copied = Stage(2 * weights, launches=costs.CONVOLUTION_CALLS)
        calls = Stage(0, launches=steps * LSTM_CALLS)
        formed = [*form, copied, Stage(moved, operations), calls]
        grads = [copied, Stage(2 * moved, 2 * operations / GRADS_EFFICIENCY), calls, calls]
    else:
        of_steps = costs.vendors(device, operations_h, batch)
        loop = Stage(0, of_steps, launches=steps * LOOP_CALLS)
        formed = [*form, product, loop]
        grads = [product, product, loop, loop]
    if recorded:
        # The gradient of the recurrent weight is the product of a linear layer's backward.
        of_weight = [s for s in of_h.backward[of_h.cheapest()[1]] if s.operations][:1]
        passes = Stage(3 * weights)
        of_gates = Stage(GATE_GRADS * gate_bytes)
        of_inputs = [product, product] if is_formed else of_x.backward[backward]
        stepped += [*of_inputs, taken, *of_weight, passes, of_gates]
        formed += [*grads, passes]
    found = Costs({"stepped": stepped, "formed": formed}, {}, device, device.rate(size))
    return found.cheapest_forward() == "stepped"


forget = pays.cache_clear

"""The cost model's expectation stands beside each figure. Where a figure misses it, a constant of
`wn_kernels/plan/devices.py` or a count of bytes in `wn_kernels/plan/gpu_costs.py` is wrong. Every
function returns seconds; none of them was measured."""

from __future__ import annotations

import math
from typing import Any

from bench.cases import Case
from wn_kernels.call import Call
from wn_kernels.plan import costs, devices, gpu_costs
from wn_kernels.plan.devices import Device
from wn_kernels.plan.stages import Costs, Stage

# The fraction of the bandwidth that PyTorch's weight norm reaches, as measured on an H200.
PASSES = 0.4


def seconds(steps: list[Stage], device: Device, rate: float) -> float:
    """Returns the seconds of stages that run one after the other."""
    return Costs({}, {}, device, rate).seconds(steps)


def rate(case: Case, device: Device) -> float:
    """Returns the operations per second of the vendor's product in a case."""
    itemsize = 2 if case.precision == "autocast" else case.torch_dtype.itemsize
    return device.rate(itemsize, case.precision == "tf32")


def vendors(case: Case, device: Device | None = None) -> dict[str, float]:
    """Returns the seconds of the plain layer, which has a product for each direction and sums the
    gradient of a bias, and of PyTorch's weight norm, which besides writes `W` from one read of `V`,
    and `dV` from one of `dW` and `V`. It has no kernel for another norm than l2, which is then left
    out. The device is the present one by default, as everywhere here."""
    device = device or devices.gpu()
    plain = _linear(case) if case.kind == "Linear" else _convolution(case, device)
    fast = rate(case, device)
    found = {"plain": seconds(plain, device, fast)}
    if case.norm == "l2":
        weight = float(case.size() * case.torch_dtype.itemsize) / PASSES
        norms = [Stage(2 * weight)] + ([Stage(3 * weight)] if case.mode == "train" else [])
        found["eager"] = seconds(plain + norms, device, fast)
    return found


def _linear(case: Case) -> list[Stage]:
    """Returns the vendor's products of a linear layer, and the sums of the gradient of its bias."""
    operations, moved = case.work()
    rows = math.prod(case.x_shape[:-1])
    operations *= gpu_costs.vendor_rows(rows) / rows
    products = 1 if case.mode == "infer" else 3
    launches = gpu_costs.PRODUCT_LAUNCHES
    plain = [Stage(moved / products, operations / products, launches=launches)] * products
    if case.mode == "train":
        y = rows * case.arguments[1] * case.torch_dtype.itemsize
        plain.append(gpu_costs.column_sums(rows, y))
    return plain


def _convolution(case: Case, device: Device) -> list[Stage]:
    """Returns the vendor's products of a convolution, which are those of our variant `materialize`
    between the passes that form `W` and finish its gradient."""
    found = costs.costs(case.call(), "triton", device)
    backward = found.backward["materialize"][1:-1] if case.mode == "train" else []
    return found.forward["materialize"][1:] + backward


def stages(found: Costs, choice: Any, mode: str) -> list[Stage]:
    """Returns the stages of a path of ours."""
    if mode == "infer":
        return found.forward[choice.forward]
    forward, backward = found.forward[choice.recorded], found.backward[choice.backward]
    if choice.keeps == "packed":  # the first stage of ours forms it
        backward = backward[1:]
    elif choice.keeps == "weight" and found.kept:
        backward = found.kept
    return [*forward, *backward]


def ours(call: Call, choice: Any, mode: str) -> float:
    """Returns the seconds of a path of ours."""
    found = costs.costs(call, "triton")
    return found.seconds(stages(found, choice, mode))


def kernels(call: Call, choice: Any, mode: str, launches: int) -> list[float | None]:
    """Returns the seconds of each kernel of a path alone, or `None` for each if the model counts
    other launches."""
    found = costs.costs(call, "triton")
    steps = stages(found, choice, mode)
    if len(steps) != launches:
        return [None] * launches
    return [found.seconds([stage]) for stage in steps]


def passes(size: float, forward: bool) -> dict[str, float]:
    """Returns the seconds of the operator alone, for a weight of that many bytes."""
    device = devices.gpu()
    one = seconds([Stage((2 if forward else 3) * size)], device, device.rates[1])
    return {"plain": one, "eager": one, "ours": one}


def product(call: Call) -> float:
    """Returns the seconds of the vendor's product in a call, forward."""
    found = costs.costs(call, "triton")
    return found.seconds(found.forward["materialize"][-1:])

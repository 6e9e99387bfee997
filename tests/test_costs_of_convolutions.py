"""The cost model's picks for convolutions, beside what was measured on an H200.

The products of ours and of the vendor were each timed alone in a CUDA graph, and are put together
to layers here. Our gradients of the weight in bfloat16, with the sums of their parts, are those of
docs/results/gpu-h200/results.jsonl, the rest is that of sweep.txt. Our gradients in float32 were
not measured as they are: the model's estimate stands for them where it picks them. What forms `W`
and finishes `dV` is the model's estimate too, and the same on each path.
"""

import math

import pytest
import torch

from wn_kernels import plan
from wn_kernels.call import Call, Geometry
from wn_kernels.plan import costs, devices, gpu_costs

H200 = devices.GPUS["H200"]
REPACK = 2.6  # a copy with channels last, µs
BIAS = 2.4  # the sum of dY alone, by the model
UNMEASURED = math.nan


def conv(*shapes, stride=1, padding=0, dilation=1, up=False, groups=1, dim=0):
    x, v = map(torch.Size, shapes)
    options = (
        (n,) * (len(x) - 2) if isinstance(n, int) else n for n in (stride, padding, dilation)
    )
    return x, v, Geometry(*options, up, (0,) * (len(x) - 2), groups), dim


# The layer, its precision, and the µs of the vendor's and of our y, dX and dW.
# fmt: off
MEASURED = {
    "80→512 k7": (conv((1, 80, 32), (512, 80, 7), padding=3), "bf16",
        15.3, 4.7, 19.7, 5.3, 14.9, 4.5),
    "up 512→256": (conv((1, 512, 32), (512, 256, 16), stride=8, padding=4, up=True), "bf16",
        26.8, 7.9, 28.1, 7.3, 21.4, 8.2),
    "up 1024→512": (conv((1, 1024, 16), (1024, 512, 16), stride=8, padding=4, up=True), "bf16",
        46.9, 10.4, 55.7, 10.1, 47.3, 13.8),
    "up 256→128": (conv((1, 256, 256), (256, 128, 8), stride=4, padding=2, up=True), "bf16",
        17.7, 3.7, 17.5, 6.7, 16.0, 3.7),
    "256 k3": (conv((1, 256, 256), (256, 256, 3), padding=1), "bf16",
        16.0, 4.3, 18.6, 4.8, 16.6, 5.5),
    "128 k11": (conv((1, 128, 512), (128, 128, 11), padding=25, dilation=5), "bf16",
        15.9, 7.2, 19.0, 7.2, 17.3, 10.7),
    "64 k3": (conv((1, 64, 1024), (64, 64, 3), padding=27, dilation=27), "bf16",
        11.8, 2.6, 14.4, 2.6, 32.0, 5.5),
    "positions": (conv((1, 768, 49), (768, 48, 128), padding=64, groups=16, dim=2), "bf16",
        1550.4, 11.2, 1179.8, 11.1, 129.0, 19.1),
    "2d 32→128": (conv((4, 32, 48, 48), (128, 32, 3, 3), padding=1), "bf16",
        7.9, 7.4, 9.8, 9.0, 17.2, 19.6),
    "2d 32→32": (conv((1, 32, 32, 129), (32, 32, 3, 9), stride=(1, 2), padding=(1, 4)), "bf16",
        7.7, 7.3, 11.5, 9.3, 9.5, 9.1),
    "2d 3→48": (conv((4, 3, 48, 48), (48, 3, 5, 5), padding=2), "bf16",
        10.0, 18.4, 21.9, 15.3, 25.2, 19.6),
    "float32 256 k3": (conv((1, 256, 512), (256, 256, 3), padding=1), "float32",
        25.2, 54.9, 20.6, 30.6, 21.3, UNMEASURED),
    "float32 64 k11": (conv((1, 64, 8192), (64, 64, 11), padding=5), "float32",
        34.4, 118.6, 35.6, 35.1, 47.9, UNMEASURED),
    "tf32 256 k3": (conv((1, 256, 512), (256, 256, 3), padding=1), "tf32",
        13.6, 9.3, 18.6, 14.4, 19.0, UNMEASURED),
    "tf32 128 k11": (conv((1, 128, 4096), (128, 128, 11), padding=5), "tf32",
        19.0, 16.2, 25.0, 35.1, 67.0, UNMEASURED),
    "tf32 32 k3": (conv((1, 32, 16384), (32, 32, 3), padding=1), "tf32",
        8.2, 4.4, 16.5, 5.7, 42.0, UNMEASURED),
}
# fmt: on


@pytest.fixture(autouse=True)
def _h200(monkeypatch):
    monkeypatch.setattr(costs, "gpu", lambda *_: H200)


@pytest.mark.parametrize("name", MEASURED)
def test_picks(name):
    """Within 5 % of the best combination of products, each with what forms and finishes the weight,
    forward and backward; and no slower than the vendor's products, which eager runs as well."""
    (x, v, geometry, dim), precision, *times = MEASURED[name]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    call = Call(x, v, dtype, dtype, dim, geometry, dtype == torch.bfloat16, precision == "tf32")
    model = costs.costs(call, "triton")
    size = v.numel() * dtype.itemsize
    form, finish = (1e6 * model.seconds([costs.Stage(n * size)]) for n in (3, 7))
    vendors_y, y, vendors_dx, dx, vendors_dw, dw = times
    if math.isnan(dw):
        own = gpu_costs._Products.of(call, geometry, model.device)
        dw = 1e6 * model.seconds(own.gradient())
    copy = 0.0 if call.channels_last else REPACK
    bias = BIAS if geometry.transposed else 0.0
    forward = {"packed": form + copy + y, "materialize": form + vendors_y}
    backward = {
        "packed": form + copy + dx + copy + dw + bias + finish,
        "weight_grad": form + vendors_dx + 2 * copy + dw + bias + finish,
        "materialize": form + vendors_dx + vendors_dw + BIAS + finish,
    }
    chosen = plan.by_cost(call, "triton")
    for paths, picked in ((forward, chosen.forward), (backward, chosen.backward)):
        assert paths[picked] <= 1.05 * min(paths.values()), (picked, paths)
        assert paths[picked] <= paths["materialize"]

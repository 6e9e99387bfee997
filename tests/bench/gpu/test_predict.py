"""What the cost model expects, by hand."""

from typing import NamedTuple

import pytest
import torch

from bench.gpu import layers, predict
from bench.gpu.linear import BF16, FLOAT32
from wn_kernels import plan
from wn_kernels.call import Call
from wn_kernels.plan import costs, devices


class About(NamedTuple):
    """What lies within so large a share of a value."""

    value: float
    share: float

    def __contains__(self, other):
        return abs(other - self.value) <= self.share * self.value


@pytest.fixture(autouse=True)
def h100(monkeypatch):
    monkeypatch.setattr(costs, "gpu", lambda *_: devices.GPUS["H100"])


def case(m, mode, precision="own"):
    (found,) = (
        c
        for c in (*BF16, *FLOAT32)
        if c.x_shape == (m, 4096)
        and c.arguments == (4096, 4096)
        and c.mode == mode
        and (c.dtype == "bfloat16" if precision == "own" else c.precision == precision)
    )
    return found


def test_a_layer_that_is_bound_by_its_weight():
    """An H100 reads 32 MiB in 11 µs; eager reads and writes them first, at 0.4 of the rate. One row
    of `dY` is summed."""
    weight = 2 * 4096 * 4096 / 2.97e12
    found = predict.vendors(case(1, "infer"))
    assert found["plain"] in About(4e-6 + weight, 0.01)
    assert found["eager"] in About(6e-6 + 6 * weight, 0.01)
    trained = predict.vendors(case(1, "train"))
    assert trained["plain"] in About(3 * found["plain"] + 2e-6, 0.01)
    assert trained["eager"] - trained["plain"] in About(4e-6 + 12.5 * weight, 0.01)


def test_a_layer_that_is_bound_by_products():
    """By the dtype's rate, which under autocast is bfloat16's."""
    operations = 2 * 512 * 4096 * 4096
    for precision, rate in (("tf32", 4.11e14), ("autocast", 7.84e14)):
        found = predict.vendors(case(512, "infer", precision))["plain"]
        assert found >= 4e-6 + operations / rate
        assert predict.rate(case(512, "infer", precision), devices.gpu()) == rate


def test_paths_of_ours():
    """The forward's without gradients, the backward's in a training step; and each kernel alone."""
    shapes = torch.Size((16, 4096)), torch.Size((4096, 4096))
    call = Call(*shapes, torch.bfloat16, torch.bfloat16, 0)
    one_pass = plan.Plan("triton", "one_pass", "one_pass")
    assert predict.ours(call, one_pass, "infer") in About(16e-6, 0.1)
    # The forward, the sum of its shares, the pass over dY, the product and the gradient.
    found = predict.kernels(call, one_pass, "train", 5)
    assert sum(found) in About(predict.ours(call, one_pass, "train"), 1e-9)
    assert predict.kernels(call, one_pass, "train", 6) == [None] * 6
    kept = plan.Plan("triton", "one_pass", "materialize", "weight")
    assert predict.ours(call, kept, "infer") == predict.ours(call, one_pass, "infer")
    spared = costs.costs(call, "triton").forward["materialize"][:1]
    formed = plan.Plan("triton", "materialize", "materialize")
    saved = predict.ours(call, formed, "train") - predict.ours(call, kept, "train")
    assert saved in About(costs.costs(call, "triton").seconds(spared), 1e-6)


def test_every_path_that_makes_a_difference(monkeypatch):
    calls = [
        (Call(*map(torch.Size, ((16, 64), (32, 64))), torch.bfloat16, torch.bfloat16, 0), "triton")
    ]
    monkeypatch.setattr(layers.tuning, "calls_of", lambda layer, inputs: calls)
    x = torch.empty(16, 64)
    for mode in ("infer", "train"):
        found = layers.paths(case(16, mode), torch.nn.Identity(), x)
        names = {
            *found.others,
            found.choice.forward if mode == "infer" else str(found.choice).partition("/")[2],
        }
        kept = {"materialize, keeps the weight"} if mode == "train" else set()
        assert names == {"scaled", "materialize", "one_pass"} | kept
        assert found.choice not in found.others.values()

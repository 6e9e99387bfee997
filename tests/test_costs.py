"""The cost model's constants and picks for linear layers, beside what was measured on an H200.

The results have every path as it was then. What replaced some of them is put together from
measured parts: the vendor's products from the plain layer, the norms and the one-pass gradient from
their kernels alone. Only passes over activations, and those that form `W` and finish `dV`, are the
model's estimates.
"""

import json
from pathlib import Path

import pytest
import torch

from wn_kernels import plan
from wn_kernels.backends import tiles
from wn_kernels.call import Call
from wn_kernels.plan import costs, devices

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "gpu-h200" / "first.jsonl"
H200 = devices.GPUS["H200"]


@pytest.fixture(autouse=True)
def _h200(monkeypatch):
    monkeypatch.setattr(costs, "gpu", lambda *_: H200)


def read():
    """The results of the section by rows, inputs, outputs, dtypes, whether in TF32, and mode."""
    found = {}
    for line in map(json.loads, RESULTS.read_text("utf-8").splitlines()):
        if line["kind"] == "result" and line["section"] == "linear":
            case = line["case"]
            (m, k), n = case["x_shape"], case["arguments"][1]
            v = getattr(torch, case["dtype"])
            x = torch.bfloat16 if case["precision"] == "autocast" else v
            key = m, k, n, x, v, case["precision"] == "tf32"
            found.setdefault(key, {})[case["mode"]] = line
    return found


MEASURED = read()


class Parts:
    """What was measured of a case, in seconds."""

    def __init__(self, key):
        self.m, self.k, self.n, x, v, tf32 = key
        self.lines = MEASURED[key]
        shapes = torch.Size((self.m, self.k)), torch.Size((self.n, self.k))
        self.call = Call(*shapes, x, v, 0, tf32=tf32)
        self.model = costs.costs(self.call, "triton")
        self.plan = plan.by_cost(self.call, "triton")

    def of(self, mode, name):
        return self.lines[mode]["seconds"][name]["median"]

    def kernel(self, name):
        """Of a kernel alone, in whichever mode it was measured; the fastest configuration."""
        lines = (one for line in self.lines.values() for one in line["kernels"])
        return min(one["seconds"]["median"] for one in lines if one["kernel"].startswith(name))

    def pass_(self, size):
        """A pass, by the model."""
        return self.model.seconds([costs.Stage(size / H200.passes)])

    def products(self):
        """The vendor's product in the forward, and one in the backward."""
        key = (self.m, self.k, self.n, self.call.x_dtype, self.call.x_dtype, self.call.tf32)
        same = Parts(key)  # of one dtype: the plain layer under autocast casts its weight as well
        forward = same.of("infer", "plain")
        rest = same.of("train", "plain") - forward - self.pass_(self.activations)
        return forward, rest / 2

    @property
    def has_one_pass(self):
        """Whether the forward in one pass was measured. Another kernel has taken its place in
        float32."""
        ieee = self.call.x_dtype == torch.float32 and not self.call.tf32
        return self.m <= 64 and "one_pass" in self.model.forward and not ieee

    @property
    def activations(self):
        return self.m * self.n * self.call.x_dtype.itemsize

    def paths(self):
        """Every path of the forward, and of a training step after the forward that is chosen."""
        v, w = (self.n * self.k * t.itemsize for t in (self.call.v_dtype, self.call.x_dtype))
        form, finish = self.pass_(v + w), self.pass_(w + 2 * v)
        scale, sums = self.pass_(2 * self.activations), self.pass_(self.activations)
        product, other = self.products()
        forward = {"materialize": form + product}
        late = "scaled" in self.model.forward
        if late:
            forward["scaled"] = self.kernel("slice_sum_kernel") + product + scale
        if self.has_one_pass:
            forward["one_pass"] = self.one_pass()
        forward["unmeasured"] = self.model.seconds(self.model.forward[self.plan.forward])
        dx = other + (scale if late else form)
        backward = {"materialize": form + 2 * other + sums + finish}
        if late:
            bias = sums if self.m > tiles.SUMMED_ROWS else 0.0
            backward["scaled"] = dx + bias + other + finish
        if "one_pass" in self.model.backward:
            backward["one_pass"] = dx + self.kernel("grad_one_pass_kernel")
        first = forward.get(self.plan.forward, forward["unmeasured"])
        if "product" in self.model.backward:  # which the model alone has a figure for
            backward["product"] = self.model.seconds(self.model.backward["product"])
        steps = {name: first + rest for name, rest in backward.items()}
        if self.plan.keeps == "weight":
            steps["kept"] = forward["materialize"] + backward["materialize"] - form
        return forward, steps

    def one_pass(self):
        """The forward in one pass: of up to 64 rows in bfloat16 in the tile of 64."""
        key = (64, self.k, self.n, self.call.x_dtype, self.call.v_dtype, False)
        line = MEASURED.get(key, self.lines)
        return min(
            one["seconds"]["median"]
            for one in line["infer"]["kernels"]
            if "FORM=one_pass" in one["kernel"]
        )


def name_of(key):
    m, k, n, x, v, tf32 = key
    names = {str(t).removeprefix("torch.") for t in (x, v)}
    return f"{m}x{k}x{n} {' '.join(sorted(names))}{' tf32' if tf32 else ''}"


def test_there_is_something_to_compare():
    assert len(MEASURED) == 30
    assert all({"infer", "train"} <= lines.keys() for lines in MEASURED.values())


@pytest.mark.parametrize("key", MEASURED, ids=name_of)
def test_picks(key):
    """Within 5 % of the best path, forward and training step, and no slower than eager."""
    parts = Parts(key)
    forward, steps = parts.paths()
    estimate = forward.pop("unmeasured")
    chosen = parts.plan
    picked = forward.get(chosen.forward)
    if picked is None:  # in one pass, if the model alone has a figure for it
        assert chosen.forward == "one_pass"
        assert not parts.has_one_pass
        assert parts.m <= tiles.one_pass_rows(2)
        picked = estimate
    assert picked <= 1.05 * min(forward.values()), (chosen, forward)
    assert picked <= parts.of("infer", "eager")
    step = steps["kept" if chosen.keeps == "weight" else chosen.backward]
    assert step <= 1.05 * min(steps.values()), (chosen, steps)
    assert step <= parts.of("train", "eager"), (chosen, steps)


@pytest.mark.parametrize("key", MEASURED, ids=name_of)
def test_times(key):
    """What the model says of the vendor's product, of the norms and of the kernels in one pass lies
    within a third of what was measured, and of half a launch from the host."""
    parts, near = Parts(key), {}
    product = parts.model.forward["materialize"][1]
    near["product"] = [product], parts.products()[0]
    if "scaled" in parts.model.forward:
        near["norms"] = parts.model.forward["scaled"][:1], parts.kernel("slice_sum_kernel")
    if parts.has_one_pass:
        near["one pass"] = parts.model.forward["one_pass"], parts.one_pass()
    if "one_pass" in parts.model.backward:
        near["dV"] = parts.model.backward["one_pass"][-1:], parts.kernel("grad_one_pass_kernel")
    for name, (stages, measured) in near.items():
        estimate = parts.model.seconds(stages)
        assert abs(estimate - measured) <= measured / 3 + 3e-6, (name, estimate, measured)


@pytest.mark.parametrize(
    ("m", "k", "n", "expected"),
    [
        (1, 4096, 4096, "one_pass/product, keeps the product"),
        (16, 4096, 16384, "one_pass/product, keeps the product"),
        (256, 4096, 4096, "scaled/product, keeps the product"),
        (1024, 4096, 16384, "scaled/scaled"),
        (8192, 4096, 4096, "materialize/materialize"),
        (512, 1024, 1024, "materialize/materialize, keeps the weight"),
        (8192, 1024, 1024, "materialize/materialize, keeps the weight"),
    ],
)
def test_plans(m, k, n, expected):
    """Those of the regimes, in bfloat16."""
    assert str(Parts((m, k, n, torch.bfloat16, torch.bfloat16, False)).plan) == expected

"""What runs is what was planned, on every backend, and what `explain` shows.

The variant that ran is read off what it did: the native library's own marks in a profile, the
operands of PyTorch's products on the ATen path, and the kernels that Triton launches.
"""

from contextlib import contextmanager
from random import Random

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import wn_kernels
from tests.comparison import DIMS, FLOATS, LAYOUTS, Case, ConvCase
from wn_kernels import plan, prepare, tuning, use_backend
from wn_kernels.backends import aten, native

HALF = torch.bfloat16
CASES = {
    "linear, one row": Case(1, 300, 200, 0),
    "linear, few rows": Case(8, 1024, 512, 0),
    "linear, many rows": Case(400, 64, 48, 0),
    "linear, small": Case(5, 12, 7, 0),
    "linear, inputs": Case(40, 512, 300, 1),
    "linear, whole": Case(9, 512, 300, None),
    "linear, half": Case(9, 512, 300, 0, HALF),
    "linear, half, one row": Case(1, 512, 300, 0, HALF),
    "linear, half, many rows": Case(400, 64, 48, 0, HALF),
    "linear, half of a wide weight": Case(9, 512, 300, 0, HALF, torch.float32),
    "linear, kept": Case(600, 300, 200, 0, HALF),
    "linear, float16": Case(70, 512, 300, 0, torch.float16),
    "1d, mixed": ConvCase(1, 32, 32, (40,), (24,), 0, x_dtype=HALF, v_dtype=torch.float32),
    "1d, few pixels": ConvCase(1, 96, 80, (9,), (7,), 0),
    "1d, many pixels": ConvCase(2, 6, 8, (900,), (3,), 0),
    "1d, wide": ConvCase(1, 700, 700, (16,), (3,), 0),
    "1d, positions": ConvCase(1, 32, 32, (40,), (24,), 2, groups=4),
    "1d, half": ConvCase(1, 32, 32, (40,), (24,), 0, x_dtype=HALF, v_dtype=HALF),
    "2d": ConvCase(2, 8, 6, (7, 5), (3, 3), 0),
    "2d, channels last": ConvCase(2, 48, 64, (4, 3), (3, 3), 0, layout="channels-last"),
    "up": ConvCase(1, 64, 32, (9,), (8,), 0, transposed=True, stride=4),
    "up, wide": ConvCase(1, 1024, 512, (16,), (16,), 0, transposed=True, stride=8),
    "up, outputs": ConvCase(1, 64, 32, (9,), (8,), 1, transposed=True, stride=4),
}
LATE = ("scaled", "input", "output")


def drawn(seed):
    """A random call: of any kind, in any dtypes, along any `dim`, in any layout."""
    random = Random(seed)
    x_dtype, v_dtype = (random.choice(FLOATS) for _ in range(2))
    if random.random() < 0.5:
        v_dtype = x_dtype
    common = {"bias": random.random() < 0.5, "seed": seed}
    if random.random() < 0.5:
        sizes = random.choice([1, 7, 40, 300]), random.randint(2, 300), random.randint(2, 90)
        layout = random.choice(LAYOUTS)
        return Case(*sizes, random.choice(DIMS), x_dtype, v_dtype, layout=layout, **common)
    rank, groups, transposed = random.randint(1, 2), random.choice([1, 1, 2]), random.random() < 0.3
    channels = [groups * random.randint(1, 24) for _ in range(2)]
    sizes = tuple(random.randint(4, 9) for _ in range(rank))
    return ConvCase(
        random.randint(1, 3),
        *channels,
        sizes,
        (random.randint(1, 4),) * rank,
        random.choice([0, 1, 2, None]),
        x_dtype,
        v_dtype,
        transposed=transposed,
        groups=groups,
        stride=random.randint(1, 2),
        layout=random.choice(["contiguous", "channels-last"]) if rank == 2 else "contiguous",
        **common,
    )


CASES |= {f"drawn {seed}": drawn(seed) for seed in range(40)}


def described(case):
    """How `tuning` calls a case: by its operands."""
    conv = case.geometry() if isinstance(case, ConvCase) else None
    dtypes = case.x.dtype, case.v.dtype
    return tuning.Call(case.x.shape, case.v.shape, *dtypes, case.dim, conv)


@contextmanager
def spied(monkeypatch, *names):
    """Collects calls of the ATen path's functions by these names: name and arguments."""
    calls = []
    with monkeypatch.context() as patch:
        for name in names:
            where, attribute = (torch, name[6:]) if name.startswith("torch.") else (aten, name)
            real = getattr(where, attribute)

            def spy(*args, _real=real, _name=name, **kwargs):
                calls.append((_name, args))
                return _real(*args, **kwargs)

            patch.setattr(where, attribute, spy)
        yield calls


def run(case, grad):
    """A call of the case with its plan, and the gradient function of its output."""
    call = described(case)
    inputs = [t if t is None else t.detach() for t in (case.x, case.v, case.g, case.bias)]
    inputs = [t if t is None else t.requires_grad_(grad) for t in inputs]
    with prepare.watching() as seen:
        y = tuning.run_call(call, inputs)
    ((planned_call, backend),) = set(seen)
    wanted = [t for t in inputs if t is not None]
    return (
        plan.choose(planned_call, backend),
        inputs,
        lambda: torch.autograd.grad(y, wanted, case.dy),
    )


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_native(name, grad):
    native.build()
    case = CASES[name]
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        chosen, _, backward = run(case, grad)
        if grad:
            backward()
    marks = {e.name for e in seen.events() if e.name.startswith("wn_kernels::")}
    if chosen.backend != "native":
        assert not marks
        return
    kind = "linear" if not isinstance(case, ConvCase) else "convolution"
    expected = {f"wn_kernels::{kind}, {chosen.recorded if grad else chosen.forward}"}
    if grad:
        expected |= {f"wn_kernels::{kind}_backward, {chosen.backward}"}
    assert marks == expected


def test_native_serves_some_of_each():
    """The test above compares something."""
    native.build()
    served = {name for name, case in CASES.items() if run(case, False)[0].backend == "native"}
    assert len(served) >= 10


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_aten(name, grad, monkeypatch):
    case = CASES[name]
    products = ("torch.mm", "torch.convolution", "convolution_grads", "scaled_weight")
    forms = ("torch._weight_norm_interface", "weight_norm")
    with use_backend("aten"), spied(monkeypatch, *products, *forms) as calls:
        chosen, (x, v, _, _), backward = run(case, grad)
        forms_weight = any(called in forms for called, _ in calls) or (
            chosen.keeps == "weight" and any(called == "scaled_weight" for called, _ in calls)
        )
        assert forms_weight == ((chosen.recorded if grad else chosen.forward) == "materialize")
        for called, args in calls:
            if called == "torch.convolution":
                assert (args[1].data_ptr() == v.data_ptr()) == (chosen.forward in LATE)
                if chosen.forward in LATE:
                    assert (args[0].data_ptr() == x.data_ptr()) == (chosen.forward == "output")
        calls.clear()
        if not grad or chosen.keeps == "weight":
            return
        backward()
    scaled = [called for called, _ in calls if called == "scaled_weight"]
    assert bool(scaled) == (chosen.backward == "materialize")
    convolutions = [args for called, args in calls if called == "convolution_grads"]
    if convolutions and chosen.backward in ("input", "output"):
        assert all(args[2].data_ptr() == v.data_ptr() for args in convolutions)
        scales_x = any(args[1].data_ptr() != x.data_ptr() for args in convolutions)
        assert scales_x == (chosen.backward == "input")


PRODUCTS = ("matmul", "product", "direct")


@pytest.mark.parametrize("name", CASES)
def test_triton(name):
    """The forms of the products that are launched, and whether a kernel writes `W`."""
    pytest.importorskip("triton")
    from wn_kernels.backends.triton.launch import recording

    case = CASES[name]
    with use_backend("triton"), recording() as launches:
        chosen, _, backward = run(case, True)
        forward = [launch._replace() for launch in launches]
        launches.clear()
        backward()
    assert forms_of(forward) in SIGNS[chosen.recorded], (chosen, forms_of(forward))
    signs = BACKWARD_SIGNS[chosen.backward]
    if chosen.keeps == "weight":  # its own gradient is all that is left to our kernels
        signs = [(False, frozenset())]
    elif chosen.keeps == "packed":
        signs = [(False, forms) for _, forms in signs]
    assert forms_of(launches) in signs, (chosen, forms_of(launches))


# What a kernel computes of a layer. Those of a weight alone are not among them.
OF_KERNEL = {
    "one_pass": "one_pass",
    "scale": "scale",
    "grad_one_pass": "grad one_pass",
    "grads": "grads",
    "conv": "packed",
    "conv_grad": "weight_grad",
    "direct_grad": "weight_grad",
}


def forms_of(launches):
    """Whether `W` is written, and what the kernels of a product compute."""
    names = {launch.kernel.__name__.removesuffix("_kernel") for launch in launches}
    direct = (launch for launch in launches if launch.kernel.__name__ == "direct_kernel")
    forms = {OF_KERNEL[name] for name in names & OF_KERNEL.keys()}
    return "weight" in names, frozenset(forms | {launch.arguments["FORM"] for launch in direct})


SIGNS = {
    "one_pass": [(False, frozenset({"one_pass"}))],
    "scaled": [(False, frozenset({"scale"}))],
    "packed": [(True, frozenset({"packed"}))],
    "materialize": [(True, frozenset())],
}
BACKWARD_SIGNS = {
    # `dX` takes `W` where its product must not be scaled late.
    "one_pass": [
        (False, frozenset({"scale", "grad one_pass"})),
        (True, frozenset({"grad one_pass"})),
    ],
    "product": [(False, frozenset({"scale", "grads"}))],
    "scaled": SIGNS["scaled"],
    "packed": [(True, frozenset({"packed", "weight_grad"}))],
    "weight_grad": [(True, frozenset({"weight_grad"}))],
    "materialize": SIGNS["materialize"],
}


@pytest.mark.parametrize("name", ["1d, wide", "linear, few rows", "2d, channels last"])
def test_explain_shows_what_runs(name):
    case = CASES[name]
    if isinstance(case, ConvCase):
        kind = getattr(wn_kernels, f"WNConv{case.x.ndim - 2}d")
        layer = kind(case.x.shape[1], case.v.shape[0], case.v.shape[2:])
    else:
        layer = wn_kernels.WNLinear(case.x.shape[-1], case.v.shape[0])
    with prepare.watching() as seen, torch.no_grad():
        layer(case.x)
    chosen = plan.choose(*seen[0])
    text = wn_kernels.explain(layer, case.x.shape)
    if case.x.is_contiguous():
        picked = [line.split()[:2] for line in text.splitlines() if "<- picked" in line]
        assert picked == [["forward", chosen.forward], ["backward", chosen.backward]]
    assert f"{chosen.backend}, constants of" in text

"""What runs is what was planned, on every backend, and what `explain` shows.

The variant that ran is read off what it did: the native library's own marks in a profile, the
operands of PyTorch's products on the ATen path, and the kernels that Triton launches.
"""

from contextlib import contextmanager
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import wn_kernels
from tests.comparison import DIMS, FLOATS, LAYOUTS, Case, ConvCase
from wn_kernels import plan, prepare, tuning, use_backend
from wn_kernels.backends import aten, native
from wn_kernels.call import NORMS

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
    """A random call: of any kind, in any dtypes, along any `dim`, in any layout, of any norm."""
    random = Random(seed)
    case = drawn_case(random, seed)
    norm = random.choice(("l2", *NORMS))
    if norm != "l2":
        case.take(norm)
    return case


def drawn_case(random, seed):
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
    return tuning.Call(case.x.shape, case.v.shape, *dtypes, case.dim, conv, norm=case.norm)


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


class Ran(NamedTuple):
    """What a case did, as one of the readers below reads it off.

    Attributes:
        chosen: its plan.
        others: the other plans of its backend for the call.
        alone: what was read off a forward without gradients.
        forward, backward: the same of a training step.
        kept: `"weight"` where the step saved a tensor as large as `V`, and `"product"` where it
            saved one as large as the output, besides the operands.
    """

    chosen: plan.Plan
    others: list[plan.Plan]
    alone: Any
    forward: Any
    backward: Any
    kept: set[str]


@contextmanager
def saving(operands, n_shape):
    """Collects the sizes of the tensors that are saved for a backward, without the operands and
    the norms."""
    own = {t.untyped_storage().data_ptr() for t in operands}
    sizes = set()

    def pack(t):
        if t.untyped_storage().data_ptr() not in own and t.shape != n_shape:
            sizes.add(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield sizes


def run(case, reader):
    """Runs a case without and with gradients. `reader` is a context whose value says afterwards
    what ran in it."""
    call = described(case)
    inputs = [t if t is None else t.detach() for t in (case.x, case.v, case.g, case.bias)]
    operands = [t for t in inputs if t is not None]
    with prepare.watching() as seen, torch.no_grad(), reader() as alone:
        tuning.run_call(call, inputs)
    ((planned_call, backend),) = set(seen)
    for t in operands:
        t.requires_grad_()
    with reader() as forward, saving(operands, case.g.shape) as sizes:
        y = tuning.run_call(call, inputs)
    with reader() as backward:
        torch.autograd.grad(y, operands, case.dy)
    assert case.v.numel() != y.numel()
    kept = {name for name, t in (("weight", case.v), ("product", y)) if t.numel() in sizes}
    chosen = plan.choose(planned_call, backend)
    others = [other for other in plan.choices(planned_call, backend) if other != chosen]
    return Ran(chosen, others, alone, forward, backward, kept)


def assert_planned(check, case, ran):
    """What ran is what the plan says, and not what another plan of the backend says."""
    check(case, ran, ran.chosen)
    for other in ran.others:
        with pytest.raises(AssertionError):
            check(case, ran, other)


def check_kept(ran, chosen):
    """A packed weight is as large as `V`."""
    assert ran.kept == {"weight" if chosen.keeps == "packed" else chosen.keeps} - {""}


# --- the native library --------------------------------------------------------------------------


@contextmanager
def marks():
    found = set()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        yield found
    found |= {e.name for e in seen.events() if e.name.startswith("wn_kernels::")}


def check_native(case, ran, chosen):
    kind = "linear" if not isinstance(case, ConvCase) else "convolution"
    assert ran.alone == {f"wn_kernels::{kind}, {chosen.forward}"}
    assert ran.forward == {f"wn_kernels::{kind}, {chosen.recorded}"}
    assert ran.backward == {f"wn_kernels::{kind}_backward, {chosen.backward}"}
    check_kept(ran, chosen)


@pytest.mark.parametrize("name", CASES)
def test_native(name):
    native.build()
    ran = run(CASES[name], marks)
    if ran.chosen.backend == "native":
        assert_planned(check_native, CASES[name], ran)
    else:
        assert not ran.alone | ran.forward | ran.backward


def test_native_serves_some_of_each():
    """The test above compares something."""
    native.build()
    served = {n for n, case in CASES.items() if run(case, marks).chosen.backend == "native"}
    assert len(served) >= 10


# --- the ATen path -------------------------------------------------------------------------------

PRODUCTS = {"torch.mm", "torch.convolution", "convolution_grads"}
FORMS = {"scaled_weight", "torch._weight_norm_interface", "weight_norm"}


def check_aten(case, ran, chosen):
    for calls, variant in ((ran.alone, chosen.forward), (ran.forward, chosen.recorded)):
        assert any(name in FORMS for name, _ in calls) == (variant == "materialize")
        for name, args in calls:
            if name == "torch.convolution":
                takes_x, takes_v = (
                    t.data_ptr() == args[i].data_ptr() for i, t in enumerate((case.x, case.v))
                )
                assert takes_v == (variant in LATE)
                assert takes_x == (variant != "input")
    names = {name for name, _ in ran.backward}
    assert bool(names & PRODUCTS) == (chosen.keeps != "weight")  # else they are PyTorch's nodes
    forms_again = chosen.backward == "materialize" and chosen.keeps != "weight"
    assert ("scaled_weight" in names) == forms_again
    if chosen.backward in ("input", "output"):
        grads = [args for name, args in ran.backward if name == "convolution_grads"]
        assert all(args[2].data_ptr() == case.v.data_ptr() for args in grads)
        scales_x = any(args[1].data_ptr() != case.x.data_ptr() for args in grads)
        assert scales_x == (chosen.backward == "input")
    check_kept(ran, chosen)


@pytest.mark.parametrize("name", CASES)
def test_aten(name, monkeypatch):
    with use_backend("aten"):
        ran = run(CASES[name], lambda: spied(monkeypatch, *PRODUCTS, *FORMS))
    assert_planned(check_aten, CASES[name], ran)


# --- the Triton path -----------------------------------------------------------------------------


def check_triton(case, ran, chosen):
    """The forms of the products that are launched, and whether a kernel writes `W`."""
    assert forms_of(ran.alone) in SIGNS[chosen.forward]
    assert forms_of(ran.forward) in SIGNS[chosen.recorded]
    signs = BACKWARD_SIGNS[chosen.backward]
    if chosen.keeps == "weight":  # its own gradient is all that is left to our kernels
        signs = [(False, frozenset())]
    elif chosen.keeps == "packed":
        signs = [(False, forms) for _, forms in signs]
    assert forms_of(ran.backward) in signs
    check_kept(ran, chosen)


@pytest.mark.parametrize("name", CASES)
def test_triton(name):
    pytest.importorskip("triton")
    from wn_kernels.backends.triton.launch import recording

    with use_backend("triton"):
        ran = run(CASES[name], recording)
    assert_planned(check_triton, CASES[name], ran)


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

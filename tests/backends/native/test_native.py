"""The native library: what it serves and what it leaves alone, numbers out of the ordinary, and its
nodes of the graph."""

import functools
from contextlib import nullcontext

import pytest
import torch

import wn_kernels.functional as WF
from tests.backends.native.served import NARROW, convolution_plan, linear
from tests.comparison import Case, assert_matches, assert_same_bits, assert_zero
from tests.planning import planned
from tests.test_convolution import KINDS, case_of
from wn_kernels import WNConv2d, WNLinear, plan, prepare, use_backend
from wn_kernels.backends import reference
from wn_kernels.call import scale_dtype

pytestmark = pytest.mark.usefixtures("forced")


@pytest.mark.parametrize("dtypes", NARROW)
@pytest.mark.parametrize("kind", ["linear", "one row", "1d", "grouped", "2d", "3d", "up"])
@pytest.mark.parametrize("variant", ["", "materialize", "widen"])
def test_second_derivatives_in_half_precision(kind, dtypes, variant):
    """Those of a loss of the values and of all their gradients, beside the definition's in float64,
    by the planned variant and by the others."""

    def second(layer, leaves, dy):
        y = layer(*leaves)
        grads = torch.autograd.grad(y, leaves, dy, create_graph=True)
        wide = scale_dtype(leaves[1])
        loss = sum(t.to(wide).square().mean() for t in (y, *grads) if t.requires_grad)
        return torch.autograd.grad(loss, leaves[:3])

    if kind in ("linear", "one row"):
        case = Case(1 if kind == "one row" else 9, 48, 40, 0, *dtypes)
        plans = planned(variant, variant)
        definition = functools.partial(reference.linear, dim=0, eps=0.0)
    else:
        case = case_of(KINDS, kind, 0, *dtypes)
        plans = planned(*convolution_plan(case, variant, variant))
        definition = functools.partial(reference.convolution, conv=case.geometry(), dim=0, eps=0.0)
    with plans if variant else nullcontext():
        found = second(
            linear(case) if isinstance(case, Case) else case.layer, case.leaves(), case.dy
        )
    wide = [t.detach().double().requires_grad_() for t in case.leaves()]
    right = second(definition, wide, case.dy.double())
    for name, grad, expected in zip("xvg", found, right, strict=True):
        assert grad.dtype == getattr(case, name).dtype
        assert_matches(grad, expected, dtypes[0], case.length, roundings=4, what=name)


# --- numbers out of the ordinary -----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 20, 18), (9, 20, 18), (4, 512, 300)])
def test_dead_slice(shape):
    case = Case(*shape, 0)
    case.v[3].zero_()
    leaves = case.leaves()
    y = WF.wn_linear(*leaves)
    assert torch.isfinite(y).all()
    assert_same_bits(y[:, 3], case.bias[3].expand(shape[0]))
    grads = torch.autograd.grad(y, leaves, case.dy)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert_zero(grads[1][3])
    assert_zero(grads[2][3])


@pytest.mark.parametrize("factor", [1e-25, 1e-12, 1e12, 1e25, float("nan")])
@pytest.mark.parametrize("m", [1, 6])
def test_norms_out_of_range_are_left_alone(factor, m):
    """Squares that leave float32, and those near it: by the definition in float64."""
    case = Case(m, 30, 20, 0)
    case.v[3] *= factor
    with pytest.raises(RuntimeError, match="forced but cannot serve this call: the native library"):
        WF.wn_linear(case.x, case.v, case.g)
    with pytest.raises(RuntimeError, match="forced but cannot serve"):
        WF.weight_norm(case.v, case.g)
    with use_backend("auto"):
        y = WF.wn_linear(case.x, case.v, case.g)
    right = reference.linear(case.x.double(), case.v.double(), case.g.double(), None, 0, 0.0)
    if factor == factor:
        assert_matches(y, right, torch.float32, 30)
    else:
        assert torch.isnan(y[:, 3]).all()


# --- what it serves ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 1, "g": torch.ones(1, 6)},
        {"dim": None, "g": torch.tensor(1.0)},
        {"input": torch.randn(2, 6, dtype=torch.float64)},
        {"bias": torch.randn(4).double()},
        {"v": torch.randn(6, 4).t()},
        {"input": torch.empty(0, 6)},
        {"g": torch.ones(4, 1).bfloat16()},
    ],
)
def test_other_calls_are_left_alone(change):
    arguments = {"input": torch.randn(2, 6), "v": torch.randn(4, 6), "g": torch.ones(4, 1)}
    with pytest.raises(RuntimeError, match="'native' was forced but cannot serve"):
        WF.wn_linear(**(arguments | change))
    with use_backend("auto"):
        assert WF.wn_linear(**(arguments | change)).shape[-1] == 4


def test_wrong_calls_get_the_usual_errors():
    x, v, g = torch.randn(2, 6), torch.randn(4, 6), torch.ones(4, 1)
    with pytest.raises(ValueError, match=r"input of shape \(2, 5\) does not fit"):
        WF.wn_linear(x[:, :5], v, g)
    with pytest.raises(TypeError, match="groups must be an int"):
        WF.wn_conv1d(x[None], v[..., None], g[..., None], groups=1.0)
    for function in (WF.weight_norm, lambda v, g: WF.wn_conv1d(x[None], v, g)):
        with pytest.raises(ValueError, match=r"dim=0 is out of range|v must be 3-d"):
            function(torch.tensor(2.0), torch.ones(1))
    with use_backend("auto"), pytest.raises(TypeError, match=r"v must be a torch\.Tensor"):
        WF.wn_linear(x, [1.0], g)


def test_what_sees_through_a_call_does():
    """Transforms, forward-mode AD, autocast and modes meet operators that they know."""
    case = Case(3, 6, 4, 0)
    inputs = (case.x, case.v, case.g, case.bias)
    with use_backend("auto"):
        _, tangent = torch.func.jvp(lambda x: WF.wn_linear(x, *inputs[1:]), inputs[:1], inputs[:1])
        assert_matches(tangent + case.bias, case.y, torch.float32, 6)
        case.check_forward(torch.vmap(WF.wn_linear, (0, None, None, None))(*inputs))
        with torch.autocast("cpu", torch.bfloat16):
            assert WF.wn_linear(*inputs).dtype == torch.bfloat16

        class Mode(torch.utils._python_dispatch.TorchDispatchMode):
            seen = 0

            def __torch_dispatch__(self, function, types, arguments=(), options=None):
                self.seen += 1
                return function(*arguments, **(options or {}))

        with Mode() as mode:
            WF.wn_linear(*inputs)
        assert mode.seen


def test_a_subclass_is_left_alone():
    class Own(torch.Tensor):
        pass

    x = torch.randn(2, 6).as_subclass(Own)
    with use_backend("auto"):
        assert isinstance(WNLinear(6, 4)(x), Own)


# --- as a node of the graph ----------------------------------------------------------------------


def test_saved_memory():
    """What the plain layer saves, the norms, and the product where it is small; no weight."""
    for layer, x in [
        (WNLinear(512, 300), torch.randn(4, 512, requires_grad=True)),
        (WNLinear(64, 64), torch.randn(32, 64, requires_grad=True)),
    ]:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            layer(x)
        owned = {t.data_ptr() for t in (x, *layer.parameters())}
        extra = sum(t.numel() for t in saved if t.data_ptr() not in owned)
        assert saved
        assert extra <= layer.weight_g.numel() + x.shape[0] * layer.out_features


def test_a_weight_that_passes_leaves_no_trace():
    """Weights of several layers take the same memory in turn. A graph holds none of them."""
    layers = [Case(40, 64, 64, 0, torch.float32) for _ in range(3)]
    leaves = [case.leaves() for case in layers]
    x = leaves[0][0]
    exact = [[t.detach().double().requires_grad_() for t in case] for case in leaves]

    def grads(inputs, layer):
        x = y = inputs[0][0]
        for _, v, g, bias in inputs:
            y = torch.tanh(layer(y, v, g, bias))
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        parameters = [t for case in inputs for t in case[1:3]]
        return torch.autograd.grad((y.square() + slope.square().sum()).sum(), parameters)

    found = grads(leaves, WF.wn_linear)
    expected = grads(exact, lambda *t: reference.layer(*t, None, 0, 0.0))
    for grad, right in zip(found, expected, strict=True):
        assert_matches(grad, right, torch.float32, 64 * x.numel(), roundings=20)


def test_an_activation_in_place_and_a_checkpoint():
    layer, x = WNConv2d(3, 4, 3), torch.randn(2, 3, 8, 8, requires_grad=True)
    plain = torch.autograd.grad(layer(x).relu().sum(), layer.weight_v)[0]
    again = torch.utils.checkpoint.checkpoint(
        lambda x: torch.relu_(layer(x)), x, use_reentrant=False
    )
    assert_same_bits(torch.autograd.grad(again.sum(), layer.weight_v)[0], plain)


def test_a_changed_weight_is_noticed():
    layer = WNLinear(6, 4)
    y = layer(torch.randn(2, 6))
    with torch.no_grad():
        layer.weight_v.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- planning ------------------------------------------------------------------------------------


def test_a_call_is_planned_once(monkeypatch):
    prepare.forget()
    seen = []
    choose = plan.choose
    monkeypatch.setattr(plan, "choose", lambda *call: seen.append(call) or choose(*call))
    layer = WNConv2d(3, 4, 3)
    for _ in range(3):
        layer(torch.randn(2, 3, 8, 8))
    assert [backend for _, backend in seen] == ["native"]
    layer(torch.randn(2, 3, 8, 9))
    assert len(seen) == 2
    prepare.forget()
    layer(torch.randn(2, 3, 8, 9))
    assert len(seen) == 3

"""Derivatives: first and second, what is saved, and in-place use of the output."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import wn_kernels.functional as WF
from tests.comparison import DIMS, Case, assert_matches, assert_same_bits
from wn_kernels import WNLinear, use_backend
from wn_kernels.backends import reference


def leaves(case):
    return [t.detach().requires_grad_() for t in (case.x, case.v, case.g, case.bias)]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("eps", [0.0, 2.0])
def test_gradcheck_linear(dim, eps):
    case = Case(4, 6, 5, dim, torch.float64)
    function = lambda *inputs: WF.wn_linear(*inputs, dim=dim, eps=eps)  # noqa: E731
    assert gradcheck(function, leaves(case))
    assert gradgradcheck(function, leaves(case))


@pytest.mark.parametrize("backend", ["auto", "aten"])
@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_gradcheck_of_other_norms(norm, backend):
    """No two magnitudes are so close that a step of the check makes another one the largest."""
    for dim in (0, 1, None):
        case = Case(3, 5, 4, dim, torch.float64)
        case.v.copy_((torch.randperm(20).view(4, 5) + 1) * case.v.sign() / 8)
        for eps in (0.0, {"l1": 6.0, "linf": 2.2}[norm]):
            options = {"dim": dim, "eps": eps, "norm": norm}
            function = lambda *inputs: WF.wn_linear(*inputs, **options)  # noqa: B023, E731
            weight = lambda v, g: WF.weight_norm(v, g, **options)  # noqa: B023, E731
            with use_backend(backend):
                assert gradcheck(function, leaves(case))
                assert gradgradcheck(function, leaves(case))
                assert gradgradcheck(weight, leaves(case)[1:3])


@pytest.mark.parametrize(("shape", "dim"), [((4, 5), 0), ((4, 5), 1), ((4, 5, 3), 1), ((6,), None)])
def test_gradcheck_weight_norm(shape, dim):
    v = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    g = WF.slice_norm(v.detach(), dim=dim).requires_grad_()
    function = lambda v, g: WF.weight_norm(v, g, dim=dim)  # noqa: E731
    assert gradcheck(function, (v, g))
    assert gradgradcheck(function, (v, g))


@pytest.mark.parametrize("dim", DIMS)
def test_gradgradcheck_of_dead_slices(dim):
    """Second derivatives stay finite where a slice has norm zero."""
    case = Case(4, 6, 5, dim, torch.float64)
    (case.v if dim is None else case.v.select(dim, 2)).zero_()
    inputs = leaves(case)
    y = WF.wn_linear(*inputs, dim=dim)
    first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
    total = sum(grad.square().sum() for grad in first)
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(total, inputs))


def test_second_derivative_where_an_input_depends_on_another():
    """The double backward must not run through an input's own history."""
    case = Case(4, 6, 5, 0, torch.float64)
    results = []
    for function in (WF.wn_linear, lambda *inputs: reference.linear(*inputs, 0, 0.0)):
        x, v, g, bias = leaves(case)
        y = function(x * v.sum(), v, g, bias)
        (dv,) = torch.autograd.grad(y.square().sum(), v, create_graph=True)
        results.append(torch.autograd.grad(dv.square().sum(), [x, v, g]))
    for actual, expected in zip(*results, strict=True):
        assert_matches(actual, expected, torch.float64, 1000)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("shape", [(9, 20, 18), (4, 512, 300), (300, 40, 200)])
def test_inplace_activation(shape, dim):
    """The output is not saved: an in-place activation after the layer keeps working."""
    case = Case(*shape, dim)
    inputs = leaves(case)
    torch.relu_(WF.wn_linear(*inputs, dim=dim)).backward(case.dy)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    torch.relu(reference.linear(*wide, dim, 0.0)).backward(case.dy.double())
    for actual, expected in zip(inputs, wide, strict=True):
        terms = 4 * expected.grad.norm().item()
        assert_matches(actual.grad, expected.grad, torch.float32, max(shape), terms=terms)


@pytest.mark.parametrize("backend", ["auto", "aten", "triton"])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("k", [24, 512])
def test_the_bias_may_change_before_the_backward(k, dim, backend):
    """As with the plain layer, no gradient needs its values."""
    case = Case(4, k, k, dim)
    x, v, g, bias = leaves(case)
    with use_backend(backend):
        y = WF.wn_linear(x, v, g, bias, dim=dim)
        with torch.no_grad():
            bias.add_(1)
        (y.square().sum() / 2).backward()
    assert_matches(bias.grad, y.detach().double().sum(0), torch.float32, k)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 32, 128, 700])
@pytest.mark.parametrize("size", [64, 256])
def test_saved_memory(m, size, dtype, dim):
    """No tensor of the weight's size is saved for backward but `v` itself."""
    layer = WNLinear(size, 2 * size, dim=dim, dtype=dtype)
    x = torch.randn(m, size, dtype=dtype)
    owned = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    saved = []
    pack = lambda t: saved.append(t) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    extra = [t for t in saved if t.untyped_storage().data_ptr() not in owned]
    weight = layer.weight_v.untyped_storage().nbytes()
    assert saved
    assert all(t.shape != layer.weight_v.shape for t in extra)
    assert sum(t.untyped_storage().nbytes() for t in extra) <= weight / 8 + 8 * (3 * size)


def test_no_function_without_grad():
    layer = WNLinear(8, 4)
    with torch.no_grad():
        assert layer(torch.randn(2, 8)).grad_fn is None
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    assert layer(torch.randn(2, 8)).grad_fn is None
    assert "Linear" in layer(torch.randn(2, 8, requires_grad=True)).grad_fn.name()


def test_forward_mode_and_transforms():
    case = Case(4, 6, 5, 0, torch.float64)
    tangents = [torch.randn_like(t) for t in (case.x, case.v, case.g, case.bias)]
    inputs = [t.detach() for t in (case.x, case.v, case.g, case.bias)]
    _, jvp = torch.func.jvp(WF.wn_linear, tuple(inputs), tuple(tangents))
    h = 1e-6
    ahead, behind = (
        WF.wn_linear(*(t + sign * h * d for t, d in zip(inputs, tangents, strict=True)))
        for sign in (1, -1)
    )
    # Central differences are good to h², and to the rounding of y divided by h.
    assert_matches(jvp, (ahead - behind) / (2 * h), torch.float32, 1)
    with torch.autograd.forward_ad.dual_level():
        dual = [
            torch.autograd.forward_ad.make_dual(t, d) for t, d in zip(inputs, tangents, strict=True)
        ]
        tangent = torch.autograd.forward_ad.unpack_dual(WF.wn_linear(*dual)).tangent
    assert_matches(tangent, jvp, torch.float64, 6)
    batched = torch.vmap(WF.wn_linear, in_dims=(0, None, None, None))(*inputs)
    case.check_forward(batched)


def test_torchs_own_weight_is_mended_each_time():
    """The hook of torch's node of `W` replaces its result in every backward that is differentiated,
    and in no other, also if `V` is no leaf."""
    case = Case(4, 6, 5, 0, torch.float64)
    x, v, g, bias = leaves(case)
    with use_backend("aten"):
        y = WF.wn_linear(x, 2 * v, g, bias).square().sum()
    expected = second_of_definition(case)
    plain = torch.autograd.grad(y, (v, g), retain_graph=True)
    for _ in range(2):
        recorded = torch.autograd.grad(y, (v, g), create_graph=True)
        total = sum(t.square().sum() for t in recorded)
        second = torch.autograd.grad(total, (v, g), retain_graph=True)
        for grad, again, found, want in zip(plain, recorded, second, expected, strict=True):
            assert_matches(again, grad, torch.float64, case.x.numel())
            assert_matches(found, want, torch.float64, case.x.numel())
    for grad, again in zip(plain, torch.autograd.grad(y, (v, g)), strict=True):
        assert_same_bits(again, grad)


def second_of_definition(case):
    """The derivatives of the squared gradients of the squared outputs, by the definition."""
    x, v, g, bias = leaves(case)
    y = reference.layer(x, 2 * v, g, bias, None, 0, 0.0, "l2").square().sum()
    first = torch.autograd.grad(y, (v, g), create_graph=True)
    return torch.autograd.grad(sum(t.square().sum() for t in first), (v, g))

"""The norms of slices: values and derivatives, with the native library and without it."""

import itertools

import pytest
import torch

import wn_kernels.functional as WF
from tests.comparison import FLOATS, LAYOUTS, assert_matches, assert_zero, strided
from wn_kernels import use_backend
from wn_kernels.backends import native
from wn_kernels.call import NORMS, reduced_dims

SHAPES = [(6, 40), (40, 6), (33, 20), (8, 5, 3), (16, 4, 3, 3), (3, 2, 40)]


@pytest.fixture(autouse=True, params=["native", "aten"])
def _path(request):
    if request.param == "native":
        if reason := native.unavailable():
            pytest.skip(reason)
        yield
    else:
        with use_backend("aten"):
            yield


def expected_norm(v, dim, norm):
    """The norms in float64, from PyTorch's own operations."""
    dims = reduced_dims(v.ndim, dim)
    order = {"l2": 2, "l1": 1, "linf": torch.inf}[norm]
    return torch.linalg.vector_norm(v.double(), order, dims, keepdim=dim is not None)


def dims_of(shape):
    return [None, *range(len(shape))]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype, norm):
    for dim, layout in itertools.product(dims_of(shape), LAYOUTS):
        v = strided(torch.randn(shape).to(dtype), layout).requires_grad_()
        n = WF.slice_norm(v, dim=dim, norm=norm)
        wide = v.detach().double().requires_grad_()
        right = expected_norm(wide, dim, norm)
        assert n.dtype is dtype
        assert n.shape == right.shape
        length = v.numel() // n.numel()
        assert_matches(n.detach(), right.detach(), dtype, length)
        assert_matches(WF.slice_norm(v.detach(), dim=dim, norm=norm), right, dtype, length)
        dn = torch.randn(n.shape).to(dtype)
        (dv,) = torch.autograd.grad(n, v, dn)
        (right_dv,) = torch.autograd.grad(right, wide, dn.double())
        assert dv.dtype is dtype
        assert_matches(dv, right_dv, dtype, length, roundings=6)


@pytest.mark.parametrize("norm", NORMS)
def test_derivatives_of_every_order(norm):
    v = torch.randn(5, 17, dtype=torch.float64, requires_grad=True)
    for dim in (0, 1, None):

        def function(v, dim=dim):
            return WF.slice_norm(v, dim=dim, norm=norm)

        assert torch.autograd.gradcheck(function, v, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, v)
    jacobian = torch.func.jacrev(lambda v: WF.slice_norm(v, norm=norm))(v.detach())
    right = torch.func.jacrev(lambda v: expected_norm(v, 0, norm))(v.detach())
    assert_matches(jacobian, right, torch.float64, 17)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_slices_of_zeros(dim, norm):
    v = torch.randn(24, 32)
    v[3] = 0
    v[:, 5] = 0
    if dim is None:
        v.zero_()
    v.requires_grad_()
    n = WF.slice_norm(v, dim=dim, norm=norm)
    right = expected_norm(v, dim, norm).detach()
    assert_zero(n.detach()[right == 0])
    if dim is not None:
        assert_matches(n.detach(), right, torch.float32, 32)
    n.sum().backward()
    assert v.grad.isfinite().all()
    assert_zero(v.grad[(v == 0) & (right == 0).expand_as(v)])


@pytest.mark.parametrize(("size", "dn"), [(1e30, 1e-12), (1e-30, 1e12), (1e-40, 1.0), (1e38, 1.0)])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_squares_that_float32_cannot_hold(dim, size, dn):
    """The gradient is right as well where `dn / n` leaves the range of float32."""
    v = (torch.rand(20, 32) / 16 + 0.5) * size
    n = WF.slice_norm(v, dim=dim)
    right = expected_norm(v, dim, "l2")
    if right.max() > torch.finfo(torch.float32).max:
        assert n.isinf()
        return
    if size > 1e-38:  # below, a norm has few digits
        assert_matches(n, right, torch.float32, 32)
    v.requires_grad_()
    wide = v.detach().double().requires_grad_()
    (dv,) = torch.autograd.grad(dn * WF.slice_norm(v, dim=dim).sum(), v)
    (right_dv,) = torch.autograd.grad(dn * expected_norm(wide, dim, "l2").sum(), wide)
    assert_matches(dv, right_dv, torch.float32, 32, roundings=6)


def test_not_a_number_stays():
    v = torch.randn(8, 32)
    v[2, 3] = torch.nan
    n = WF.slice_norm(v).flatten()
    assert n.isnan().tolist() == [i == 2 for i in range(8)]


def test_a_large_weight_is_not_copied_in_float64():
    """The copy would take ten to a hundred times as long as the norms."""
    v = torch.randn(512, 1024)
    with torch.profiler.profile(profile_memory=True) as seen:
        for dim, norm in itertools.product((0, 1, None), NORMS):
            WF.slice_norm(v, dim=dim, norm=norm)
    largest = max((event.self_cpu_memory_usage for event in seen.events()), default=0)
    assert largest <= v.numel() * v.element_size()


def test_the_result_is_not_shared():
    v = torch.randn(16, 32, requires_grad=True)
    n = WF.slice_norm(v)
    (right,) = torch.autograd.grad(n.sum(), v, retain_graph=True)
    n.detach().zero_()
    (dv,) = torch.autograd.grad(n.sum(), v)
    assert_matches(dv, right.double(), torch.float32, 32)

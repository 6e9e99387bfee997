"""Weights of the native library, formed and differentiated."""

import functools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import wn_kernels.functional as WF
from tests.backends.native.served import HALF, WIDE
from tests.comparison import assert_matches, assert_same_bits, assert_zero
from wn_kernels.backends import reference
from wn_kernels.call import kept_shape

pytestmark = pytest.mark.usefixtures("forced")


@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        *[(shape, 0) for shape in [(9,), (6, 5), (6, 5, 4), (3, 4, 5, 2), (3, 9000)]],
        *[((6, 5, 4), -3), ((16, 16), 1), ((300, 40), 1), ((7, 30, 17), 2), ((16, 2, 16), -3)],
        # Short rows that make longer ones, and more blocks of rows than chunks.
        *[((96, 4, 5), 2), ((5001, 513), 1)],
        # Neither rows nor columns: a few columns of each slice, or all of one.
        *[((70, 5, 4), 1), ((7, 30, 17), 1), ((3, 4, 16, 3), -2), ((5, 9, 1, 2), 1)],
        *[(shape, None) for shape in [(20,), (130, 7), (3, 2, 70, 9), (1, 16)]],
    ],
)
@pytest.mark.parametrize("dtype", [*WIDE, *HALF])
@pytest.mark.parametrize("flat", [False, True])
def test_weight_norm(shape, dim, dtype, flat):
    axis = None if dim is None else dim % len(shape)
    if flat and axis != 0:
        return
    v = torch.randn(shape, dtype=dtype).requires_grad_()
    kept = kept_shape(shape, axis)
    g = torch.rand(kept, dtype=dtype) + 0.5
    g = (g.flatten() if flat else g).requires_grad_()
    dw = torch.randn(shape, dtype=dtype)
    w = WF.weight_norm(v, g, dim=dim)
    wide = [t.detach().double().requires_grad_() for t in (v, g)]
    expected = reference.weight_norm(wide[0], wide[1].view(kept), axis, 0.0)
    assert_matches(w, expected, dtype, v.numel())
    dv, dg = torch.autograd.grad(w, (v, g), dw)
    right_dv, right_dg = torch.autograd.grad(expected, wide, dw.double())
    terms = dw.double().norm().item()
    assert_matches(dg, right_dg, dtype, v.numel(), terms=terms)
    if len(shape) > 1:
        scale = reference.slice_scale(wide[0], wide[1].view(kept), axis, 0.0)
        size = (scale * dw.double()).norm().item()
        assert_matches(dv, right_dv, dtype, v.numel(), roundings=3, scale=size)


def test_long_columns_keep_their_digits():
    """Blocks of rows are summed in float32, and their sums in float64: all of these squares in
    float32 would be off by a hundred roundings."""
    v = torch.rand(1 << 18, 16) + 0.5
    exact = v.double() / v.double().norm(dim=0, keepdim=True)
    w = WF.weight_norm(v, torch.ones(1, 16), dim=1)
    # The sum's rounding, a norm's, a quotient's and a product's.
    assert ((w.double() - exact).abs() / exact).max() < 2 * torch.finfo(v.dtype).eps


def test_weight_norm_keeps_the_layout():
    v = torch.randn(6, 5, 3, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    w = WF.weight_norm(v, torch.ones(6, 1, 1, 1))
    assert w.stride() == v.stride()
    # A gradient that lies otherwise, and that somebody else may hold.
    dw = torch.randn(w.shape)
    before = dw.clone()
    (dv,) = torch.autograd.grad(w, v, dw)
    assert dv.stride() == v.stride()
    assert_same_bits(dw, before)
    wide = v.detach().double().requires_grad_()
    right = torch.autograd.grad(
        reference.weight_norm(wide, torch.ones(6, 1, 1, 1).double(), 0, 0.0), wide, dw.double()
    )[0]
    assert_matches(dv, right, torch.float32, 60, roundings=3, scale=dw.norm().item())


def test_derivatives_of_weight_norm():
    v = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    for g in (torch.rand(3, 1, 1, dtype=torch.float64), torch.rand(3, dtype=torch.float64)):
        g.requires_grad_()
        assert gradcheck(WF.weight_norm, (v, g))
        assert gradgradcheck(WF.weight_norm, (v, g))
    for shape, dim in (((3, 16), 1), ((3, 4, 4), 1), ((3, 4, 4), None)):
        v = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        g = torch.rand(kept_shape(shape, dim), dtype=torch.float64, requires_grad=True)
        of_dim = functools.partial(WF.weight_norm, dim=dim)
        assert gradcheck(of_dim, (v, g))
        assert gradgradcheck(of_dim, (v, g))


@pytest.mark.parametrize(
    ("shape", "dim"), [((6, 40), 0), ((9, 6, 4), 1), ((8, 20), 1), ((5, 8), None)]
)
def test_dead_slice_of_a_weight(shape, dim):
    """A slice of zeros has a weight and gradients of zeros. Float64 serves a slice that is tiny."""
    v = torch.randn(shape)
    dead = v if dim is None else v.select(dim, 3)
    g = torch.rand(kept_shape(shape, dim)) + 0.5
    dead.zero_()
    v.requires_grad_()
    g.requires_grad_()
    w = WF.weight_norm(v, g, dim=dim)
    grads = torch.autograd.grad(w, (v, g), torch.randn(shape))
    assert all(torch.isfinite(t).all() for t in (w, *grads))
    for t in (w, *grads) if dim is None else (t.select(dim, 3) for t in (w, *grads)):
        assert_zero(t)
    if dim is not None:
        assert all(t.count_nonzero() == t.numel() * (1 - 1 / shape[dim]) for t in (w, *grads))
    dead.data[-1] = 1e-30
    with pytest.raises(RuntimeError, match="forced but cannot serve"):
        WF.weight_norm(v, g, dim=dim)

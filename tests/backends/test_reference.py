"""The closed formulas of the weight's derivatives, against what autograd derives."""

import pytest
import torch

from tests.comparison import assert_matches, assert_zero
from wn_kernels.backends import reference
from wn_kernels.call import kept_shape

SHAPES = [((4, 5), 0), ((4, 5), 1), ((4, 5), None), ((3, 4, 5), 1), ((6,), None), ((6,), 0)]


def weight(shape, dim, dead=False):
    v = torch.randn(shape, dtype=torch.float64)
    if dead:
        (v if dim is None else v.select(dim, 2)).zero_()
    g = torch.rand(kept_shape(shape, dim), dtype=torch.float64) + 0.5
    return v.requires_grad_(), g.requires_grad_()


def grads_by_formula(dw, v, g, dim, eps):
    return reference.weight_grads(dw, v, g, reference.norms(v, dim, eps), dim, eps)


def grads_by_autograd(dw, v, g, dim, eps):
    w = reference.weight_norm(v, g, dim, eps)
    return torch.autograd.grad(w, (v, g), dw, create_graph=True)


def total(grads):
    """A sum whose derivatives with respect to each of the gradients differ."""
    return sum((grad.cos() * (i + 1)).sum() for i, grad in enumerate(grads))


# eps clamps no norm, some of them, and all.
@pytest.mark.parametrize("eps", [0.0, 2.0, 100.0])
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_three_orders(shape, dim, eps):
    v, g = weight(shape, dim)
    dw = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    leaves = (dw, v, g)
    first = grads_by_formula(*leaves, dim, eps)
    right_first = grads_by_autograd(*leaves, dim, eps)
    ddv, ddg = (torch.randn_like(t, requires_grad=True) for t in first)
    second = reference.weight_grads_backward(ddv, ddg, *leaves, None, dim, eps)
    right_second = torch.autograd.grad(right_first, leaves, (ddv, ddg), create_graph=True)
    third = torch.autograd.grad(total(second), (ddv, ddg, *leaves), allow_unused=True)
    right_third = torch.autograd.grad(total(right_second), (ddv, ddg, *leaves), allow_unused=True)
    with torch.no_grad():
        n = reference.norms(v, dim, eps)
        kept = reference.weight_grads_backward(ddv, ddg, *leaves, n, dim, eps)
    derived = torch.autograd.grad(first, leaves, (ddv, ddg), materialize_grads=True)
    pairs = [*zip((*first, *second), (*right_first, *right_second), strict=True)]
    pairs += [
        *zip((*third, *derived, *kept), (*right_third, *right_second, *right_second), strict=True)
    ]
    terms = max(right.norm().item() for _, right in pairs if right is not None)
    for found, right in pairs:
        if right is None or right.norm() < 1e-9 * terms:  # a direction of one element, or clamped
            assert found is None or found.norm() < 1e-9 * terms
        else:
            assert_matches(found, right, torch.float64, 100, scale=terms)


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_dead_slices(shape, dim):
    """All of their derivatives are zero."""
    v, g = weight(shape, dim, dead=True)
    dw = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    first = grads_by_formula(dw, v, g, dim, 0.0)
    ddv, ddg = (torch.randn_like(t) for t in first)
    second = reference.weight_grads_backward(ddv, ddg, dw, v, g, None, dim, 0.0)
    third = torch.autograd.grad(total(second), (dw, v, g))
    for t in (*first, *second, *third):
        assert torch.isfinite(t).all()
        assert_zero(t if dim is None else t.select(dim, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    """Each result has the dtype of what it is the gradient of; sums are taken in float32."""
    v, g = (t.detach().to(dtype) for t in weight((4, 300), 0))
    dw, ddv = torch.randn(4, 300), torch.randn(4, 300, dtype=dtype)
    ddg = torch.randn(4, 1, dtype=dtype)
    n = reference.norms(v, 0, 0.0)
    assert n.dtype == torch.float32
    found = reference.weight_grads_backward(ddv, ddg, dw, v, g, n, 0, 0.0)
    wide = [t.double() for t in (ddv, ddg, dw, v, g)]
    right = reference.weight_grads_backward(*wide, None, 0, 0.0)
    for t, wanted, like in zip(found, right, (dw, v, g), strict=True):
        assert t.dtype == like.dtype
        assert_matches(t, wanted, dtype, 300)

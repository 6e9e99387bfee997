"""The closed formulas of the weight's derivatives, against what autograd derives."""

import pytest
import torch

from tests.comparison import assert_matches, assert_zero
from wn_kernels.backends import reference
from wn_kernels.call import NORMS, kept_shape

SHAPES = [((4, 5), 0), ((4, 5), 1), ((4, 5), None), ((3, 4, 5), 1), ((6,), None), ((6,), 0)]


def weight(shape, dim, dead=False, ties=False):
    v = torch.randn(shape, dtype=torch.float64)
    if ties:  # and zeros
        v = v.mul_(1.5).round_()
    if dead:
        (v if dim is None else v.select(dim, 2)).zero_()
    g = torch.rand(kept_shape(shape, dim), dtype=torch.float64) + 0.5
    return v.requires_grad_(), g.requires_grad_()


def grads_by_formula(dw, v, g, *options):
    return reference.weight_grads(dw, v, g, reference.norms(v, *options), *options)


def grads_by_autograd(dw, v, g, *options):
    w = reference.weight_norm(v, g, *options)
    return torch.autograd.grad(w, (v, g), dw, create_graph=True)


def total(grads):
    """A sum whose derivatives with respect to each of the gradients differ."""
    return sum((grad.cos() * (i + 1)).sum() for i, grad in enumerate(grads))


# eps clamps no norm, some of them, and all.
@pytest.mark.parametrize("eps", [0.0, 2.0, 100.0])
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("norm", NORMS)
def test_three_orders(shape, dim, eps, norm):
    options = dim, eps, norm
    v, g = weight(shape, dim, ties=norm != "l2")
    dw = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    leaves = (dw, v, g)
    first = grads_by_formula(*leaves, *options)
    right_first = grads_by_autograd(*leaves, *options)
    ddv, ddg = (torch.randn_like(t, requires_grad=True) for t in first)
    second = reference.weight_grads_backward(ddv, ddg, *leaves, None, *options)
    right_second = torch.autograd.grad(right_first, leaves, (ddv, ddg), create_graph=True)
    third = torch.autograd.grad(total(second), (ddv, ddg, *leaves), allow_unused=True)
    right_third = torch.autograd.grad(total(right_second), (ddv, ddg, *leaves), allow_unused=True)
    with torch.no_grad():
        n = reference.norms(v, *options)
        kept = reference.weight_grads_backward(ddv, ddg, *leaves, n, *options)
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
@pytest.mark.parametrize("norm", NORMS)
def test_dead_slices(shape, dim, norm):
    """All of their derivatives are zero."""
    v, g = weight(shape, dim, dead=True)
    dw = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    first = grads_by_formula(dw, v, g, dim, 0.0, norm)
    ddv, ddg = (torch.randn_like(t) for t in first)
    second = reference.weight_grads_backward(ddv, ddg, dw, v, g, None, dim, 0.0, norm)
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


@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_other_norms_are_pytorchs(norm):
    """The values and the subgradients, at zero and of ties, are those of `vector_norm`."""
    order = {"l1": 1, "linf": float("inf")}[norm]
    for shape, dim in SHAPES[:4]:
        v, g = weight(shape, dim, ties=True)
        v.data[(0,) * v.ndim] = 0.0
        dims = [i for i in range(v.ndim) if i != dim]
        right = v * (g / torch.linalg.vector_norm(v, order, dims, keepdim=dim is not None))
        dw = torch.randn(shape, dtype=torch.float64)
        found = reference.weight_norm(v, g, dim, 0.0, norm)
        assert_matches(found, right, torch.float64, 20)
        for pair in zip(*(torch.autograd.grad(w, (v, g), dw) for w in (found, right)), strict=True):
            assert_matches(*pair, torch.float64, 20)

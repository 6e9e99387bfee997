"""`functional.weight_norms`: the weights of many layers in one call, on every backend."""

import pytest
import torch

import wn_kernels
import wn_kernels.functional as WF
from tests.comparison import assert_matches, strided
from wn_kernels.backends import native, reference
from wn_kernels.call import kept_shape

# Shape, dim, eps, the dtypes of V and of W, and the memory layout.
MEMBERS = [
    ((6, 5, 3), 0, 0.0, torch.float32, None, "contiguous"),
    ((40, 70), 0, 0.0, torch.float32, torch.bfloat16, "contiguous"),
    ((4, 6, 5), 1, 0.0, torch.float32, None, "transposed"),
    ((5, 4, 16), 2, 0.0, torch.float32, torch.float16, "contiguous"),
    ((7, 3, 2, 2), None, 0.0, torch.float32, None, "contiguous"),
    ((3, 8, 4), 0, 5.0, torch.float32, None, "contiguous"),
    ((9,), 0, 0.0, torch.float32, None, "contiguous"),
    ((5, 2, 2, 3), 0, 0.0, torch.float32, None, "channels-last"),
    ((5, 6, 7), 1, 0.0, torch.float32, None, "sliced"),
    ((300, 2), 0, 0.0, torch.float32, None, "contiguous"),
]
ROWS = [member for member in MEMBERS if member[1] == 0 and member[-1] != "sliced"]
HALF = [
    ((6, 5, 3), 0, 0.0, torch.bfloat16, None, "contiguous"),
    ((8, 33), 0, 0.0, torch.float16, torch.float32, "contiguous"),
    ((4, 6, 5), 1, 0.0, torch.float64, None, "contiguous"),
]
BACKENDS = ["auto", "aten", "triton", "reference"]


def tensors(members, device="cpu"):
    """`(v, g, dw)`, lists of leaves and of gradients."""
    lists = [], [], []
    for shape, dim, _, dtype, of_w, layout in members:
        v = strided(torch.randn(shape, dtype=torch.float64), layout).to(dtype)
        g = (torch.rand(kept_shape(shape, dim), dtype=torch.float64) + 0.5).to(dtype)
        dw = torch.randn(shape, dtype=torch.float64).to(of_w or dtype)
        for each, t in zip(lists, (v, g, dw), strict=True):
            each.append(t.to(device))
    for t in (*lists[0], *lists[1]):
        t.requires_grad_()
    return lists


def options(members):
    return {
        "dim": [m[1] for m in members],
        "eps": [m[2] for m in members],
        "dtype": [m[4] for m in members],
    }


def check(members, v, g, dw, w, grads):
    for i, (_, dim, eps, dtype, of_w, _) in enumerate(members):
        wide = [t.detach().double().cpu().requires_grad_() for t in (v[i], g[i])]
        expected = reference.weight_norm(*wide, dim, eps)
        expected_grads = torch.autograd.grad(expected, wide, dw[i].double().cpu())
        length = v[i].numel()
        assert w[i].dtype == (of_w or dtype)
        assert w[i].stride() == torch.empty_like(v[i]).stride()
        assert_matches(w[i], expected, w[i].dtype, length, what=f"w {i}")
        dv, dg = grads[i], grads[len(v) + i]
        assert (dv.dtype, dg.dtype) == (dtype, dtype)
        terms = dw[i].double().norm().item()
        if v[i].numel() > g[i].numel() or eps:
            scale = expected.norm().item() / wide[0].norm().item() * terms
            roundings = {"roundings": 3, "scale": 4 * scale}
            assert_matches(dv, expected_grads[0], dtype, length, **roundings, what=f"dv {i}")
        assert_matches(dg, expected_grads[1], dtype, length, terms=terms, what=f"dg {i}")


@pytest.mark.parametrize("members", [MEMBERS, HALF, MEMBERS[:1]], ids=["mixed", "half", "one"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend, members, device):
    v, g, dw = tensors(members, device if backend == "triton" else "cpu")
    with wn_kernels.use_backend(backend):
        w = WF.weight_norms(v, g, **options(members))
    grads = torch.autograd.grad(w, [*v, *g], dw)
    check(members, v, g, dw, w, grads)
    assert len({t.untyped_storage().data_ptr() for t in w}) == len(w)


@pytest.mark.skipif(native.unavailable() is not None, reason="the native library was not built")
def test_the_native_library_serves_rows():
    v, g, dw = tensors(ROWS)
    with wn_kernels.use_backend("native"):
        w = WF.weight_norms(v, g, **options(ROWS))
    assert len({t.grad_fn for t in w}) == 1
    grads = torch.autograd.grad(w, [*v, *g], dw)
    check(ROWS, v, g, dw, w, grads)

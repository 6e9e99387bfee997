"""The kernels of scaled weights and their gradients, for slices along any dimension."""

import pytest
import torch

from tests.comparison import (
    assert_matches,
    assert_same_bits,
    strided,
)
from wn_kernels.backends import reference
from wn_kernels.backends.triton import configs, slice_norms, weight_norm, weight_norm_backward
from wn_kernels.call import kept_shape

SMALL = configs.SliceConfig(4, 8, 4)

SHAPES = [
    ((9,), 0),
    ((13, 37), 0),
    ((13, 37), 1),
    ((13, 37), None),
    ((37,), None),
    ((11, 5, 9), 0),
    ((11, 5, 9), 1),
    ((11, 5, 9), 2),
    ((11, 5, 9), None),
    ((3, 4, 5, 7), 1),
    ((3, 4, 5, 7), 2),
    ((1, 1, 40), 0),
    ((1, 40), 1),
]


def inputs(shape, dim, dtype, device, g_dtype=None):
    v = torch.randn(shape, dtype=torch.float64).to(dtype)
    g = (torch.rand(kept_shape(shape, dim), dtype=torch.float64) + 0.5).to(g_dtype or dtype)
    dw = torch.randn(shape, dtype=torch.float64).to(dtype)
    return v.to(device), g.to(device), dw.to(device)


def check(v, g, dw, dim, *, eps=0.0, config=SMALL, splits=None, dtype=None):
    """Forward and backward against the reference in float64."""
    dtype = dtype or v.dtype
    wide = [t.detach().double().requires_grad_() for t in (v, g)]
    expected = reference.weight_norm(*wide, dim, eps)
    expected_dv, expected_dg = torch.autograd.grad(expected, wide, dw.double())
    w, n = weight_norm(v, g, dim, eps, dtype, config=config, splits=splits)
    dv, dg = weight_norm_backward(dw, v, g, n, dim, eps, config=config, splits=splits)

    length = v.numel()
    assert w.dtype == dtype
    assert dv.dtype == v.dtype
    assert dg.dtype == g.dtype
    assert_matches(w, expected, dtype, length, what="w")
    terms = dw.double().norm().item()
    scale = (reference.slice_scale(*wide, dim, eps) * dw.double()).norm().item()
    if v.numel() == n.numel():  # slices of one element: no direction to learn
        assert dv.double().norm().item() <= 8 * torch.finfo(v.dtype).eps * scale
    else:
        assert_matches(dv, expected_dv, v.dtype, length, roundings=3, scale=scale, what="dv")
    assert_matches(dg, expected_dg, g.dtype, length, terms=terms, what="dg")
    return w, dv


@pytest.mark.sanitize
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_every_dim(shape, dim, splits, device):
    check(*inputs(shape, dim, torch.float32, device), dim, splits=splits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("shape", "dim"), SHAPES[1:9])
def test_dtypes(shape, dim, dtype, device):
    check(*inputs(shape, dim, dtype, device), dim)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_mixed_dtypes(dim, device):
    v, g, dw = inputs((13, 37), dim, torch.float32, device, g_dtype=torch.bfloat16)
    check(v, g, dw.bfloat16(), dim, dtype=torch.bfloat16)
    v, g, dw = inputs((13, 37), dim, torch.bfloat16, device, g_dtype=torch.float32)
    check(v, g, dw.float(), dim, dtype=torch.float32)


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
@pytest.mark.parametrize(("shape", "dim"), SHAPES[1:11])
def test_strides(shape, dim, layout, device):
    v, g, dw = inputs(shape, dim, torch.float32, device)
    v = strided(v, layout)
    w, dv = check(v, g, dw, dim)
    assert w.stride() == torch.empty_like(v).stride()
    assert dv.stride() == torch.empty_like(v).stride()
    check(v, g, strided(dw, "transposed"), dim)


def test_channels_last(device):
    v, g, dw = inputs((6, 5, 3, 4), 0, torch.float32, device)
    v = v.contiguous(memory_format=torch.channels_last)
    for dim in (0, 1, 2, 3, None):
        g = torch.rand(kept_shape(v.shape, dim), device=device) + 0.5
        w, dv = check(v, g, dw, dim)
        assert w.is_contiguous(memory_format=torch.channels_last)
        assert dv.is_contiguous(memory_format=torch.channels_last)


def test_expanded_gradient(device):
    v, g, _ = inputs((11, 5, 9), 1, torch.float32, device)
    check(v, g, torch.ones((), device=device).expand(v.shape), 1)


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("splits", [1, 3])
def test_eps(dim, splits, device):
    v, g, dw = inputs((13, 37), dim, torch.float32, device)
    n = slice_norms(v, dim, 0.0)
    check(v, g, dw, dim, eps=n.median().item() * (1.01 if dim is None else 1), splits=splits)


def test_deterministic(device):
    v, g, dw = inputs((2, 9000), 0, torch.float32, device)
    _, n = weight_norm(v, g, 0, 0.0, v.dtype)
    first, second = (weight_norm_backward(dw, v, g, n, 0, 0.0) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)

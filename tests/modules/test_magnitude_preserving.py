"""Layers with `magnitude_preserving=True` are those of EDM2."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wn_kernels
from tests.comparison import assert_matches, assert_same_bits, assert_zero
from tests.forms import LAYERS, effective
from wn_kernels.convert import fused


def made(kind, **changes):
    cls, arguments, options, dim, shape = LAYERS[kind]
    options = options | changes | {"dim": dim, "magnitude_preserving": True}
    return fused.LAYERS[cls](*arguments, **options, dtype=torch.float64), shape


def normalize(x):
    """EDM2's function of this name with its eps at zero: slices with entries of unit magnitude."""
    dims = list(range(1, x.ndim))
    n = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    return x / (n * (n.numel() / x.numel()) ** 0.5)


@pytest.mark.parametrize("kind", ["linear", "1d", "2d", "3d"])
def test_weight_is_that_of_edm2(kind):
    """Equation (47): `normalize(V) / √fan_in`, of a `V` whose entries are normal."""
    torch.manual_seed(0)
    layer, shape = made(kind)
    v = layer.weight_v.detach()
    fan_in = v[0].numel()
    assert_matches(layer.weight.detach(), normalize(v) / fan_in**0.5, torch.float64, 64)
    assert not layer.weight_g.requires_grad
    assert_zero(layer.bias)
    wn_kernels.renormalize_(layer, "rms")
    assert_matches(layer.weight_v, normalize(v), torch.float64, 64)
    layer(torch.randn(shape, dtype=torch.float64)).sum().backward()
    assert layer.weight_g.grad is None
    assert layer.weight_v.grad.norm() > 0


@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_have_the_variance_of_the_inputs(kind):
    """The variance of an output for white inputs is the sum of the squares of its weights. It is 1
    on average, over outputs and phases that see no border."""
    layer, _ = made(kind, **{} if kind.startswith("linear") else {"padding": 0})
    squares = effective(layer, LAYERS[kind][3]).square()
    if isinstance(layer, nn.Linear):
        variance = squares.sum(1)
    else:
        rank = squares.ndim - 2
        x = torch.ones(1, layer.in_channels, *[9] * rank, dtype=torch.float64)
        name = f"conv{'_transpose' if layer.transposed else ''}{rank}d"
        y = getattr(F, name)(x, squares, None, layer.stride, groups=layer.groups)
        border = 4 if layer.transposed else 0  # a multiple of the stride, and of all its phases
        inner = slice(border, border + 4 if layer.transposed else None)
        variance = y[(..., *[inner] * rank)]
    assert_matches(variance.mean(), torch.ones((), dtype=torch.float64), torch.float64, 256)


def test_lazy_copied_folded_and_converted():
    lazy = wn_kernels.WNLazyConv1d(4, 3, magnitude_preserving=True)
    lazy(torch.randn(2, 6, 9))
    assert_matches(lazy.weight_g, torch.ones(4, 1, 1, dtype=torch.float64), torch.float32, 1)
    assert not lazy.weight_g.requires_grad
    for twin in (copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy))):
        assert "magnitude_preserving=True" in repr(twin)
        twin.reset_parameters()
        assert_same_bits(twin.weight_g, lazy.weight_g)
    x = torch.randn(2, 6, 9)
    y = lazy(x)
    wn_kernels.fold(lazy)
    assert_matches(lazy(x), y.detach().double(), torch.float32, 18)
    assert "magnitude_preserving" not in vars(lazy)
    assert "magnitude_preserving" not in repr(wn_kernels.WNLinear(2, 2))

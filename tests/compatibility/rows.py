"""The rows of the table in docs/compatibility.md, the layers that they try, and the right values.

A row is a function that uses a layer and fails, or is wrong, or passes. `rows_compiled.py`,
`rows_layers.py` and `rows_processes.py` have them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrizations

import wn_kernels
import wn_kernels.parallel
from tests.comparison import assert_matches
from wn_kernels.backends import reference


def _parametrized(layer, dim=0):
    return parametrizations.weight_norm(layer, dim=dim)


def _legacy(layer, dim=0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, dim=dim)


def own_layer(layer, dim=0):
    if isinstance(layer, nn.LazyLinear):
        return wn_kernels.WNLazyLinear(layer.out_features, dim=dim)
    arguments = (layer.in_features, layer.out_features, layer.bias is not None)
    own = wn_kernels.WNLinear(*arguments, dim=dim, device=layer.weight.device)
    if not layer.weight.is_meta:
        own.load_state_dict(layer.state_dict())
    return own


PROVIDERS: dict[str, Callable] = {
    "PyTorch, parametrized": _parametrized,
    "PyTorch, legacy": _legacy,
    "wn_kernels": own_layer,
}

ROWS: dict[str, Callable[[Callable], None]] = {}


def row(title: str) -> Callable:
    """Registers a function of a provider as a row of the table."""

    def register(function: Callable) -> Callable:
        ROWS[title] = function
        return function

    return register


def layer_of(normalise, dim=0):
    torch.manual_seed(0)
    return normalise(nn.Linear(6, 4), dim)


def data():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def parts(layer):
    """`(g, v)`."""
    if hasattr(layer, "weight_v"):
        return layer.weight_g, layer.weight_v
    originals = layer.parametrizations.weight
    return originals.original0, originals.original1


def right_of(layer, x, dim=0):
    """Output and gradients of `(x, g, v, bias)` of the squares' sum, in float64."""
    g, v = parts(layer)
    wide = [t.detach().double().requires_grad_() for t in (x, g, v, layer.bias)]
    y = reference.linear(wide[0], wide[2], wide[1], wide[3], dim, 0.0)
    return y.detach(), torch.autograd.grad(y.square().sum(), wide)


def assert_right(found, wanted, dtype=torch.float32):
    assert_matches(found, wanted, dtype, 256, roundings=8)


def assert_trains(layer, x, call=None):
    """Forward and backward, through `call` where it is not the layer itself."""
    x = x.detach().clone().requires_grad_()
    y, grads = right_of(layer, x)
    out = (layer if call is None else call)(x)
    assert_right(out, y)
    g, v = parts(layer)
    for found, right in zip(
        torch.autograd.grad(out.square().sum(), (x, g, v, layer.bias)), grads, strict=True
    ):
        assert_right(found, right)

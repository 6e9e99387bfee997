"""Layers that PyTorch weight-normalised, in both of its forms, for the tests of conversion."""

import warnings

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from tests.comparison import assert_matches

FORMS = ["weight_norm", "parametrizations"]


def legacy(module, name="weight", dim=0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, name, dim)


NORMALISE = {"weight_norm": legacy, "parametrizations": parametrizations.weight_norm}


class Doubled(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, input):
        return 2 * super().forward(input)


class Twice(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight


def stacked():
    """A weight that another parametrization follows."""
    layer = parametrizations.weight_norm(nn.Linear(4, 4))
    return parametrize.register_parametrization(layer, "weight", Twice())


class Scaled(nn.Module):
    """A layer of no known class."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, input):
        return torch.einsum("oi,...i->...o", self.weight, input) + self.bias


# Layer, input, dim.
LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6), 0),
    "linear, no bias": (lambda: nn.Linear(6, 4, bias=False), (3, 6), 1),
    "whole": (lambda: nn.Linear(6, 4), (3, 6), None),
    "1d": (lambda: nn.Conv1d(6, 4, 3, padding=1, padding_mode="reflect"), (2, 6, 9), 0),
    "taps": (lambda: nn.Conv1d(6, 4, 3, groups=2), (2, 6, 9), 2),
    "2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=2, dilation=(1, 2)), (2, 3, 9, 8), 0),
    "3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 3), 0),
    "up": (lambda: nn.ConvTranspose1d(6, 4, 4, stride=2, padding=1), (2, 6, 5), 0),
    "up 2d": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), (1, 3, 4, 4), 1),
    "its own forward": (lambda: Doubled(6, 4), (3, 6), 0),
    "unknown": (Scaled, (3, 6), 0),
}


def made(kind, form):
    """A layer that PyTorch weight-normalised, with a `g` that is not the norm, and its input."""
    torch.manual_seed(1)
    make, shape, dim = LAYERS[kind]
    layer = NORMALISE[form](make(), dim=dim)
    g = layer.weight_g if form == "weight_norm" else layer.parametrizations.weight.original0
    with torch.no_grad():
        g.mul_(torch.rand_like(g) + 0.5)
    return layer, torch.randn(shape)


def step(layer, x):
    """Output, and the gradients of the input and of every parameter."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y.square().sum() / 2).backward()
    grads = {name: p.grad.detach().clone() for name, p in layer.named_parameters()}
    return y.detach(), {"x": x.grad} | grads


def assert_computes_as(layer, twin, x):
    """Values and gradients against a float64 twin of PyTorch's."""
    y, grads = step(layer, x)
    right, right_grads = step(twin.double(), x.double())
    length = 64
    assert_matches(y, right, torch.float32, length)
    assert grads.keys() == right_grads.keys()
    for name, grad in grads.items():
        terms = right_grads["x"].norm().item() + right.norm().item() ** 2
        assert_matches(grad, right_grads[name], torch.float32, length, terms=terms, what=name)

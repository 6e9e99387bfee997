"""Losses made of gradients, against the definition in float64."""

import copy

import pytest
import torch
from torch import nn

import wn_kernels
from tests.comparison import assert_matches
from tests.compatibility.layers import LAYERS, made


def slope(y, x):
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


def wgan_gp(net, x):
    """Gulrajani et al. 2017, equation (3)."""
    return (slope(net(x), x).flatten(1).norm(dim=1) - 1).square().mean()


def r1(net, x):
    """Mescheder et al. 2018, equation (9)."""
    return slope(net(x).square(), x).square().flatten(1).sum(1).mean() / 2


def eikonal(net, x):
    """Gropp et al. 2020, equation (2), beside the values."""
    y = net(x)
    return y.abs().mean() + 0.1 * (slope(y, x).flatten(1).norm(dim=1) - 1).square().mean()


def weight_penalty(net, x):
    """The size of the gradient with respect to the parameters, through `v` and `g`."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    grads = torch.autograd.grad(net(x).square().mean(), parameters, create_graph=True)
    return sum(grad.square().sum() for grad in grads)


def derivatives(loss, net, x):
    x = x.detach().clone().requires_grad_()
    value = loss(net, x)
    parameters = dict(net.named_parameters())
    grads = torch.autograd.grad(value, parameters.values(), allow_unused=True)
    found = {key: grad for key, grad in zip(parameters, grads, strict=True) if grad is not None}
    return {"loss": value.detach()[None]} | found


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("loss", [wgan_gp, r1, eikonal, weight_penalty])
def test_losses_of_gradients(name, loss):
    layer, x = made(name)
    net = nn.Sequential(layer, nn.Tanh())
    found = derivatives(loss, net, x)
    with wn_kernels.use_backend("reference"):
        right = derivatives(loss, copy.deepcopy(net).double(), x.double())
    assert found.keys() == right.keys()
    terms = max(t.norm().item() for t in right.values())
    for key, t in found.items():
        wanted = right[key]
        if wanted.norm() < 1e-6 * terms:  # cancels: a bias moves no slope of its own layer
            assert t.norm() < 1e-4 * terms
            continue
        scale = min(terms, 4 * wanted.norm().item())
        assert_matches(t, wanted, torch.float32, 512, roundings=8, terms=scale, what=key)


@pytest.mark.parametrize("name", LAYERS)
def test_gradgradcheck(name):
    layer, x = made(name)
    layer, x = layer.double(), x.double()[:1].requires_grad_()
    parameters = dict(layer.named_parameters())

    def call(x, *values):
        with torch.nn.utils.stateless._reparametrize_module(
            layer, dict(zip(parameters, values, strict=True))
        ):
            return layer(x)

    inputs = (x, *(p.detach().requires_grad_() for p in parameters.values()))
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)

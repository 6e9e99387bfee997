"""The layers that every feature of PyTorch is tried on, each with an input and a float64 twin."""

import copy

import torch
from torch import nn
from torch.nn.utils import parametrizations

import wn_kernels
from tests.comparison import assert_matches

# Layer, what it is made from, the input's shape. The last was PyTorch's, and is fused.
LAYERS = {
    "linear": (wn_kernels.WNLinear, (6, 4), {}, (5, 6)),
    "linear, whole": (wn_kernels.WNLinear, (6, 4), {"dim": None, "bias": False}, (2, 5, 6)),
    "conv1d": (wn_kernels.WNConv1d, (6, 4, 3), {"padding": 1, "dim": 2}, (2, 6, 9)),
    "conv2d": (
        wn_kernels.WNConv2d,
        (3, 4, 3),
        {"padding": 1, "padding_mode": "reflect", "eps": 1e-6},
        (2, 3, 7, 8),
    ),
    "conv3d": (wn_kernels.WNConv3d, (2, 3, 2), {"stride": 2, "norm": "l1"}, (3, 2, 5, 5, 5)),
    "transposed": (wn_kernels.WNConvTranspose1d, (6, 4, 4), {"stride": 2}, (2, 6, 5)),
    "transposed 2d": (
        wn_kernels.WNConvTranspose2d,
        (3, 4, 3),
        {"dim": 1, "norm": "linf"},
        (2, 3, 4, 5),
    ),
    "transposed 3d": (wn_kernels.WNConvTranspose3d, (2, 3, 2), {}, (3, 2, 4, 5, 4)),
    "fused": (None, (6, 4, 3), {"padding": 1}, (2, 6, 9)),
}


def made(name, seed=0):
    """The layer, with a `g` that is not the norm, and an input."""
    torch.manual_seed(seed)
    kind, arguments, options, x_shape = LAYERS[name]
    if kind is None:
        layer = parametrizations.weight_norm(nn.Conv1d(*arguments, **options))
        wn_kernels.fuse(layer)
    else:
        layer = kind(*arguments, **options)
    with torch.no_grad():
        layer.weight = layer.weight * (1 + torch.rand(layer.weight.shape))
        for key, p in layer.named_parameters():
            if key.endswith(("_g", "original0")):
                p.mul_(1.5)
    return layer, torch.randn(x_shape)


def gradients(layer, x, loss=lambda y: y.square().sum()):
    """Output, and the gradients of the loss with respect to the input and every parameter."""
    x = x.detach().clone().requires_grad_()
    parameters = dict(layer.named_parameters())
    y = layer(x)
    grads = torch.autograd.grad(loss(y), [x, *parameters.values()])
    return y.detach(), dict(zip(["input", *parameters], grads, strict=True))


def reference(layer, x, loss=lambda y: y.square().sum()):
    """The same by the definition, in float64."""
    with wn_kernels.use_backend("reference"):
        return gradients(copy.deepcopy(layer).double(), x.double(), loss)


def assert_right(y, grads, layer, x, dtype=torch.float32, roundings=4):
    """Against the definition in float64. The sums have at most a few hundred terms, of the size of
    the output and of the largest gradient."""
    right, right_grads = reference(layer, x)
    assert_matches(y, right, dtype, 64, roundings=roundings)
    terms = max(grad.norm().item() for grad in right_grads.values())
    assert grads.keys() == right_grads.keys()
    for name, grad in grads.items():
        wanted = right_grads[name]
        scale = min(terms, 2 * wanted.norm().item())
        assert_matches(grad, wanted, dtype, 512, roundings=roundings, terms=scale, what=name)

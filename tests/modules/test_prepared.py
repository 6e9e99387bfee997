"""A layer that is used many times inside `parametrize.cached()`: its weight, and the weight's
backward, run once."""

import copy

import pytest
import torch
from torch.nn.utils import parametrize

import wn_kernels
from tests.comparison import assert_matches
from tests.compatibility.layers import LAYERS, made, reference
from wn_kernels import use_backend
from wn_kernels.backends import vendor
from wn_kernels.modules import prepared

USES = 3


def used(layer, x):
    """The loss of a layer that is used several times."""
    return sum(layer(x * (i + 1)).float().square().sum() for i in range(USES))


def reference_grads(layer, x):
    """Of the same, in float64, with a weight for each use."""
    right, wide = {}, copy.deepcopy(layer).double()
    for i in range(USES):
        _, grads = reference(wide, x.double() * (i + 1))
        for key, grad in grads.items():
            right[key] = right.get(key, 0) + grad * ((i + 1) if key == "input" else 1)
    return right


def assert_grads(layer, x, dtype=torch.float32):
    right = reference_grads(layer, x)
    terms = max(grad.norm().item() for grad in right.values())
    for name, p in layer.named_parameters():
        scale = terms if dtype != torch.float32 else 0.0
        scale = min(scale, 4 * right[name].norm().item())
        assert_matches(
            p.grad, right[name], dtype, 512, roundings=6, terms=terms, scale=scale, what=name
        )


@pytest.mark.parametrize("name", LAYERS)
def test_the_backward_of_a_weight_runs_once(name):
    layer, x = made(name)
    sums = []
    with parametrize.cached():
        layer.weight.register_hook(sums.append)
        loss = used(layer, x)
    loss.backward()
    assert len(sums) == 1  # the hook gets the gradient when it is complete
    assert_grads(layer, x)


@pytest.mark.parametrize("name", ["linear", "conv1d", "transposed", "fused"])
def test_autocast(name):
    """Gradients of the uses are added in float32, and their product is in bfloat16."""
    layer, x = made(name)
    x = x.bfloat16().float()
    sums = []
    with parametrize.cached(), torch.autocast("cpu", torch.bfloat16):
        layer.weight.register_hook(sums.append)
        assert layer(x).dtype == torch.bfloat16
        loss = used(layer, x)
    loss.backward()
    assert [grad.dtype for grad in sums] == [torch.float32]
    assert_grads(layer, x, torch.bfloat16)


@pytest.mark.parametrize(
    ("x_dtype", "v_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed", "fused"])
def test_dtypes(name, x_dtype, v_dtype):
    """The product is in the dtype of the input, as outside of the block."""
    layer, x = made(name)
    layer, x = layer.to(v_dtype), x.to(x_dtype)
    with use_backend("reference"):
        right = copy.deepcopy(layer).double()(x.double()).detach()
    with parametrize.cached():
        for _ in range(2):
            y = layer(x)
            assert y.dtype == x_dtype
            assert_matches(y.detach(), right, x_dtype, 64, roundings=4)
        used(layer, x).backward()
    assert_grads(layer, x, torch.bfloat16)


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["linear", "fused"])
def test_gradients_after_a_call_without(name, first):
    """A weight without a graph does not stand in for one that needs it."""
    layer, x = made(name)
    with parametrize.cached():
        with first():
            layer(x)
        used(layer, x).backward()
    assert_grads(layer, x)
    for p in layer.parameters():
        p.requires_grad_(False)
    x.requires_grad_()
    with parametrize.cached():
        with first():
            y = layer(x)
        layer(x).sum().backward()
    assert x.grad.norm() > 0
    assert y.norm() > 0


def test_frozen_and_cached(monkeypatch):
    """The kept weight serves calls without gradients, also of later blocks, and the cached one
    those that need them."""
    monkeypatch.setattr(prepared, "_shares", lambda *_: True)
    layer, x = made("conv1d")
    with wn_kernels.frozen_weights(layer):
        kept = []
        for _ in range(2):
            with parametrize.cached():
                with torch.no_grad():
                    layer(x)
                    kept.append(layer.weight)
                used(layer, x).backward()
            assert_grads(layer, x)
            layer.zero_grad()
        assert kept[0] is kept[1]


@pytest.mark.parametrize("name", ["conv3d", "transposed 3d"])
def test_where_pytorchs_convolution_is_wrong(name, monkeypatch):
    """A prepared weight does not lead to a convolution that is wrong on this processor."""
    monkeypatch.setattr(vendor, "WRONG_IN_3D", frozenset([torch.bfloat16]))
    layer, x = made(name)
    layer, x = layer.bfloat16(), x.bfloat16()
    plain = []
    convolution = torch.convolution

    def counted(x, *arguments):
        plain.append(x.dtype)
        return convolution(x, *arguments)

    monkeypatch.setattr(torch, "convolution", counted)
    right = copy.deepcopy(layer).double()(x.double()).detach()
    plain.clear()
    with torch.no_grad(), use_backend("aten"):
        with parametrize.cached():
            assert_matches(layer(x), right, torch.bfloat16, 64, roundings=4)
        with wn_kernels.frozen_weights(layer):
            assert_matches(layer(x), right, torch.bfloat16, 64, roundings=4)
    assert plain == [torch.float32] * 2

"""Automatic mixed precision on the CPU: the product in the lower precision, all else in float32."""

import copy

import pytest
import torch

import wn_kernels
from tests.comparison import assert_matches, assert_same_bits
from tests.compatibility.layers import LAYERS, gradients, made


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_autocast(name, dtype, backend):
    """As close to float64 as a product in this dtype can be; parameters' gradients are float32.

    The kernels read `v` and `g` as they are, in float32, and only the input is cast: what they do
    on a GPU.
    """
    if backend == "triton":
        pytest.importorskip("triton")
    layer, x = made(name)
    wide, wide_x = copy.deepcopy(layer).double(), x.to(dtype).double()

    def loss(y):
        return y.float().square().mean()

    with torch.autocast("cpu", dtype), wn_kernels.use_backend(backend):
        y, grads = gradients(layer, x, loss)
    assert y.dtype == dtype
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    with wn_kernels.use_backend("reference"):
        right, right_grads = gradients(wide, wide_x, lambda y: y.square().mean())
    assert_matches(y, right, dtype, 64, roundings=4)
    # W, y, dy, and the sums of each gradient are rounded; the norm's part of dV cancels.
    terms = max(grad.norm().item() for grad in right_grads.values())
    for key, grad in grads.items():
        scale = min(terms, 4 * right_grads[key].norm().item())
        assert_matches(grad, right_grads[key], dtype, 512, roundings=6, scale=scale, what=key)


def test_float64_stays():
    layer, x = made("linear")
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.double()(x.double()).dtype == torch.float64


def test_grad_scaler():
    """Scaled float16 gradients, unscaled before the step; a step that overflows is left out."""
    layer, x = made("conv1d")
    twin = copy.deepcopy(layer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (layer, twin)]
    with torch.autocast("cpu", torch.float16):
        loss = layer(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizers[0])
    scaler.update()
    with torch.autocast("cpu", torch.float16):
        twin(x).float().square().mean().backward()
    optimizers[1].step()
    for p, right in zip(layer.parameters(), twin.parameters(), strict=True):
        assert_matches(p, right.detach().double(), torch.float16, 64)
    before = copy.deepcopy(layer.state_dict())
    scaler.scale(layer(x * float("inf")).sum()).backward()
    scaler.step(optimizers[0])
    for key, t in layer.state_dict().items():
        assert_same_bits(t, before[key], key)

"""`torch.compile`: one graph, forward and backward, and no compilation for another batch."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import wn_kernels.functional as WF
from tests.comparison import assert_same_bits
from tests.compatibility.layers import LAYERS, assert_right, gradients, made


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", LAYERS)
def test_full_graph(name):
    layer, x = made(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for _ in range(2):
        layer.zero_grad()
        y, grads = gradients_of(compiled, layer, x)
        assert_right(y, grads, layer, x)
    with torch.no_grad():
        compiled(x)
    assert counter.frame_count == 2  # with gradients and without


@pytest.mark.parametrize("name", LAYERS)
def test_dynamic_shapes(name):
    """One compilation serves every batch and every size."""
    layer, x = made(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for repeats in (1, 2, 3):
        batch = torch.cat([x] * repeats)
        y, grads = gradients_of(compiled, layer, batch)
        assert_right(y, grads, layer, batch)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] == counts[2] > 0


@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed", "fused"])
def test_inductor(name):
    layer, x = made(name)
    compiled = torch.compile(layer, fullgraph=True)
    y, grads = gradients_of(compiled, layer, x)
    assert_right(y, grads, layer, x)


def gradients_of(compiled, layer, x):
    class Named(torch.nn.Module):
        named_parameters = staticmethod(layer.named_parameters)

        def forward(self, x):
            return compiled(x)

    return gradients(Named(), x)


def test_functionals():
    x, v, g = torch.randn(5, 6), torch.randn(4, 6), torch.rand(4, 1)
    calls = [
        (WF.wn_linear, (x, v, g)),
        (WF.weight_norm, (v, g)),
        (WF.slice_norm, (v,)),
        (WF.wn_conv1d, (x, v[..., None], g[..., None])),
    ]
    for function, arguments in calls:
        if function is WF.wn_conv1d:
            arguments = (x[..., None], *arguments[1:])
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_same_bits(compiled(*arguments), function(*arguments))

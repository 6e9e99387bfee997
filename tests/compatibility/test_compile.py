"""`torch.compile`: one graph, forward and backward, and no compilation for another batch."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import wn_kernels.functional as WF
from tests.comparison import assert_matches, assert_same_bits
from tests.compatibility.layers import LAYERS, assert_right, gradients, made
from wn_kernels import use_backend


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


def _functionals():
    """Every public function, with arguments."""
    x, v, g = torch.randn(5, 6), torch.randn(4, 6), torch.rand(4, 1) + 0.5
    yield WF.wn_linear, (x, v, g)
    yield WF.weight_norm, (v, g)
    yield WF.slice_norm, (v,)
    for rank in (1, 2, 3):
        # No batch that equals another size: the compiler would take them for the same.
        x, v = torch.randn(5, 6, *(7,) * rank), torch.randn(4, 6, *(2,) * rank)
        yield getattr(WF, f"wn_conv{rank}d"), (x, v, g.view(4, 1, *(1,) * rank))
        v = v.transpose(0, 1).contiguous()
        yield getattr(WF, f"wn_conv_transpose{rank}d"), (x, v, torch.rand(6))


@pytest.mark.current
@pytest.mark.parametrize(("function", "arguments"), list(_functionals()))
def test_functionals(function, arguments):
    """One graph, and one compilation for every batch."""

    serves = "reference" if function is WF.slice_norm else "aten"  # a compiled call

    def uncompiled(*inputs):
        with use_backend(serves):
            return function(*inputs)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    assert_same_bits(compiled(*arguments), uncompiled(*arguments))
    count = counter.frame_count
    batch = torch.cat([arguments[0]] * 3)
    if function not in (WF.weight_norm, WF.slice_norm):  # whose first argument is the weight
        assert_same_bits(compiled(batch, *arguments[1:]), uncompiled(batch, *arguments[1:]))
    assert counter.frame_count == count > 0


@pytest.mark.current
@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed", "fused"])
def test_beside_hooks_and_reads(name):
    """A user's hook is in the graph, and a read of the weight between calls compiles nothing."""
    layer, x = made(name)
    layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(torch.nn.Sequential(layer), fullgraph=True, backend=counter)
    wide = copy.deepcopy(layer).double()(x.double()).detach()
    for _ in range(3):
        assert layer.weight.norm() > 0
        assert_matches(compiled(x), wide, torch.float32, 256, roundings=4)
    assert counter.frame_count == 1


def test_a_list_with_hooks():
    """A hook on PyTorch's list of parametrizations is in the graph as well."""
    layer, x = made("fused")
    layer.parametrizations.weight.register_forward_hook(lambda *args: 2 * args[-1])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    wide = copy.deepcopy(layer).double()(x.double()).detach()
    assert_matches(compiled(x), wide, torch.float32, 256, roundings=4)

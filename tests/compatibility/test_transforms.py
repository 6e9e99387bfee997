"""`torch.func`, forward mode, checkpointing and saved-tensor hooks."""

import copy

import pytest
import torch
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vjp, vmap
from torch.utils.checkpoint import checkpoint

from tests.comparison import assert_matches
from tests.compatibility.layers import LAYERS, assert_right, gradients, made, reference

WIDE = {"dtype": torch.float32, "length": 512, "roundings": 4}


def wide(layer, x):
    """The layer and its input in float64: derivatives by another route are compared there."""
    return copy.deepcopy(layer).double(), x.double()


def loss_of(layer):
    return lambda parameters, x: functional_call(layer, parameters, (x,)).square().sum()


@pytest.mark.parametrize("name", LAYERS)
def test_grad_and_vjp(name):
    layer, x = made(name)
    parameters = dict(layer.named_parameters())
    by_parameters, by_x = grad(loss_of(layer), (0, 1))(parameters, x)
    y, pull = vjp(lambda x: functional_call(layer, parameters, (x,)), x)
    assert_right(y, {"input": by_x} | by_parameters, layer, x)
    (pulled,) = pull(2 * y)
    assert_matches(pulled, reference(layer, x)[1]["input"], **WIDE)


@pytest.mark.parametrize("name", LAYERS)
def test_forward_mode_and_hessian(name):
    layer, x = made(name)
    layer, x = wide(layer, x)
    parameters = dict(layer.named_parameters())
    tangents = {key: torch.randn_like(p) for key, p in parameters.items()}
    tangent = torch.randn_like(x)

    def call(parameters, x):
        return functional_call(layer, parameters, (x,))

    y, moved = jvp(call, (parameters, x), (tangents, tangent))
    step = 1e-6

    def after(step):
        at = {key: p + step * tangents[key] for key, p in parameters.items()}
        return call(at, x + step * tangent).detach()

    slope = (after(step) - after(-step)) / (2 * step)
    # A central difference is right to the square of its step, and to rounding over the step.
    assert_matches(moved, slope, torch.float32, 1)
    assert_matches(y, call(parameters, x).detach(), torch.float64, 64)
    curved = hessian(lambda x: call(parameters, x).square().sum())(x)
    right = torch.autograd.functional.hessian(lambda x: call(parameters, x).square().sum(), x)
    assert_matches(curved, right, torch.float64, 512)


@pytest.mark.parametrize("name", LAYERS)
def test_per_sample_gradients(name):
    layer, x = made(name)
    parameters = dict(layer.named_parameters())
    each = vmap(grad(lambda p, sample: loss_of(layer)(p, sample[None])), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        right = reference(layer, sample[None])[1]
        for key, grads in each.items():
            assert_matches(grads[i], right[key], **WIDE, terms=right["input"].norm().item())


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "fused"])
def test_ensembles(name):
    """Stacked parameters; a fused layer, like a parametrized one, has a class of its own and
    cannot be stacked by `stack_module_state`."""
    layers = [made(name, seed)[0] for seed in range(3)]
    x = made(name)[1]
    parameters, buffers = stack_module_state(layers)
    y = vmap(lambda p, b: functional_call(layers[0], (p, b), (x,)))(parameters, buffers)
    for layer, out in zip(layers, y, strict=True):
        assert_matches(out, reference(layer, x)[0], torch.float32, 64)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(name, reentrant):
    layer, x = made(name)

    class Recomputed(torch.nn.Module):
        def forward(self, x):
            return checkpoint(layer, x, use_reentrant=reentrant)

    run = Recomputed()
    run.named_parameters = layer.named_parameters
    x.requires_grad_()
    y = run(x)
    y.square().sum().backward()
    grads = {"input": x.grad} | {key: p.grad for key, p in layer.named_parameters()}
    layer.zero_grad()
    assert_right(y, grads, layer, x.detach())


@pytest.mark.parametrize("name", LAYERS)
def test_saved_tensors_may_be_moved(name):
    """What is saved goes through the hooks, and comes back from there alone."""
    layer, x = made(name)
    kept = []

    def pack(t):
        kept.append(t.detach().clone())
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: kept[i]):
        y, grads = gradients(layer, x)
    assert kept
    assert_right(y, grads, layer, x)
    with torch.autograd.graph.save_on_cpu():
        y, grads = gradients(layer, x)
    assert_right(y, grads, layer, x)

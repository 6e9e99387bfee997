"""Losses made of gradients: values, what is computed for them, and what is kept."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import wn_kernels
from tests import library
from tests.comparison import assert_matches, assert_same_bits
from tests.compatibility.layers import LAYERS, made
from wn_kernels import prepare
from wn_kernels.backends import native
from wn_kernels.plan import costs

BACKENDS = ["native", "aten", "triton", "triton, native"]


def serving(backend, monkeypatch):
    """What calls run inside of. Those of the others are not handed to the library first."""
    if "native" in backend:
        native.build()
        return wn_kernels.use_backend("triton" if "triton" in backend else "auto")
    library.hide(monkeypatch)
    return wn_kernels.use_backend(backend)


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
    parameters = {key: p for key, p in net.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(value, parameters.values(), allow_unused=True)
    found = {key: grad for key, grad in zip(parameters, grads, strict=True) if grad is not None}
    return {"loss": value.detach()[None]} | found


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("loss", [wgan_gp, r1, eikonal, weight_penalty])
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_of_gradients(name, loss, backend, monkeypatch):
    layer, x = made(name)
    net = nn.Sequential(layer, nn.Tanh())
    with serving(backend, monkeypatch):
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


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_third_derivatives(name, backend, monkeypatch):
    def thrice(net, x):
        leaves = [x.requires_grad_(), *(p for p in net.parameters() if p.requires_grad)]
        total = net(x).square().sum()
        for order in (1, 2, 3):
            grads = torch.autograd.grad(total, leaves, create_graph=order < 3)
            total = sum(grad.square().sum() for grad in grads)
        return grads

    layer, x = made(name)
    net = nn.Sequential(layer, nn.Tanh()).double()
    twin, x = copy.deepcopy(net), x.double()
    with serving(backend, monkeypatch):
        found = thrice(net, x.clone())
    with wn_kernels.use_backend("reference"):
        right = thrice(twin, x.clone())
    terms = max(t.norm().item() for t in right)
    for t, wanted in zip(found, right, strict=True):
        assert_matches(t, wanted, torch.float64, 512, roundings=16, terms=terms)


# Each in one dtype, and under autocast.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed"])
def test_dtypes(name, dtype):
    layer, x = made(name)
    net = nn.Sequential(layer, nn.Tanh())
    with wn_kernels.use_backend("reference"):
        right = derivatives(r1, copy.deepcopy(net).double(), x.double())
    if dtype is not None:
        found = derivatives(r1, net.to(dtype), x.to(dtype))
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found = derivatives(r1, net, x)
    for key, wanted in right.items():
        if key.endswith("bias"):
            continue  # sums of few large terms that cancel
        assert found[key].dtype == (dtype or torch.float32) or key == "loss"
        assert (found[key].double() - wanted).norm() < 0.1 * wanted.norm(), key


@pytest.mark.parametrize("frozen", ["weight_v", "weight_g", "both"])
@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen(name, frozen, backend, monkeypatch):
    layer, x = made(name)
    for key, p in layer.named_parameters():
        p.requires_grad_(key == "bias" or frozen not in (key, "both"))
    net = nn.Sequential(layer, nn.Tanh())
    with serving(backend, monkeypatch):
        found = derivatives(eikonal, net, x)
    with wn_kernels.use_backend("reference"):
        right = derivatives(eikonal, copy.deepcopy(net).double(), x.double())
    assert found.keys() == right.keys()
    assert len(found) == (2 if frozen == "both" else 3)
    for key, t in found.items():
        assert_matches(t, right[key], torch.float32, 512, roundings=8, what=key)


# --- what is computed ----------------------------------------------------------------------------


def mlp():
    return nn.Sequential(
        nn.Linear(3, 40), nn.Softplus(), nn.Linear(40, 40), nn.Softplus(), nn.Linear(40, 1)
    ), (50, 3)


def critic():
    return nn.Sequential(
        nn.Conv2d(1, 6, 4, 2, 1),
        nn.Softplus(),
        nn.ConvTranspose2d(6, 5, 3),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(5 * 36, 1),
    ), (3, 1, 8, 8)


def pair(build):
    """A network in PyTorch's weight norm and in ours, and an input."""
    torch.manual_seed(0)
    net, shape = build()
    for layer in net:
        if hasattr(layer, "weight"):
            parametrizations.weight_norm(layer)
    ours = copy.deepcopy(net)
    wn_kernels.fuse(ours)
    return net, ours, torch.randn(shape)


def products(events):
    """How many there are of each kind."""
    kinds = {"aten::mm": "matrix", "aten::addmm": "matrix", "aten::convolution": "convolution"}
    kinds |= {"aten::convolution_backward": "gradients of a convolution"}
    return Counter(kinds[event.name] for event in events if event.name in kinds)


def events_of(run):
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    return seen.events()


@pytest.mark.parametrize("build", [mlp, critic])
@pytest.mark.parametrize("loss", [eikonal, weight_penalty])
@pytest.mark.parametrize("backend", ["native", "aten"])
def test_the_products_are_those_of_pytorch(build, loss, backend, monkeypatch):
    """The forward does not run again, and no gradient is computed that is not needed. The library
    has products of its own for convolutions over few pixels. Those of a linear layer are left out
    here."""
    eager, ours, x = pair(build)
    x.requires_grad_()
    monkeypatch.setattr(costs, "is_own", lambda call: False)
    prepare.forget()
    try:
        with serving(backend, monkeypatch):
            loss(ours, x).backward()
            found = events_of(lambda: loss(ours, x).backward())
    finally:
        prepare.forget()
    right = products(events_of(lambda: loss(eager, x).backward()))
    if backend == "aten" or build is mlp:
        assert products(found) == right
    else:
        assert products(found) <= right
        assert products(found)["matrix"] == right["matrix"]
    if backend == "native":
        marks = [e.name.split(",")[0] for e in found if e.name.startswith("wn_kernels::")]
        recorded = sum(e.name.endswith("recorded") for e in found)
        layers = sum(hasattr(layer, "weight") for layer in ours)
        assert recorded == layers
        assert len(marks) == 3 * layers  # forward, recorded backward, backward


@pytest.mark.parametrize("backend", ["native", "aten"])
def test_gradients_that_are_not_needed(backend, monkeypatch):
    """The slope alone takes a product for each layer."""
    _, ours, x = pair(mlp)
    x.requires_grad_()
    with serving(backend, monkeypatch):
        y = ours(x).sum()
        assert products(events_of(lambda: torch.autograd.grad(y, x, create_graph=True))) == {
            "matrix": 3
        }


# --- what is kept --------------------------------------------------------------------------------


def kept_bytes(net, x, wanted):
    """What the graphs of the output and of its gradients hold beyond input and parameters."""
    saved = {}
    owned = {t.untyped_storage().data_ptr() for t in (x, *net.parameters())}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = net(x)
        torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
    return sum(storage.nbytes() for key, storage in saved.items() if key not in owned)


@pytest.mark.parametrize("build", [mlp, critic])
@pytest.mark.parametrize("of_weights", [False, True])
@pytest.mark.parametrize("backend", ["native", "aten"])
def test_saved_memory(build, of_weights, backend, monkeypatch):
    eager, ours, x = pair(build)
    x.requires_grad_()
    with serving(backend, monkeypatch):
        found = kept_bytes(ours, x, [x, *ours.parameters()] if of_weights else [x])
    right = kept_bytes(eager, x, [x, *eager.parameters()] if of_weights else [x])
    assert 0 < found <= 1.1 * right


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_graph_is_kept_or_freed(backend, monkeypatch):
    _, ours, x = pair(critic)
    parameters = list(ours.parameters())
    with serving(backend, monkeypatch):
        x.requires_grad_()
        y = ours(x)
        penalty = (slope(y, x).flatten(1).norm(dim=1) - 1).square().mean()
        first = torch.autograd.grad(penalty, parameters, retain_graph=True, allow_unused=True)
        values = torch.autograd.grad(y.sum(), parameters, retain_graph=True)
        both = torch.autograd.grad(penalty + y.sum(), parameters, retain_graph=True)
        second = torch.autograd.grad(penalty, parameters, allow_unused=True)
        for a, b in zip(first, second, strict=True):
            assert (a is None) == (b is None)
            if a is not None and a.norm() > 0:
                assert_same_bits(a, b)
        for total, a, b in zip(both, first, values, strict=True):
            right = b.double() if a is None else a.double() + b.double()
            terms = b.norm().item()
            assert_matches(total, right, torch.float32, 64, terms=terms)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(penalty, parameters, allow_unused=True)
        y = ours(x)
        penalty = slope(y, x).square().sum()
        with torch.no_grad():
            parameters[1].mul_(2)
        with pytest.raises(RuntimeError, match="inplace operation"):
            penalty.backward()


# --- around it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoints_hooks_and_anomaly_mode(backend, monkeypatch):
    _, ours, x = pair(critic)
    with serving(backend, monkeypatch):
        right = derivatives(eikonal, ours, x)
        again = lambda x: checkpoint(ours, x, use_reentrant=False)  # noqa: E731
        again.named_parameters = ours.named_parameters
        for key, t in derivatives(eikonal, again, x).items():
            assert_same_bits(t, right[key])
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
            found = derivatives(eikonal, ours, x)
        for key, t in found.items():
            assert_same_bits(t, right[key])
        with torch.autograd.detect_anomaly(check_nan=True):
            found = derivatives(eikonal, ours, x)
        for key, t in found.items():
            assert_same_bits(t, right[key])
        doubled = [p.register_hook(lambda grad: 2 * grad) for p in ours.parameters()]
        for key, t in derivatives(eikonal, ours, x).items():
            assert_same_bits(t, right[key] if key == "loss" else 2 * right[key])
        for hook in doubled:
            hook.remove()


@pytest.mark.parametrize("backend", ["native", "aten"])
def test_a_batch_of_gradients(backend, monkeypatch):
    _, ours, x = pair(mlp)
    x.requires_grad_()
    parameters = list(ours.parameters())
    with serving(backend, monkeypatch):
        y = ours(x)
        dys = torch.randn(4, *y.shape)
        batch = torch.autograd.grad(y, x, dys, create_graph=True, is_grads_batched=True)[0]
        single = torch.stack([torch.autograd.grad(y, x, dy, create_graph=True)[0] for dy in dys])
        assert_matches(batch, single.double(), torch.float32, 64, roundings=4)
        grads = (
            torch.autograd.grad(t.square().sum(), parameters, retain_graph=True, allow_unused=True)
            for t in (batch, single)
        )
        for a, b in zip(*grads, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert_matches(a, b.double(), torch.float32, 256, roundings=8)

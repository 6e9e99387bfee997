"""What others do to a weight-normed weight has effect: parametrizations stacked on it, hooks that
fetch its parameters, `parametrize.cached()`, and writes of an initialisation."""

import copy
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import wn_kernels
import wn_kernels.functional as WF
from tests.comparison import assert_matches, assert_same_bits
from tests.convert.layers import LAYERS, NORMALISE, Twice, made, step
from tests.convert.test_removal import PLAIN, output, subject


class LowRank(nn.Module):
    """A trained addition, as LoRA's, without an inverse."""

    def __init__(self, shape):
        super().__init__()
        self.a = nn.Parameter(torch.randn(shape[0], 2) / 3)
        self.b = nn.Parameter(torch.randn(2, shape[1:].numel()) / 3)

    def forward(self, weight):
        return weight + (self.a @ self.b).view(weight.shape)


class Sparse(nn.Module):
    """A fixed mask."""

    def forward(self, weight):
        return weight * (weight > 0)

    def right_inverse(self, weight):
        return weight


def spectral(layer):
    layer.eval()  # in training, every read moves it
    parametrizations.spectral_norm(layer, dim=0)


STACKED = {
    "twice": lambda layer: parametrize.register_parametrization(layer, "weight", Twice()),
    "sparse": lambda layer: parametrize.register_parametrization(layer, "weight", Sparse()),
    "low rank": lambda layer: parametrize.register_parametrization(
        layer, "weight", LowRank(layer.weight.shape)
    ),
    "spectral": spectral,
    "two": lambda layer: [
        parametrize.register_parametrization(layer, "weight", p) for p in (Sparse(), Twice())
    ],
    "pruned v": lambda layer: prune.l1_unstructured(layer.parametrizations.weight, "original1", 5),
}


@pytest.mark.parametrize("stack", STACKED)
@pytest.mark.parametrize("kind", ["linear", "taps", "up", "its own forward"])
def test_what_is_stacked_has_effect(kind, stack):
    """On a fused layer, and on one that is fused afterwards: as on PyTorch's."""
    layers = [made(kind, "parametrizations")[0] for _ in range(3)]
    x = made(kind, "parametrizations")[1]
    wn_kernels.fuse(layers[0])
    for layer in layers:
        torch.manual_seed(5)
        STACKED[stack](layer)
    before, after, twin = layers
    wn_kernels.fuse(after)
    right, right_grads = step(twin.double(), x.double())
    layers = [before, after]
    if stack != "pruned v":  # PyTorch's pruning leaves a tensor that cannot be copied
        layers += [copy.deepcopy(before), pickle.loads(pickle.dumps(after))]
    for layer in layers:
        assert list(layer.state_dict()) == list(twin.state_dict())
        assert_matches(layer.weight, twin.weight.detach(), torch.float32, 64, roundings=4)
        y, grads = step(layer, x)
        assert_matches(y, right, torch.float32, 64, roundings=4)
        assert grads.keys() == right_grads.keys()
        terms = right_grads["x"].norm().item() + right.norm().item() ** 2
        for name, grad in grads.items():
            assert_matches(grad, right_grads[name], torch.float32, 64, terms=terms, what=name)
        layer.load_state_dict(layer.state_dict())
        assert wn_kernels.fold(layer) == []
        assert wn_kernels.unfuse(layer) == [""]
        assert type(layer).__name__ == type(twin).__name__
        assert_matches(layer(x), right, torch.float32, 64, roundings=4)
        wn_kernels.fuse(layer)
        if stack == "pruned v":
            continue
        wn_kernels.remove_weight_norm(layer)
        assert type(layer) is type(LAYERS[kind][0]())
        assert isinstance(layer.weight, nn.Parameter)
        assert_matches(layer(x), right, torch.float32, 64, roundings=4)


def test_what_is_stacked_takes_an_assignment():
    layer, _ = made("linear", "parametrizations")
    wn_kernels.fuse(layer)
    weight = torch.rand(4, 6)
    STACKED["sparse"](layer)
    layer.weight = weight
    assert_matches(layer.weight, weight.double(), torch.float32, 6)
    STACKED["twice"](layer)
    with pytest.raises(RuntimeError, match="Twice does not implement right_inverse"):
        layer.weight = weight


@pytest.mark.parametrize("form", ["weight_norm", "own"])
def test_what_cannot_be_stacked_is_refused(form):
    """PyTorch's hook form takes no parametrization of its tensor, and no pruning."""
    layer = subject("linear", form)[0][0]
    before = layer.weight.detach().clone()
    keys = list(layer.state_dict())
    for stack in ("twice", "low rank", "spectral"):
        with pytest.raises(ValueError, match=r"cannot be registered on 'weight' of .*Linear"):
            STACKED[stack](layer)
    with pytest.raises((TypeError, KeyError), match="weight"):
        prune.l1_unstructured(layer, "weight", 3)
    with pytest.raises(RuntimeError, match="two weight_norm hooks on the same parameter weight"):
        nn.utils.weight_norm(layer)
    assert list(layer.state_dict()) == keys
    assert_same_bits(layer.weight.detach(), before)


@pytest.mark.parametrize("form", [*NORMALISE, "own"])
def test_another_tensor_is_parametrized(form):
    """The bias: before and after `fuse`, it has effect, and folding the weight leaves it."""
    for first in (False, True):
        torch.manual_seed(1)
        plain = wn_kernels.WNLinear(6, 4) if form == "own" else NORMALISE[form](nn.Linear(6, 4))
        layer = plain
        if first:
            parametrize.register_parametrization(layer, "bias", Twice())
        wn_kernels.fuse(layer)
        bias = layer.bias.detach().clone()
        if not first:
            parametrize.register_parametrization(layer, "bias", Twice())
            bias = 2 * bias
        x = torch.randn(3, 6)
        right = x.double() @ layer.weight.detach().double().T + bias.double()
        for other in (layer, copy.deepcopy(layer)):
            assert_matches(other(x), right, torch.float32, 6)
            wn_kernels.fold(other)
            assert parametrize.is_parametrized(other, "bias")
            assert_matches(other(x), right, torch.float32, 6)
            assert_matches(copy.deepcopy(other)(x), right, torch.float32, 6)


# --- parameters that hooks fetch -----------------------------------------------------------------


def offload(model):
    """Empties the parameters of every module outside its call, as sharding and offloading do."""
    stored = {p: p.data for p in model.parameters()}

    def fetch(module, *_):
        for p in module._parameters.values():
            if p is not None:
                p.data = stored[p]

    def release(module, *_):
        for p in module._parameters.values():
            if p is not None:
                p.data = torch.empty(0)

    for module in model.modules():
        if module._parameters:
            module.register_forward_pre_hook(fetch)
            module.register_forward_hook(release)
            release(module)
    return lambda: [fetch(module) for module in model.modules()]


@pytest.mark.parametrize("form", [*NORMALISE, "own"])
@pytest.mark.parametrize("kind", PLAIN)
def test_parameters_that_hooks_fetch(kind, form):
    if form == "own" and kind not in ("linear", "1d", "2d", "up"):
        return
    model, x, _ = subject(kind, form)
    twin = copy.deepcopy(model).double()
    right = output(twin, x.double() if x.is_floating_point() else x)
    right.pow(3).sum().backward()
    fetch_all = offload(model)
    assert all(not p.numel() for p in model.parameters())
    y = output(model, x)
    assert all(not p.numel() for p in model.parameters())
    fetch_all()
    assert_matches(y, right.detach(), torch.float32, 64, roundings=8)
    y.pow(3).sum().backward()
    grads = dict(twin.named_parameters())
    terms = right.norm().item() ** 3
    for name, p in model.named_parameters():
        if grads[name].grad.norm() > 0:
            assert_matches(p.grad, grads[name].grad, torch.float32, 64, terms=terms, what=name)


def test_a_hook_on_a_list_is_run():
    """Whatever it is that is registered, and where: its result has effect."""
    layer, x = made("linear", "parametrizations")
    wn_kernels.fuse(layer)
    plain = copy.deepcopy(layer).double()
    right = x.double() @ (3 * plain.weight).T + plain.bias
    for part in (layer.parametrizations.weight, layer.parametrizations.weight[0]):
        handle = part.register_forward_hook(lambda *args: 3 * args[-1])
        assert_matches(layer(x), right.detach(), torch.float32, 6)
        assert_matches(layer.weight, 3 * plain.weight.detach(), torch.float32, 6)
        handle.remove()
        own = type(part).forward
        part.forward = lambda *args, part=part, own=own: 3 * own(part, *args)
        assert_matches(layer(x), right.detach(), torch.float32, 6)
        del part.forward
        part.__class__ = type(
            type(part).__name__, (type(part),), {"forward": lambda *args, own=own: 3 * own(*args)}
        )
        assert_matches(layer(x), right.detach(), torch.float32, 6)
        part.__class__ = type(part).__base__
    assert_matches(layer(x), plain(x.double()).detach(), torch.float32, 6)


# --- parametrize.cached() ------------------------------------------------------------------------


@pytest.fixture
def count(monkeypatch):
    """How often a weight is formed."""
    calls = []
    form = WF.weight_norm
    monkeypatch.setattr(WF, "weight_norm", lambda *a, **k: calls.append(1) or form(*a, **k))
    return calls


@pytest.mark.parametrize("form", [*NORMALISE, "wn_kernels.weight_norm", "own"])
@pytest.mark.parametrize("kind", PLAIN)
def test_cached(kind, form, count):
    if form == "own" and kind not in ("linear", "1d", "2d", "up"):
        return
    model, x, names = subject(kind, form)
    layer = model[0]
    twin = copy.deepcopy(model).double()
    right = output(twin, x.double() if x.is_floating_point() else x)
    (2 * right).pow(3).sum().backward()
    count.clear()
    with parametrize.cached():
        y = output(model, x) + output(model, x)
        with parametrize.cached():
            assert getattr(layer, names[0]) is getattr(layer, names[0])
        assert len(count) == len(names)
    assert_matches(y, 2 * right.detach(), torch.float32, 64, roundings=8)
    y.pow(3).sum().backward()
    terms = right.norm().item() ** 3 * 8
    for name, p in model.named_parameters():
        grad = dict(twin.named_parameters())[name].grad
        if grad.norm() > 0:
            assert_matches(p.grad, grad, torch.float32, 64, terms=terms, what=name)
    assert getattr(layer, names[0]) is not getattr(layer, names[0])
    with torch.no_grad():  # outside, a change has effect
        for name, p in model.named_parameters():
            if name.endswith(("_g", "original0")):
                p.mul_(2)
    wide = copy.deepcopy(model).double()
    right = output(wide, x.double() if x.is_floating_point() else x).detach()
    assert_matches(output(model, x), right, torch.float32, 64, roundings=8)


def test_no_trace_while_caching():
    for form in (*NORMALISE, "own"):
        model, x, _ = subject("linear", form)
        match = "Cannot trace a model while caching"
        with parametrize.cached(), pytest.raises(RuntimeError, match=match):
            torch.jit.trace(model, x, check_trace=False)


# --- initialisation ------------------------------------------------------------------------------

WRITES = {
    "data": lambda w: w.data.normal_(3, 0.1),
    "init": lambda w: nn.init.uniform_(w, 2.5, 3.5),
    "no_grad": lambda w: w.detach().fill_(3).add_(torch.rand(w.shape)),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("form", [*NORMALISE, "wn_kernels.weight_norm", "own"])
@pytest.mark.parametrize("kind", PLAIN)
def test_apply_initialises(kind, form, write):
    if form == "own" and kind not in ("linear", "1d", "2d", "up"):
        return
    model, _, names = subject(kind, form)
    parameters = [id(p) for p in model.parameters()]
    written = {}

    def initialise(module):
        if module is model[0]:
            for name in names:
                WRITES[write](getattr(module, name))
                written[name] = getattr(module, name).detach().clone()

    assert model.apply(initialise) is model
    assert [id(p) for p in model.parameters()] == parameters
    for name in names:
        assert written[name].mean() > 2
        assert_matches(getattr(model[0], name), written[name].double(), torch.float32, 64)


@pytest.mark.parametrize("form", [*NORMALISE, "own"])
def test_apply_changes_nothing_else(form):
    """A function that reads, that sets `g`, or that raises."""
    model, _, _ = subject("linear", form)
    layer = model[0]
    g, v = layer._tensors("weight")
    before = v.detach().clone()
    model.apply(lambda module: getattr(module, "weight", None))
    assert_same_bits(v.detach(), before)

    def set_magnitude(module):
        if module is layer:
            assert module.weight.norm() > 0
            g.data.fill_(5)
            rows = module.weight.detach().norm(dim=1)
            assert_matches(rows, torch.full((4,), 5.0).double(), torch.float32, 6)

    model.apply(set_magnitude)
    assert_same_bits(v.detach(), before)
    assert_same_bits(g.detach(), torch.full((4, 1), 5.0))
    with pytest.raises(ZeroDivisionError):
        model.apply(lambda module: 1 / 0)
    assert layer.weight is not layer.weight


def test_apply_warns_where_there_is_no_way_back():
    layer, _ = made("linear", "parametrizations")
    wn_kernels.fuse(layer)
    STACKED["twice"](layer)
    with pytest.warns(UserWarning, match="written into weight of Linear are lost: .*Twice"):
        layer.apply(lambda m: m.weight.data.zero_() if isinstance(m, nn.Linear) else None)


IN_PLACE = {
    "init": lambda layer: nn.init.orthogonal_(layer.weight),
    "no_grad": lambda layer: torch.no_grad()(lambda: layer.weight.clamp_(-1, 1))(),
    "detached": lambda layer: layer.weight.detach().zero_(),
    "kept": lambda layer: [w.add_(1) for w in [layer.weight]],
    "a view": lambda layer: nn.init.zeros_(layer.weight[0]),
}
SILENT = {
    "assigned": lambda layer: setattr(layer, "weight", nn.init.orthogonal_(layer.weight)),
    "applied": lambda layer: layer.apply(
        lambda m: nn.init.orthogonal_(m.weight) if isinstance(m, nn.Linear) else None
    ),
    "read": lambda layer: layer.weight.square().sum().backward(),
    "a copy": lambda layer: layer.weight.clone().zero_(),
    "inference": lambda layer: torch.inference_mode()(lambda: layer.weight.norm())(),
    "func": lambda layer: torch.func.grad(lambda x: (x * layer.weight).sum())(torch.ones(4, 6)),
}


@pytest.mark.parametrize("then", ["forward", "read"])
@pytest.mark.parametrize("write", IN_PLACE)
@pytest.mark.parametrize("form", [*NORMALISE, "own"])
def test_a_lost_write_warns_once(form, write, then):
    layer = subject("linear", form)[0][0]
    use = (lambda: layer(torch.ones(6))) if then == "forward" else (lambda: layer.weight)
    before = layer.weight.detach().clone()
    IN_PLACE[write](layer)
    with pytest.warns(UserWarning, match=r"weight of .*Linear was written to in place") as seen:
        use()
    assert seen[0].filename == __file__  # the warning names the line of the caller
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IN_PLACE[write](layer)
        use()
    assert_same_bits(layer.weight.detach(), before)
    assert b"Reads" not in pickle.dumps(wn_kernels.remove_weight_norm(layer))


@pytest.mark.parametrize("use", SILENT)
@pytest.mark.parametrize("form", [*NORMALISE, "own"])
def test_nothing_else_warns(form, use):
    layer = subject("linear", form)[0][0]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            SILENT[use](layer)
            for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                other(torch.ones(2, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()


def test_a_read_holds_no_memory():
    for form in (*NORMALISE, "own"):
        layer = subject("linear", form)[0][0]
        weight = weakref.ref(layer.weight)
        assert weight() is None
        assert all(not t.untyped_storage().size() for t, _ in layer.__dict__["_reads"].values())

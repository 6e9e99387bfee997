"""Parameter groups, constant magnitudes and constant norms, in every form that a layer may have."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import wn_kernels
from tests.comparison import assert_matches, assert_same_bits, assert_zero
from tests.convert.layers import stacked
from tests.forms import FORMS, LAYERS, effective, made, normalised, parts
from wn_kernels.backends import reference
from wn_kernels.convert import normed


def norms(layer, dim):
    return reference.norms(parts(layer)[1].detach().double(), dim, 0.0)


def network(form):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(5, 8),
        normalised(nn.Linear(8, 6), form),
        nn.LayerNorm(6),
        normalised(nn.Linear(6, 6, bias=False), form, 1),
        nn.Linear(6, 3),
    )


# --- parameter groups ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_param_groups(form):
    """Plain weights decay; directions, magnitudes, biases and gains do not."""
    net = network(form)
    (g1, v1), (g3, v3) = parts(net[1]), parts(net[3])
    groups = {group["name"]: group for group in wn_kernels.param_groups(net, 0.1)}
    wanted = {
        "weights": [net[0].weight, net[4].weight],
        "directions": [v1, v3],
        "magnitudes": [g1, g3],
        "vectors": [net[1].bias, net[2].weight, net[2].bias, net[4].bias],
    }
    assert list(groups) == list(wanted)
    for name, params in wanted.items():
        assert {id(p) for p in groups[name]["params"]} == {id(p) for p in params}
        assert groups[name]["weight_decay"] == (0.1 if name == "weights" else 0.0)
    decays = wn_kernels.param_groups(net, 0.2, decay_v=True, decay_g=True)
    assert [group["weight_decay"] for group in decays] == [0.2, 0.2, 0.2, 0.0]


def test_param_groups_hold_every_trained_parameter_once():
    net = network("ours")
    net[3] = net[1]  # shared
    net[4].weight.requires_grad_(False)
    held = [p for group in wn_kernels.param_groups(net) for p in group["params"]]
    wanted = [p for p in net.parameters() if p.requires_grad]
    assert len(held) == len(wanted)
    assert {id(p) for p in held} == {id(p) for p in wanted}


@pytest.mark.parametrize("form", FORMS)
def test_param_groups_of_computed_tensors(form):
    """A pruned `v` is a direction still, and so is one under another parametrization."""
    layer = normalised(nn.Linear(6, 4), form)
    holder = layer if hasattr(layer, "weight_v") else layer.parametrizations.weight
    prune.l1_unstructured(holder, "weight_v" if holder is layer else "original1", 3)
    net = nn.Sequential(layer, stacked(), nn.Linear(4, 4))
    groups = {group["name"]: group["params"] for group in wn_kernels.param_groups(net)}
    assert [len(params) for params in groups.values()] == [1, 2, 2, 3]


@pytest.mark.parametrize("form", FORMS)
def test_optimizers_take_the_groups(form):
    """An optimizer of matrices, which by the number of dimensions would take `g` for one."""
    net = network(form)
    groups = wn_kernels.param_groups(net, 0.1)
    muon = torch.optim.Muon(groups[:2], lr=0.02)
    adam = torch.optim.AdamW(groups[2:], lr=0.02)
    before = [p.detach().clone() for p in net.parameters()]
    net(torch.arange(5)).square().sum().backward()
    for optimizer in (muon, adam):
        optimizer.step()
    for p, old in zip(net.parameters(), before, strict=True):
        assert (p != old).any()
    assert [group["name"] for group in muon.param_groups] == ["weights", "directions"]


def test_param_groups_reject():
    with pytest.raises(TypeError, match="model must be"):
        wn_kernels.param_groups([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="weight_decay is -1; expected"):
        wn_kernels.param_groups(nn.Linear(2, 2), -1)


def test_decay_of_directions_is_a_larger_learning_rate():
    """Training with decay of `V` is, but for ‖V‖, training without it at a rate of V's own:

    V' = (1 − ηλ) V − η G(V) with G(cV) = G(V) / c, hence, with c_t = (1 − ηλ)^t,
    U' = U − η / (c_t c_{t+1}) G(U) for U = V / c_t
    """
    decayed, scheduled = network("ours").double(), network("ours").double()
    rate, decay = 0.1, 0.5
    optimizers = [
        torch.optim.SGD(wn_kernels.param_groups(net, 0.0), lr=rate) for net in (decayed, scheduled)
    ]
    for group in optimizers[0].param_groups:
        group["weight_decay"] = decay if group["name"] == "directions" else 0.0
    for step in range(10):
        for group in optimizers[1].param_groups:
            if group["name"] == "directions":
                group["lr"] = rate / (1 - rate * decay) ** (2 * step + 1)
        losses = []
        for net, optimizer in zip((decayed, scheduled), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(net(torch.arange(5)).square().sum())
            losses[-1].backward()
            optimizer.step()
        assert_matches(losses[0], losses[1].detach(), torch.float64, 64, roundings=64)
    factor = (1 - rate * decay) ** 10
    v = scheduled[1].weight_v.detach() * factor
    assert_matches(decayed[1].weight_v, v, torch.float64, 64, roundings=64)


# --- bounded weight norm -------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_fixed_magnitudes_are_the_formula_of_the_paper(kind, form):
    """`ρ = ‖g‖₂ / √N`, so that `‖W‖` stays, and no gradient reaches `g`."""
    layer, x = made(kind, form)
    dim = LAYERS[kind][3]
    g, v = parts(layer)
    rho = g.square().sum().sqrt() / math.sqrt(g.numel())
    size = effective(layer, dim).square().sum()
    old = v.clone()
    (value,) = wn_kernels.fix_magnitudes_(layer).values()
    assert_matches(torch.tensor(value, dtype=torch.float64), rho.detach(), torch.float64, 16)
    assert_matches(g, rho.detach().expand_as(g), torch.float64, 16)
    assert_matches(effective(layer, dim).square().sum(), size, torch.float64, 64)
    assert_same_bits(v, old)
    layer(x).square().sum().backward()
    assert g.grad is None
    assert v.grad.norm() > 0
    assert wn_kernels.fix_magnitudes_(layer, 2.0) == {"": 2.0}
    assert_matches(g, torch.full_like(g, 2.0), torch.float64, 1)
    with pytest.raises(ValueError, match="value is nan; expected a finite number"):
        wn_kernels.fix_magnitudes_(layer, math.nan)


# --- forced weight norm --------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_renormalised_directions_are_the_formula_of_the_paper(kind, form):
    """`V_j ← norm · V_j / ‖V_j‖`, and the layer computes what it did."""
    layer, x = made(kind, form)
    dim = LAYERS[kind][3]
    g, v = parts(layer)
    y, old_g, old_v = layer(x).detach(), g.clone(), v.detach().clone()
    entries = torch.tensor(old_v.numel() / g.numel(), dtype=torch.float64).sqrt()
    n = norms(layer, dim)
    for norm, size in ((1.0, 1.0), ("rms", entries), (0.25, 0.25), ({"": 3 * n}, 3 * n)):
        wn_kernels.renormalize_(layer, norm)
        assert_matches(v, old_v / n * size, torch.float64, 64)
    assert_same_bits(g, old_g)
    assert_matches(layer(x), y, torch.float64, 64, roundings=8)
    assert_matches(wn_kernels.slice_norms(layer)[""], 3 * n, torch.float64, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_renormalised_in_other_dtypes(dtype):
    """One rounding of `V`; in half precision the norms are wider."""
    layer, _ = made("2d", "ours", dtype)
    with torch.no_grad():
        layer.weight_v.mul_(100)  # the squares of a slice overflow float16
    old, n = layer.weight_v.detach().double(), norms(layer, 0)
    wn_kernels.renormalize_(layer)
    assert layer.weight_v.dtype == dtype
    assert_matches(layer.weight_v, old / n, dtype, 64)


def test_renormalised_after_each_step():
    """The norms of a training stay; without it they grow, since a gradient is orthogonal to `V`."""
    sizes = {}
    for forced in (False, True):
        net = network("fused parametrizations").double()
        initial = wn_kernels.slice_norms(net)
        optimizer = torch.optim.SGD(wn_kernels.param_groups(net), lr=0.1)
        if forced:
            optimizer.register_step_post_hook(
                lambda *_, n=net, i=initial: wn_kernels.renormalize_(n, i)
            )
        for _ in range(10):
            optimizer.zero_grad()
            net(torch.arange(5)).square().sum().backward()
            optimizer.step()
        sizes[forced] = wn_kernels.slice_norms(net)
    assert list(sizes[True]) == ["1", "3"]
    for name, n in initial.items():
        assert_matches(sizes[True][name], n, torch.float64, 64)
        assert (sizes[False][name] > n).all()
        assert (sizes[False][name] > 1.001 * n).any()


def test_slices_of_norm_zero_and_extreme_ones():
    """Zeros stay; what float32 cannot square is not lost, and is right the second time."""
    layer = wn_kernels.WNLinear(6, 4)
    with torch.no_grad():
        layer.weight_v[0] = 0
        layer.weight_v[1] *= 1e-28
        layer.weight_v[2] *= 1e25
    wanted = layer.weight_v.detach().double()
    wanted[1:] /= reference.norms(wanted, 0, 0.0)[1:]
    for _ in range(2):
        wn_kernels.renormalize_(layer)
    assert_zero(layer.weight_v[0])
    assert_matches(layer.weight_v[1:], wanted[1:], torch.float32, 16, roundings=4)


def test_renormalize_leaves_the_rest_alone():
    """What is frozen or computed, and what is not weight-normed."""
    torch.manual_seed(0)
    net = nn.Sequential(wn_kernels.WNLinear(6, 4), stacked(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    net[0].weight_v.requires_grad_(False)
    before = {key: t.clone() for key, t in net.state_dict().items()}
    wn_kernels.renormalize_(net)
    for key, t in net.state_dict().items():
        if before[key].any():
            assert_same_bits(t, before[key], key)
    wn_kernels.renormalize_(nn.Linear(2, 2))  # there is nothing to do


def test_renormalize_rejects():
    layer = wn_kernels.WNLinear(6, 4)
    old = layer.weight_v.detach().clone()
    for norm in (0, -1.0, math.inf, math.nan, "l1", None):
        with pytest.raises(ValueError, match="expected a positive number"):
            wn_kernels.renormalize_(layer, norm)
    with pytest.raises(ValueError, match="norm has no entry for '0'"):
        wn_kernels.renormalize_(nn.Sequential(layer), {})
    with pytest.raises(ValueError, match=r"the norms of '0' have shape \(4,\), expected \(4, 1\)"):
        wn_kernels.renormalize_(nn.Sequential(layer), {"0": torch.ones(4)})
    for number in (0.0, -1.0, math.nan, "1"):
        with pytest.raises(ValueError, match=r"the norm of .0. is .*; expected a positive number"):
            wn_kernels.renormalize_(nn.Sequential(layer), {"0": number})
    for number, message in ((-1.0, "not positive"), (math.inf, "not positive"), (0.0, "is zero")):
        norms = torch.ones(4, 1)
        norms[2] = number
        with pytest.raises(ValueError, match=f"a norm of '0' {message}|a norm of '0' is {message}"):
            wn_kernels.renormalize_(nn.Sequential(layer), {"0": norms})
    with pytest.raises(TypeError, match="model must be"):
        wn_kernels.renormalize_(layer.weight_v)
    assert_same_bits(layer.weight_v, old)


def test_renormalize_to_numbers_by_name():
    """A slice of zeros has a norm of zero, and keeps it."""
    layers = nn.Sequential(wn_kernels.WNLinear(6, 4), wn_kernels.WNLinear(4, 3))
    with torch.no_grad():
        layers[1].weight_v[0] = 0
    norms = wn_kernels.slice_norms(layers)
    old = layers[1].weight_v.detach().clone()
    with torch.no_grad():
        layers[1].weight_v.mul_(3)
    wn_kernels.renormalize_(layers, {"0": 2.0, "1": norms["1"]})
    wide = layers[0].weight_v.detach().double().norm(dim=1)
    assert_matches(wide.float(), torch.full((4,), 2.0, dtype=torch.float64), torch.float32, 6)
    assert_matches(layers[1].weight_v.detach(), old.double(), torch.float32, 4)
    assert layers[1].weight_v[0].count_nonzero() == 0


def test_numbers_that_are_none():
    layer = wn_kernels.WNLinear(6, 4)
    with pytest.raises(TypeError, match="value must be a number or None, got str"):
        wn_kernels.fix_magnitudes_(layer, "1")
    with pytest.raises(ValueError, match="weight_decay is 'x'; expected a number"):
        wn_kernels.param_groups(layer, weight_decay="x")
    assert layer.weight_g.requires_grad


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_norms_of_g_make_v_the_weight(kind, form):
    """A step of SGD then changes `V` as it would change `W`, but for what is parallel to it."""
    layer, _ = made(kind, form)
    g, v = parts(layer)
    weight = effective(layer, LAYERS[kind][3])
    wn_kernels.renormalize_(layer, "g")
    assert_matches(v, weight, torch.float64, 64)
    with torch.no_grad():
        g.view(-1)[0] = 0
    wn_kernels.renormalize_(layer, "g")
    assert_matches(v, weight, torch.float64, 64)


@pytest.mark.parametrize("norm", [1.0, "rms", "initial"])
def test_one_launch_renormalizes_all_layers(norm, device, monkeypatch):
    """The kernel of a group writes over the `V` that it reads. A slice of zeros stays one."""
    launch = pytest.importorskip("wn_kernels.backends.triton.launch")
    launched, make = [], launch.Launcher.__call__

    def counted(self, *tensors):
        launched.append(self)
        make(self, *tensors)

    monkeypatch.setattr(launch.Launcher, "__call__", counted)
    forms = itertools.cycle(FORMS)
    layers = [made(kind, next(forms), torch.float32)[0] for kind in LAYERS]
    net = nn.Sequential(*layers).to(device)
    net.append(wn_kernels.WNLinear(5000, 3, device=device))  # a program walks one slice
    with torch.no_grad():
        net[-1].weight_v[1] = 0
    initial = wn_kernels.slice_norms(net)
    found = [(x.tensors[1], x.dim) for x in normed.weights(net)]
    old = [v.detach().clone() for v, _ in found]
    versions = [v._version for v, _ in found]
    given = {name: 2 * n for name, n in initial.items()} if norm == "initial" else norm
    for _ in range(2):
        launched.clear()
        with wn_kernels.use_backend("triton"):
            wn_kernels.renormalize_(net, given)
        assert len(launched) == 1
    for before, version, (v, dim), n in zip(old, versions, found, initial.values(), strict=True):
        size = 2 * n.double() if norm == "initial" else 1.0
        if norm == "rms":
            size = math.sqrt(v.numel() / n.numel())
        own = reference.norms(before.double(), dim, 0.0)  # infinity for zeros
        assert_matches(v, before.double() / own * size, torch.float32, 5000, roundings=4)
        assert v._version > version


def test_few_dispatches():
    """One reduction for each `V`, and four operations for all of them."""
    names = []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.__name__)
            return function(*args, **kwargs or {})

    net = nn.Sequential(*[wn_kernels.WNLinear(6, 6) for _ in range(10)])
    twin = copy.deepcopy(net)
    wn_kernels.renormalize_(net)
    with Counter():
        wn_kernels.renormalize_(twin)
    assert sum(name.startswith("_foreach") for name in names) == 4
    assert len(names) == 10 * 2 + 4
    assert_same_bits(twin[0].weight_v, net[0].weight_v)


# --- other norms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_layers_with_other_norms(norm, dim):
    """‖V‖ is l2 for all tools but `renormalize_(model, "g")`, and none of them changes ‖W‖."""
    torch.manual_seed(0)
    layer = wn_kernels.WNLinear(6, 5, dim=dim, norm=norm, dtype=torch.float64)
    with torch.no_grad():
        layer.weight_g.mul_(torch.rand_like(layer.weight_g) + 0.5)
    weight = layer.weight.detach()
    for wanted in (1.0, "rms", "g"):
        wn_kernels.renormalize_(layer, wanted)
        assert_matches(layer.weight, weight, torch.float64, 64)
        if wanted == 1.0:
            (n,) = wn_kernels.slice_norms(layer).values()
            assert_matches(n, torch.ones_like(n), torch.float64, 64)
    assert_matches(layer.weight_v, weight, torch.float64, 64)
    (rho,) = wn_kernels.fix_magnitudes_(layer).values()
    assert_matches(layer.weight.norm(), weight.norm(), torch.float64, 64)
    assert_matches(layer.weight_g, torch.full_like(layer.weight_g, rho), torch.float64, 1)

"""Initialisations give what their papers' formulas say, in every form that a layer may have."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize, prune

import wn_kernels
from tests.comparison import assert_matches, assert_same_bits, assert_zero
from tests.compatibility import processes
from tests.convert.layers import stacked
from tests.forms import FORMS, LAYERS, by_channel, effective, made, normalised, parts, plain
from wn_kernels import init

BY_OUTPUT = ["linear", "1d", "1d, unbatched", "2d", "3d", "up, by output"]


def unit(v, dim):
    """`V / ‖V‖`."""
    others = [d for d in range(v.ndim) if d != dim]
    return v / v.square().sum(others, keepdim=True).sqrt()


def network(form="ours", dtype=torch.float64, bias=True):
    """A convolution, a transposed one, a linear layer, and an input for them."""
    torch.manual_seed(0)
    options = {"bias": bias, "dtype": dtype}
    net = nn.Sequential(
        normalised(nn.Conv1d(3, 8, 3, **options), form),
        nn.BatchNorm1d(8, dtype=dtype),
        nn.ReLU(),
        nn.Dropout(0.2),
        normalised(nn.ConvTranspose1d(8, 4, 4, stride=2, groups=2, **options), form),
        nn.Tanh(),
        nn.Flatten(),
        normalised(nn.Linear(72, 5, **options), form),
    )
    return net, torch.randn(12, 3, 10, dtype=dtype) + 1


def state(net):
    return {key: t.clone() for key, t in net.state_dict().items()}


def assert_same_state(net, before):
    for key, t in net.state_dict().items():
        if (before[key] != 0).any():
            assert_same_bits(t, before[key], key)
        else:
            assert_zero(t, key)


def assert_same_layers(net, twin):
    """Equality, but for the order of sums."""
    pairs = zip(net.named_parameters(), twin.parameters(), strict=True)
    for key, p, q in [(key, p, q) for (key, p), q in pairs if not key.startswith("1.")]:
        assert_matches(p, q.detach(), torch.float64, 256, roundings=16, what=key)


# --- data-dependent ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", BY_OUTPUT)
def test_is_the_formula_of_the_paper(kind, form):
    """`g = 1 / σ[t]`, `b = −μ[t] / σ[t]`, with `t = V x / ‖V‖`; `V` stays."""
    layer, x = made(kind, form)
    v = parts(layer)[1].clone()
    t = by_channel(layer, plain(layer, x, unit(v, LAYERS[kind][3])))
    sigma, mu = t.std(1, correction=0), t.mean(1)
    init.data_dependent_(layer, x)
    assert_matches(parts(layer)[0].flatten(), 1 / sigma, torch.float64, 64, roundings=8)
    assert_matches(layer.bias, -mu / sigma, torch.float64, 64, roundings=8)
    assert_same_bits(parts(layer)[1], v)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_pre_activations_are_normalised(kind, form):
    """Whatever `dim` is, what the layer computes is `(t − μ[t]) / σ[t]`, of the weight it had."""
    layer, x = made(kind, form)
    dim = LAYERS[kind][3]
    t, bias = plain(layer, x, effective(layer, dim)), layer.bias.detach().clone()
    rows = by_channel(layer, t)
    wanted = (rows - rows.mean(1, keepdim=True)) / rows.std(1, correction=0, keepdim=True)
    (line,) = init.data_dependent_(layer, x)
    assert_matches(by_channel(layer, layer(x)), wanted, torch.float64, 256, roundings=8)
    assert_matches(effective(layer, dim), layer.weight.detach(), torch.float64, 64)
    before = rows + bias.unsqueeze(1)
    assert_matches(line.before.mean, before.mean(1), torch.float64, 256, roundings=8)
    assert_matches(line.before.variance, before.var(1, correction=0), torch.float64, 256)
    assert_matches(line.after.variance, torch.ones_like(rows[:, 0]), torch.float64, 256)
    assert line.after.mean.abs().max() < 1e-12
    assert line.note == ""


def test_several_batches_are_pooled():
    """They give what one batch of all samples gives. Batches may differ in size."""
    one, x = network()
    several = copy.deepcopy(one)
    for net in (one, several):
        net.eval()
    init.data_dependent_(one, x)
    report = init.data_dependent_(several, iter([x[:3], (x[3:4],), {"input": x[4:]}]))
    assert_same_layers(several, one)
    for line in report:
        assert_matches(line.after.variance, torch.ones_like(line.after.mean), torch.float64, 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    """Every layer's moments after it are those of the dtype's rounding."""
    net, x = network(dtype=dtype)
    net.eval()
    for line in init.data_dependent_(net, x):
        ones = torch.ones_like(line.after.variance)
        assert_matches(line.after.variance, ones, dtype, 256, roundings=8)
        assert line.after.mean.abs().max() < 8 * torch.finfo(dtype).eps


def test_everything_else_stays():
    net, x = network()
    net[2].train(False)
    net[0].register_forward_hook(lambda *_: None)
    net[4].weight_v.grad = torch.ones_like(net[4].weight_v)
    buffers = {key: t.clone() for key, t in net.named_buffers()}
    flags = [m.training for m in net.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    random = torch.get_rng_state()
    init.data_dependent_(net, x)
    assert_same_bits(torch.get_rng_state(), random)
    for key, t in net.named_buffers():
        if buffers[key].any():
            assert_same_bits(t, buffers[key], key)
        else:
            assert_zero(t, key)
    assert [m.training for m in net.modules()] == flags
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()] == hooks
    assert net[4].weight_v.grad.sum() == net[4].weight_v.numel()
    assert all(p.requires_grad for p in net.parameters())


def test_a_failed_pass_changes_nothing():
    net, x = network()
    net.append(nn.Linear(3, 3))  # does not fit
    before = state(net)
    with pytest.raises(RuntimeError):
        init.data_dependent_(net, x)
    assert_same_state(net, before)
    net = net[:-1]
    with pytest.raises(ValueError, match="pre-activations of 0 are not finite"):
        init.data_dependent_(net, x * math.inf)
    with pytest.raises(ValueError, match=r"7 gives too few values per channel \(1\)"):
        init.data_dependent_(net.eval(), x[:1])
    assert_same_state(net, before)


class Repeated(nn.Module):
    """A layer that runs twice, one that does not run, one with its own forward."""

    def __init__(self):
        super().__init__()
        self.twice = wn_kernels.WNLinear(6, 6, dtype=torch.float64)
        self.never = wn_kernels.WNLinear(6, 6, dtype=torch.float64)
        self.own = stacked()
        self.rnn = nn.utils.parametrizations.weight_norm(nn.LSTM(6, 6), "weight_hh_l0")

    def forward(self, x):
        return self.twice(self.twice(x).relu())


def test_a_layer_that_runs_twice_is_set_at_its_first_use():
    torch.manual_seed(0)
    net, x = Repeated(), torch.randn(16, 6, dtype=torch.float64)
    alone, before = copy.deepcopy(net.twice), state(net)
    report = {line.name: line for line in init.data_dependent_(net, x)}
    init.data_dependent_(alone, x)
    assert_same_bits(net.twice.weight_g, alone.weight_g)
    assert_same_bits(net.twice.bias, alone.bias)
    assert report["twice"].after.count == 32
    notes = {name: line.note for name, line in report.items() if line.note}
    assert notes == {
        "never": "no batch reached it",
        "own": "a second parametrization of the tensor",
        "rnn.weight_hh_l0": "its own forward",
    }
    after = net.state_dict()
    assert_same_bits(after["never.weight_g"], before["never.weight_g"])
    assert "no batch reached it" in str(init.data_dependent_(net, x))


@pytest.mark.parametrize("form", FORMS)
def test_frozen_layers_and_layers_without_bias(form):
    """What is frozen keeps its bits; what is not is set as far as it can be."""
    layer, x = made("linear", form)
    g, _ = parts(layer)
    t = by_channel(layer, plain(layer, x, effective(layer, 0)))
    g.requires_grad_(False)
    old = g.clone()
    (line,) = init.data_dependent_(layer, x)
    assert line.note == "frozen: bias only"
    assert_same_bits(g, old)
    assert_matches(layer.bias, -t.mean(1), torch.float64, 64)
    layer.bias.requires_grad_(False)
    assert init.data_dependent_(layer, x)[0].note == "frozen"
    g.requires_grad_(True)
    assert init.data_dependent_(layer, x)[0].note == "frozen bias: scale only"
    assert_matches(layer.bias, -t.mean(1), torch.float64, 64)
    ones = torch.ones_like(layer.bias)
    assert_matches(by_channel(layer, layer(x)).var(1, correction=0), ones, torch.float64, 64)
    layer, x = made("up", form, bias=False)
    (line,) = init.data_dependent_(layer, x)
    assert line.note == "no bias: scale only"
    assert_matches(line.after.variance, torch.ones_like(line.after.mean), torch.float64, 256)


def test_constant_channels_keep_their_scale():
    layer, x = made("linear", "ours")
    layer.weight_v.data[2] = 0
    layer.weight_v.data[2, 0] = 1
    x[:, 0] = 3
    old = layer.weight_g[2].item()
    (line,) = init.data_dependent_(layer, x)
    assert line.note == "scale kept of 1 constant channel"
    assert layer.weight_g[2].item() == old
    assert line.after.mean.abs().max() < 1e-12
    assert line.after.variance[2] < 1e-12


def test_pruned_layers_are_left_alone():
    layer, x = made("linear", "parametrizations")
    prune.l1_unstructured(layer.parametrizations.weight, "original1", 5)
    before = state(layer)
    (line,) = init.data_dependent_(layer, x)
    assert line.note == "its g or v is itself computed"
    assert_same_state(layer, before)


def test_pytorchs_own_attribute_is_current():
    """The older form keeps the weight as an attribute, from which gradients reach `g` and `v`."""
    layer, x = made("linear", "weight_norm")
    init.data_dependent_(layer, x)
    assert_matches(layer.weight, effective(layer, 0), torch.float64, 64)
    layer.weight.sum().backward()
    assert layer.weight_g.grad is not None


def test_a_compiled_model():
    """It runs as it was written: a program of one graph could not read the moments."""
    net, x = network()
    twins = [copy.deepcopy(net) for _ in range(2)]
    init.data_dependent_(torch.compile(net, backend="eager"), x)
    twins[1][0].compile(backend="eager", fullgraph=True)
    for twin in twins:
        init.data_dependent_(twin, x)
        assert_same_state(net, twin.state_dict())


def test_rejects_what_it_cannot_use():
    net, x = network()
    with pytest.raises(TypeError, match="model must be"):
        init.data_dependent_(x, net)
    with pytest.raises(TypeError, match=r"batch must be a tensor, .* got int"):
        init.data_dependent_(net, 3)
    with pytest.raises(ValueError, match="batch is empty"):
        init.data_dependent_(net, [])
    with parametrize.cached(), pytest.raises(RuntimeError, match="cannot be initialised"):
        init.data_dependent_(net, x)
    with pytest.raises(ValueError, match="0 has no shape yet: run the model once"):
        init.data_dependent_(nn.Sequential(wn_kernels.WNLazyLinear(3)), x)


def parallel(rank, wrapped):
    net, x = network()
    net.eval()
    twin = copy.deepcopy(net)
    init.data_dependent_(twin, x)
    own = [x[:2], x[2:5]] if rank else x[5:]
    if wrapped:
        report = init.data_dependent_(DistributedDataParallel(net), own)
    else:
        report = init.data_dependent_(net, own, process_group=torch.distributed.group.WORLD)
    assert_same_layers(net, twin)
    assert report[0].after.count == 12 * 8


@pytest.mark.parametrize("wrapped", [True, False])
def test_processes_pool_their_statistics(wrapped, tmp_path):
    """Two processes with different batches set what one sets with all of them."""
    processes.run(tmp_path, parallel, wrapped)


# --- without data --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_norm_preserving_is_the_formula_of_the_paper(kind, form):
    """`g = √(γ · fan_in / fan_out)` by output; `‖W‖² = γ · in_channels` for every `dim`."""
    layer, _ = made(kind, form)
    _, (rows, *_), options, dim, _ = LAYERS[kind]
    gain = {"": 1 / 3} if form != "ours" else None
    (value,) = init.norm_preserving_(layer, gain).values()
    gamma = 2.0 if gain is None else 1 / 3
    g, v = parts(layer)
    if dim == 0 and not getattr(layer, "transposed", False):
        fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(v)
        fan_in *= options.get("groups", 1)
        wanted = torch.full_like(g, math.sqrt(gamma * fan_in / fan_out), dtype=torch.float64)
        assert_matches(g, wanted, torch.float64, 1)
    size = effective(layer, dim).square().sum()
    assert_matches(size, torch.tensor(gamma * rows, dtype=torch.float64), torch.float64, 64)
    assert value == g.flatten()[0].item()
    assert_zero(layer.bias)
    flat = v.flatten(1) if len(v) <= v[0].numel() else v.flatten(1).T
    assert_matches(flat @ flat.T, torch.eye(len(flat), dtype=torch.float64), torch.float64, 64)


@pytest.mark.parametrize("kind", ["1d", "up", "up 2d", "2d"])
def test_norms_are_preserved_in_expectation(kind):
    """Over many directions `V` drawn at random, a layer with γ = 1 keeps the mean square of the
    norm. A stride of a convolution loses what it skips, and padding is not an input."""
    torch.manual_seed(0)
    cls, (rows, columns, taps), options, dim, _ = LAYERS[kind]
    options = {**options, "padding": 0} if kind.startswith("up") else {"groups": 1}
    ratios = []
    for _ in range(60):
        layer = normalised(cls(rows, columns, taps, **options, dtype=torch.float64), "ours", dim)
        with torch.no_grad():
            layer.weight_v.normal_()
        init.norm_preserving_(layer, {"": 1.0}, orthogonal=False)
        x = torch.zeros(4, rows, *[9] * (layer.weight_v.ndim - 2), dtype=torch.float64)
        x[(..., *[slice(3, 6)] * (x.ndim - 2))] = 1  # no border takes part
        x *= torch.randn_like(x)
        layer.bias.data.zero_()
        ratios.append(layer(x).square().sum().item() / x.square().sum().item())
    mean = torch.tensor(ratios).mean().item()
    error = torch.tensor(ratios).std().item() / math.sqrt(len(ratios))
    assert error < 0.08
    assert abs(mean - 1) < 4 * error


def test_a_deep_network_keeps_its_norm():
    """With γ = 2, twenty layers and their ReLUs keep it within a factor of two; PyTorch's
    initialisation loses it."""
    torch.manual_seed(0)
    layers = [wn_kernels.WNLinear(64, 64) for _ in range(20)]
    net = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())])
    x = torch.randn(50, 64)
    assert net(x).norm() < 0.1 * x.norm()
    init.norm_preserving_(net)
    assert 0.5 < net(x).norm() / x.norm() < 2


def test_gains_are_chosen_by_name():
    net, _ = network("fused parametrizations")
    values = init.norm_preserving_(net, {"*": 1.0, "7": 0.25})
    assert values == {"0": math.sqrt(3 / 8), "4": 1.0, "7": math.sqrt(0.25 * 72 / 5)}
    before = state(net)
    for gains, message in ((3, "a mapping or None, got int"), ({0: 1.0}, "a name or a pattern")):
        with pytest.raises(TypeError, match=message):
            init.norm_preserving_(net, gains)
    with pytest.raises(ValueError, match="gain of '7' is 'a'; expected a positive number"):
        init.norm_preserving_(net, {"7": "a"})
    with pytest.raises(ValueError, match="'8' matches no weight-normed layer"):
        init.norm_preserving_(net, {"7": 1.0, "8": 1.0})
    with pytest.raises(ValueError, match="gain of '7' is -1; expected a positive number"):
        init.norm_preserving_(net, {"7": -1})
    with pytest.raises(TypeError, match="model must be"):
        init.norm_preserving_("net")
    assert_same_state(net, before)


def test_norm_preserving_leaves_the_rest_alone():
    """What is frozen, recurrent, or computed keeps its bits; half precision is drawn wider."""
    torch.manual_seed(0)
    net = Repeated()
    before = state(net)
    assert list(init.norm_preserving_(net)) == ["twice", "never"]
    for key, t in net.state_dict().items():
        if key.startswith(("own", "rnn")):
            assert_same_bits(t, before[key], key)
    layer, _ = made("linear", "ours", torch.float32)
    for p in layer.parameters():
        p.requires_grad_(False)
    before = state(layer)
    assert init.norm_preserving_(layer) == {}
    assert_same_state(layer, before)
    half, _ = made("linear", "ours", torch.bfloat16)
    init.norm_preserving_(half)
    eye = torch.eye(5, dtype=torch.float64)
    v = half.weight_v.double()
    assert_matches(v @ v.T, eye, torch.bfloat16, 6)


@pytest.mark.parametrize("norm", ["l1", "linf"])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_layers_with_other_norms(dim, norm):
    """Both initialisations give the weight that a layer with l2 gets."""
    x = torch.randn(20, 6, dtype=torch.float64)
    for initialise in (
        lambda layer: wn_kernels.init.data_dependent_(layer, x),
        lambda layer: wn_kernels.init.norm_preserving_(layer, {"": 1.5}),
    ):
        layers = []
        for kind in (norm, "l2"):
            torch.manual_seed(0)
            layers.append(wn_kernels.WNLinear(6, 5, dim=dim, norm=kind, dtype=torch.float64))
            initialise(layers[-1])
        assert_matches(layers[0].weight, layers[1].weight.detach(), torch.float64, 64)
        assert_matches(layers[0](x), layers[1](x).detach(), torch.float64, 64)

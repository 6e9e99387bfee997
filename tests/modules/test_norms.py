"""Layers whose slices have the norm l1 or linf: from the constructor to a state dict and back."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import wn_kernels
from tests.comparison import assert_matches, assert_same_bits
from wn_kernels.backends import reference
from wn_kernels.modules.norms import Norm

OTHERS = ["l1", "linf"]
KINDS = {
    "linear": (wn_kernels.WNLinear, (6, 5), {"dim": 1}, (3, 6)),
    "lazy": (wn_kernels.WNLazyLinear, (5,), {}, (3, 6)),
    "2d": (wn_kernels.WNConv2d, (4, 6, 3), {"groups": 2}, (2, 4, 5, 6)),
    "up": (wn_kernels.WNConvTranspose1d, (4, 6, 3), {"stride": 2, "dim": None}, (2, 4, 7)),
    "lstm": (wn_kernels.WNLSTM, (6, 4), {}, (5, 2, 6)),
    "gru cell": (wn_kernels.WNGRUCell, (6, 4), {"dim": None}, (2, 6)),
}


def made(kind, norm, seed=0, **more):
    cls, arguments, options, shape = KINDS[kind]
    torch.manual_seed(seed)
    layer = cls(*arguments, **options, norm=norm, **more)
    if kind == "lazy":
        layer(torch.zeros(shape))
    return layer, torch.randn(shape)


def output(layer, x):
    more = [x.new_ones(2, 4)] if isinstance(layer, nn.RNNCellBase) else []
    y = layer(x, *more)
    return y[0] if isinstance(y, tuple) else y


def right_weight(layer, name, norm):
    """By the definition, in float64 from autograd's operations."""
    g, v = (t.detach().double() for t in layer._tensors(name))
    return reference.weight_norm(v, g, layer.dim, 0.0, norm)


@pytest.mark.parametrize("norm", OTHERS)
@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_plain_layer(kind, norm):
    """From the same seed, and its gradients are those of the definition."""
    layer, x = made(kind, norm)
    plain, _ = made(kind, "l2")
    wn_kernels.fold(plain)
    assert f"norm={norm!r}" in repr(layer)
    assert_matches(output(layer, x), output(plain, x).double(), torch.float32, 64)
    for name in layer._normed():
        g, v = layer._tensors(name)
        with torch.no_grad():
            g.mul_(torch.rand_like(g) + 0.5)
            v.mul_(0.5)
        assert_matches(getattr(layer, name), right_weight(layer, name, norm), torch.float32, 24)
    found = torch.autograd.grad(output(layer, x).sin().sum(), [*layer.parameters()])
    wide = copy.deepcopy(layer).double()
    with wn_kernels.use_backend("reference"):
        wanted = torch.autograd.grad(output(wide, x.double()).sin().sum(), [*wide.parameters()])
    terms = max(grad.norm().item() for grad in wanted)
    for grad, right in zip(found, wanted, strict=True):
        assert_matches(grad, right, torch.float32, 128, scale=terms)


@pytest.mark.parametrize("norm", OTHERS)
@pytest.mark.parametrize("kind", KINDS)
def test_assigned_saved_and_copied(kind, norm):
    layer, x = made(kind, norm)
    weights = {name: torch.randn_like(getattr(layer, name)) for name in layer._normed()}
    for name, weight in weights.items():
        setattr(layer, name, weight)
        assert_matches(getattr(layer, name), weight.double(), torch.float32, 24)
        assert_matches(layer._tensors(name)[1], weight.double(), torch.float32, 1)
    y = output(layer, x).detach()
    plain = wn_kernels.state_dict(layer, "plain")
    for state in (layer.state_dict(), plain):
        other, _ = made(kind, norm, seed=1)
        other.load_state_dict(state)
        assert_matches(output(other, x), y.double(), torch.float32, 64)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert other.norm == norm
        assert_same_bits(output(other, x).detach(), y)
    wn_kernels.fold(layer)
    assert_matches(output(layer, x), y.double(), torch.float32, 64)
    assert not hasattr(layer, "norm")


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_were_pickled_without_a_norm(kind):
    """An earlier version has pickled them, and their norm was l2."""
    layer, x = made(kind, "l2")
    y = output(layer, x).detach()
    del layer.__dict__["norm"]
    other = pickle.loads(pickle.dumps(layer))
    assert other.norm == "l2"
    assert_same_bits(output(other, x).detach(), y)
    assert Norm(0, "weight_norm", "weight_g", "weight_v").norm == "l2"


@pytest.mark.parametrize("norm", OTHERS)
def test_weight_norm_of_a_module(norm):
    """It lasts through a copy; PyTorch has no such norm, but removes it."""
    torch.manual_seed(0)
    for layer, name, x in (
        (nn.Linear(6, 5), "weight", torch.randn(3, 6)),
        (nn.LSTM(6, 4), "weight_hh_l0", torch.randn(5, 2, 6)),
    ):
        y = output(layer, x).detach().double()
        model = nn.Sequential(wn_kernels.weight_norm(layer, name, norm=norm))
        g, v = layer._tensors(name)
        assert_matches(g, reference.norms(v.double(), 0, 0.0, norm), torch.float32, 6)
        assert f"norm={norm!r}" in repr(layer)
        for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_matches(output(other[0], x), y, torch.float32, 64)
        before = {key: t.clone() for key, t in model.state_dict().items()}
        with pytest.raises(ValueError, match=f"0 cannot be unfused.*{name} has norm='{norm}'"):
            wn_kernels.unfuse(model)
        assert {*model.state_dict()} == {*before}
        setattr(layer, name, 2 * v.detach())
        setattr(layer, name, v.detach() / 2)
        torch.nn.utils.remove_weight_norm(layer, name)
        assert type(layer) in (nn.Linear, nn.LSTM)
        assert_matches(output(layer, x), y, torch.float32, 64)


def test_a_change_of_the_norm_is_noticed():
    layer = wn_kernels.WNLinear(6, 5)
    with wn_kernels.frozen_weights(layer), torch.no_grad():
        before = layer.weight
        layer.norm = "l1"
        assert_matches(layer.weight, right_weight(layer, "weight", "l1"), torch.float32, 6)
        assert bool((layer.weight != before).any())


def test_what_is_refused():
    for make in (wn_kernels.WNLinear, wn_kernels.WNLSTM):
        with pytest.raises(ValueError, match=r"norm must be one of \['l2', 'l1', 'linf'\]"):
            make(6, 5, norm="l0")
    with pytest.raises(ValueError, match="norm must be one of"):
        wn_kernels.weight_norm(nn.Linear(2, 2), norm="max")
    with pytest.raises(ValueError, match="magnitude_preserving needs norm='l2'"):
        wn_kernels.WNLinear(6, 5, norm="l1", magnitude_preserving=True)

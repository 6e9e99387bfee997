"""Whole models: folding and the report; one module at a time."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import wn_kernels
from tests.comparison import assert_matches, assert_same_bits
from tests.convert.layers import (
    FORMS,
    LAYERS,
    Doubled,
    assert_computes_as,
    legacy,
    made,
    stacked,
)
from wn_kernels import plan

# --- folding -------------------------------------------------------------------------------------


def mixed():
    """Both of PyTorch's forms, fused and not, and a layer of this package, in one model."""
    torch.manual_seed(2)
    model = nn.Sequential(
        OrderedDict(
            old=legacy(nn.Linear(6, 5)),
            new=parametrizations.weight_norm(nn.Linear(5, 5), dim=1),
            own=wn_kernels.WNLinear(5, 5, dim=None),
            plain=nn.Linear(5, 4),
            custom=legacy(Doubled(4, 4)),
        )
    )
    return model, torch.randn(3, 6)


@pytest.mark.parametrize("fuse_first", [False, True])
def test_fold(fuse_first):
    model, x = mixed()
    if fuse_first:
        wn_kernels.fuse(model)
        model(x)
        other = copy.deepcopy(model)
    else:
        other = mixed()[0]
    right = model(x).detach()
    assert wn_kernels.fold(other) == ["old", "new", "own", "custom"]
    assert wn_kernels.fold(other) == []
    assert [type(layer) for layer in other] == [*[nn.Linear] * 4, Doubled]
    assert list(other.old.state_dict()) == ["weight", "bias"]
    assert not other._load_state_dict_pre_hooks
    assert_matches(other(x), right.double(), torch.float32, 64)
    assert_same_bits(model(x).detach(), right)
    assert list(model.old.state_dict()) == ["bias", "weight_g", "weight_v"]


def test_folded_weights_are_frozen_with_their_parts():
    model, _ = mixed()
    model.old.requires_grad_(False)
    wn_kernels.fold(model)
    assert not model.old.weight.requires_grad
    assert model.new.weight.requires_grad


def test_a_wrapped_layer_is_left_alone():
    """`fully_shard` derives a class from the layer's."""
    layer = made("linear", "parametrizations")[0]
    wn_kernels.fuse(layer)
    layer.__class__ = type("Sharded", (nn.Module, type(layer))[::-1], {})
    assert wn_kernels.fold(layer) == wn_kernels.unfuse(layer) == []
    assert type(layer).__name__ == "Sharded"


def test_what_cannot_be_folded():
    layer = stacked()
    assert wn_kernels.fold(layer) == []
    assert parametrize.is_parametrized(layer, "weight")
    after = parametrizations.weight_norm(parametrizations.orthogonal(nn.Linear(3, 3)))
    (line,) = wn_kernels.fuse(after)
    assert (line.path, line.note) == ("", "Orthogonal, WeightNorm")
    assert wn_kernels.fold(after) == []
    beside = parametrizations.weight_norm(nn.Linear(3, 3))
    parametrize.register_parametrization(beside, "bias", nn.Identity())
    right = beside.weight.detach()
    assert wn_kernels.fold(beside) == [""]
    assert parametrize.is_parametrized(beside, "bias")
    assert_matches(beside.weight, right.double(), torch.float32, 3)


# --- the report ----------------------------------------------------------------------------------


def test_report():
    model, x = mixed()
    model.add_module("spectral", parametrizations.spectral_norm(nn.Linear(4, 4)))
    model.add_module("stacked", stacked())
    model.add_module("memory", nn.Sequential(legacy(nn.LSTM(4, 3), "weight_hh_l0")))
    model.eval()  # a forward in training moves the spectral norm
    right = model[:-1](x).detach()
    recurrent = model.memory[0](torch.ones(2, 4))[0].detach()
    before = {name: type(module) for name, module in model.named_modules()}
    hooks = [type(hook) for m in model.modules() for hook in m._forward_pre_hooks.values()]
    report = wn_kernels.fuse(model, dry_run=True)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert [type(h) for m in model.modules() for h in m._forward_pre_hooks.values()] == hooks
    assert str(report) == str(wn_kernels.fuse(model))
    rows = {line.name: line for line in report}
    assert list(rows) == [
        *("old", "new", "own", "custom", "spectral", "stacked", "memory.0.weight_hh_l0"),
    ]
    backend = plan.serving(x)
    assert rows["old"].path.startswith(f"{backend}: ")
    assert rows["new"].dim == 1
    assert (rows["own"].path, rows["own"].note) == ("", "of this package")
    assert (rows["custom"].path, rows["custom"].note) == (f"{backend}: weight", "its own forward")
    assert (rows["spectral"].path, rows["spectral"].note) == ("", "SpectralNorm")
    assert rows["stacked"].note == "a second parametrization of the tensor"
    assert rows["memory.0.weight_hh_l0"].note == "one call for all of the layer"
    table = str(report)
    assert table.splitlines()[0].split() == ["layer", "class", "shape", "dim", "path", "note"]
    assert table.endswith("5 fused, 2 left alone")
    assert_matches(model[:-1](x), right.double(), torch.float32, 64)
    assert_matches(model.memory[0](torch.ones(2, 4))[0], recurrent.double(), torch.float32, 64)
    assert {line.note for line in wn_kernels.fuse(model)} == {
        "fused already",
        "of this package",
        "SpectralNorm",
    }
    assert wn_kernels.unfuse(model) == ["old", "new", "custom", "stacked", "memory.0"]
    assert_same_bits(model[:-1](x).detach(), right)
    assert wn_kernels.fold(model) == ["old", "new", "own", "custom", "memory.0"]


# --- one module ----------------------------------------------------------------------------------


def test_a_lazy_layer_without_a_shape():
    """It does not keep other layers from being fused."""
    model = nn.Sequential(wn_kernels.WNLazyLinear(5), legacy(nn.Linear(5, 4)))
    for options in ({"dry_run": True}, {"grouped": True}, {}):
        lazy, other = wn_kernels.fuse(model, **options)
        assert (lazy.shape, other.shape) == ((), (4, 5))
        assert "no shape yet" in lazy.note
    with pytest.raises(ValueError, match="weight of WNLazyLinear has no shape yet"):
        wn_kernels.state_dict(model, "plain")
    x = torch.randn(3, 6)
    y = model(x).detach()
    wn_kernels.fold(model)
    assert_matches(model(x), y.double(), torch.float32, 64)


@pytest.mark.parametrize("kind", LAYERS)
def test_weight_norm_of_one_module(kind):
    torch.manual_seed(0)
    make, shape, dim = LAYERS[kind]
    plain = make()
    twin = legacy(copy.deepcopy(plain), dim=dim)
    layer = wn_kernels.weight_norm(plain, dim=dim)
    assert layer is plain
    assert list(layer.state_dict()) == list(twin.state_dict())
    assert_computes_as(layer, twin, torch.randn(shape))
    assert wn_kernels.remove_weight_norm(layer) is layer
    assert type(layer) is type(make())
    assert_matches(layer.weight, twin.weight.detach(), torch.float32, 64)


@pytest.mark.parametrize("form", [*FORMS, "own"])
@pytest.mark.parametrize("is_fused", [False, True])
def test_remove_weight_norm_of_every_form(form, is_fused):
    layer = wn_kernels.WNLinear(6, 4) if form == "own" else made("linear", form)[0]
    if is_fused:
        wn_kernels.fuse(layer)
    layer(torch.zeros(6))  # PyTorch's hook sets the weight
    right = layer.weight.detach().double()
    wn_kernels.remove_weight_norm(layer)
    assert type(layer) is nn.Linear
    assert_matches(layer.weight, right, torch.float32, 6)
    with pytest.raises(ValueError, match="weight of Linear is not weight-normed"):
        wn_kernels.remove_weight_norm(layer)


def test_bad_weight_norm():
    for layer in (wn_kernels.WNLinear(3, 4), *(made("linear", form)[0] for form in FORMS)):
        with pytest.raises(RuntimeError, match=r"weight of .*Linear is weight-normed already"):
            wn_kernels.weight_norm(layer)
    with pytest.raises(AttributeError, match="Linear has no parameter 'w'"):
        wn_kernels.weight_norm(nn.Linear(3, 4), "w")
    with pytest.raises(ValueError, match="weight of LazyLinear has no shape yet"):
        wn_kernels.weight_norm(nn.LazyLinear(4))
    plain = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="dim=2 is out of range"):
        wn_kernels.weight_norm(plain, dim=2)
    assert list(plain.state_dict()) == ["weight", "bias"]


def test_two_tensors_of_one_module():
    torch.manual_seed(0)
    layer = nn.LSTM(4, 3)
    twin = copy.deepcopy(layer)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        wn_kernels.weight_norm(layer, name)
        legacy(twin, name)
    x = torch.randn(5, 4)
    assert_matches(layer(x)[0], twin.double()(x.double())[0].detach(), torch.float32, 64)
    layer(x)[0].sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert wn_kernels.fold(layer) == [""]
    assert set(layer.state_dict()) == set(nn.LSTM(4, 3).state_dict())

"""Removal of weight norm by every function that does it, from every form."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import wn_kernels
from tests.comparison import assert_matches, assert_same_bits
from tests.convert.layers import FORMS, NORMALISE

# Plain layer, input, the tensors that are normalised.
PLAIN = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6), ["weight"]),
    "1d": (lambda: nn.Conv1d(6, 4, 3, padding=1), (2, 6, 9), ["weight"]),
    "2d": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 6, 5), ["weight"]),
    "up": (lambda: nn.ConvTranspose1d(6, 4, 4, stride=2), (2, 6, 5), ["weight"]),
    "embedding": (lambda: nn.Embedding(5, 3), None, ["weight"]),
    "rnn": (lambda: nn.RNN(6, 4), (5, 6), ["weight_hh_l0"]),
    "lstm": (
        lambda: nn.LSTM(6, 4, 2, bidirectional=True),
        (5, 6),
        ["weight_ih_l0", "weight_hh_l0", "weight_hh_l1_reverse"],
    ),
    "gru": (lambda: nn.GRU(6, 4), (5, 6), ["weight_ih_l0", "weight_hh_l0"]),
    "cell": (lambda: nn.LSTMCell(6, 4), (3, 6), ["weight_ih"]),
}
OWN = {
    "linear": lambda: wn_kernels.WNLinear(6, 4, eps=1e-6),
    "1d": lambda: wn_kernels.WNConv1d(6, 4, 3, padding=1, dim=2),
    "2d": lambda: wn_kernels.WNConv2d(3, 4, 3, dim=None),
    "up": lambda: wn_kernels.WNConvTranspose1d(6, 4, 4, stride=2, dim=1),
}
NORMALISED_BY = {**NORMALISE, "wn_kernels.weight_norm": wn_kernels.weight_norm}
SUBJECTS = [(kind, form) for kind in PLAIN for form in NORMALISED_BY]
SUBJECTS += [(kind, "own") for kind in OWN]


def subject(kind, form, frozen=False):
    """A layer that computes with this package, in a model, the layer's input, and its tensors."""
    torch.manual_seed(1)
    make, shape, names = PLAIN[kind]
    layer = OWN[kind]() if form == "own" else make()
    for name in names if form != "own" else ():
        NORMALISED_BY[form](layer, name)
    for name, p in layer.named_parameters():
        if name.endswith(("_g", "original0")):
            p.data.mul_(torch.rand_like(p) + 0.5)
    layer.requires_grad_(not frozen)
    model = nn.Sequential(layer)
    wn_kernels.fuse(model)
    return model, torch.tensor([0, 3]) if shape is None else torch.randn(shape), names


def output(model, x):
    y = model(x)
    return y[0] if isinstance(y, tuple) else y


def remove_each(function):
    def remove(model, names):
        for name in names:
            function(model[0], name)

    return remove


REMOVALS = {
    "torch.nn.utils.remove_weight_norm": remove_each(nn.utils.remove_weight_norm),
    "remove_parametrizations": remove_each(parametrize.remove_parametrizations),
    "wn_kernels.remove_weight_norm": remove_each(wn_kernels.remove_weight_norm),
    "fold": lambda model, names: wn_kernels.fold(model),
}


def assert_plain(model, kind, frozen):
    """The layer is torch.nn's in every respect, and trains."""
    layer, plain = model[0], PLAIN[kind][0]()
    assert type(layer) is type(plain)
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert list(layer._parameters) == list(plain._parameters)
    assert layer._buffers.keys() == plain._buffers.keys()
    assert layer._modules == {}
    assert not list(layer._forward_pre_hooks.items())
    assert not layer._load_state_dict_pre_hooks
    assert {p.requires_grad for p in layer.parameters()} == {not frozen}
    assert not any(p.is_inference() for p in layer.parameters())
    assert not parametrize.is_parametrized(layer)
    assert b"wn_kernels" not in pickle.dumps(layer)


# Every layer, and those that differ in what is registered or kept where gradients are off.
CASES = [
    (kind, form, context)
    for kind, form in SUBJECTS
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode)
    if context is torch.enable_grad or kind in ("linear", "up", "gru", "cell")
]


@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize(("kind", "form", "context"), CASES)
def test_every_removal_of_every_form(kind, form, context, removal):
    for frozen in (False, True):
        model, x, names = subject(kind, form, frozen)
        right = output(copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x)
        with context():
            output(model, x)
            REMOVALS[removal](model, names)
        assert_plain(model, kind, frozen)
        assert_matches(output(model, x), right.detach(), torch.float32, 64, roundings=8)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_same_bits(output(other, x).detach(), output(model, x).detach())
        if not frozen:
            output(model, x).square().sum().backward()
            assert all(getattr(model[0], name).grad.norm() > 0 for name in names)
        model.load_state_dict(nn.Sequential(PLAIN[kind][0]()).state_dict())


@pytest.mark.parametrize("removal", list(REMOVALS)[:3])
@pytest.mark.parametrize("form", [*NORMALISED_BY, "own"])
def test_one_removal_is_not_two(form, removal):
    """Of several layers, one; of several tensors, one; and not a second time."""
    model, x, names = subject("linear", form)
    other = copy.deepcopy(model)
    keys = list(other.state_dict())
    REMOVALS[removal](model, names)
    with pytest.raises(ValueError, match="weight"):
        REMOVALS[removal](model, names)
    assert list(other.state_dict()) == keys
    wide = copy.deepcopy(model).double()(x.double()).detach()
    assert_matches(other(x), wide, torch.float32, 64)
    if form == "own":
        return
    model, x, names = subject("lstm", form)
    right = output(copy.deepcopy(model).double(), x.double()).detach()
    REMOVALS[removal](model, names[1:2])
    rest = [name for name in names if name != names[1]]
    assert set(dict(model[0].named_parameters())) > {names[1]}
    for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_matches(output(again, x), right, torch.float32, 64, roundings=8)
        REMOVALS[removal](again, rest)
        assert_plain(again, "lstm", frozen=False)
        assert_matches(output(again, x), right, torch.float32, 64, roundings=8)


@pytest.mark.parametrize("form", [*NORMALISED_BY, "own"])
def test_removal_beside_hooks_of_the_user(form):
    """Hooks stay registered, can be removed by whoever registered them, and run in between."""
    for removal in list(REMOVALS)[:3]:
        calls = []
        torch.manual_seed(1)
        make = OWN["1d"] if form == "own" else PLAIN["1d"][0]
        layer = make() if form == "own" else NORMALISED_BY[form](make())
        before = layer.register_forward_pre_hook(lambda *_: calls.append("before"))  # noqa: B023
        model = nn.Sequential(layer)
        wn_kernels.fuse(model)
        after = layer.register_forward_pre_hook(lambda *_: calls.append("after"))  # noqa: B023
        x = torch.randn(2, 6, 9)
        right = copy.deepcopy(model).double()(x.double()).detach()
        calls.clear()
        assert_matches(model(x), right, torch.float32, 64)
        assert calls == ["before", "after"]
        REMOVALS[removal](model, ["weight"])
        assert type(layer) is nn.Conv1d
        calls.clear()
        assert_matches(model(x), right, torch.float32, 64)
        assert calls == ["before", "after"]
        before.remove()
        after.remove()
        model(x)
        assert calls == ["before", "after"]
        assert not list(layer._forward_pre_hooks.items())


def test_a_forward_has_no_hooks_to_run():
    """PyTorch's `__call__` goes straight to `forward` where no hook is registered."""
    layers = [wn_kernels.WNLinear(3, 4), subject("linear", "parametrizations")[0][0]]
    for layer in [*layers, *copy.deepcopy(layers), *pickle.loads(pickle.dumps(layers))]:
        assert not layer._forward_pre_hooks
        assert [hook.name for _, hook in layer._forward_pre_hooks.items()] == ["weight"]


def test_what_pytorch_says_of_a_layer():
    for form in (*NORMALISED_BY, "own"):
        layer = subject("linear", form)[0][0]
        assert parametrize.is_parametrized(layer) == (form == "parametrizations")
        before = parametrize.type_before_parametrizations(layer)
        if form == "own":
            assert before is wn_kernels.WNLinear
        else:  # the layer's own class, which derives from torch.nn's, or that one
            assert nn.Linear in (before, before.__bases__[0])
        originals = layer.parametrizations.weight
        g, v = (layer.weight_g, layer.weight_v) if form == "own" else reversed_operands(layer)
        assert originals.original0 is g
        assert originals.original1 is v
        assert parametrize.is_parametrized(layer, "weight")
        assert not parametrize.is_parametrized(layer, "bias")
        with pytest.raises(KeyError):
            layer.parametrizations["bias"]
        assert (
            type(copy.deepcopy(layer)) is type(pickle.loads(pickle.dumps(layer))) or form != "own"
        )


def reversed_operands(layer):
    v, g, *_ = layer._operands()
    return g, v


class Named(wn_kernels.WNLinear):
    """A class that somebody derived."""


def test_what_cannot_be_removed_is_named():
    match = "Named derives from a layer of wn_kernels"
    for removal in list(REMOVALS)[:3]:
        model = nn.Sequential(Named(6, 4))
        keys = list(model.state_dict())
        with pytest.raises(TypeError, match=match):
            REMOVALS[removal](model, ["weight"])
        assert type(model[0]) is Named
        assert list(model.state_dict()) == keys
        assert wn_kernels.fold(model) == []


@pytest.mark.parametrize("form", [*NORMALISED_BY, "own"])
def test_pruned_parts(form):
    """Pruning of `v` has effect; the layer is not folded before it is made permanent."""
    model, x, _ = subject("linear", form)
    layer = model[0]
    holder, key = layer, "weight_v"
    if form == "parametrizations":
        holder, key = layer.parametrizations.weight, "original1"
    prune.random_unstructured(holder, key, 7)
    assert (getattr(holder, key) == 0).sum() == 7
    g = holder.original0 if form == "parametrizations" else holder.weight_g
    right = torch._weight_norm(getattr(holder, key).detach().double(), g.detach().double(), 0)
    assert_matches(layer.weight, right, torch.float32, 24)
    assert_matches(layer(x), x.double() @ right.T + layer.bias.detach().double(), torch.float32, 24)
    keys = list(model.state_dict())
    assert wn_kernels.fold(model) == []
    with pytest.raises(RuntimeError, match=f"its {key} is pruned or parametrized"):
        wn_kernels.remove_weight_norm(layer)
    assert list(model.state_dict()) == keys
    prune.remove(holder, key)
    assert wn_kernels.fold(model) == ["0"]
    assert_matches(layer.weight, right, torch.float32, 24)
    assert (layer.weight == 0).sum() == 7


# --- frozen layers, inference mode ---------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", PLAIN)
def test_every_conversion_keeps_what_is_trained(kind, frozen, context):
    torch.manual_seed(1)
    make, shape, names = PLAIN[kind]
    layer = make().requires_grad_(not frozen)
    x = torch.tensor([0, 3]) if shape is None else torch.randn(shape)
    right = output(copy.deepcopy(layer).double(), x.double() if shape else x).detach()
    model = nn.Sequential(layer)

    def check():
        assert {p.requires_grad for p in model.parameters()} == {not frozen}
        assert not any(p.is_inference() for p in model.parameters())
        assert_matches(output(model, x), right, torch.float32, 64, roundings=8)

    with context():
        for name in names:
            wn_kernels.weight_norm(layer, name)
    check()
    for convert in (wn_kernels.unfuse, wn_kernels.fuse, wn_kernels.fold):
        with context():
            convert(model)
        check()
    there_and_back = [wn_kernels.fuse, wn_kernels.unfuse, wn_kernels.fuse, wn_kernels.fold]
    for form in FORMS:
        for conversions in (there_and_back, [wn_kernels.fold]):
            for name in names:
                NORMALISE[form](layer, name)
            model.requires_grad_(not frozen)
            for convert in conversions:
                with context():
                    convert(model)
                check()
    assert_plain(model, kind, frozen)


def test_models_that_were_made_in_inference_mode():
    """Their parameters are inference tensors; what conversion makes of them is not."""
    with torch.inference_mode():
        plain = nn.Linear(6, 4)
        layer = parametrizations.weight_norm(nn.Linear(6, 4))
    model = nn.Sequential(layer)
    right = layer.weight.detach().double()
    with torch.inference_mode():
        wn_kernels.fuse(model)
        wn_kernels.fold(model)
        wn_kernels.weight_norm(plain)
    assert not layer.weight.is_inference()
    assert not plain.weight_v.is_inference()
    assert not plain.weight_g.is_inference()
    assert_matches(layer.weight, right, torch.float32, 24)
    lazy = wn_kernels.WNLazyLinear(4)
    with torch.inference_mode():
        lazy(torch.randn(3, 6))
        inside = wn_kernels.WNLazyLinear(4)  # as torch.nn's, it stays an inference tensor
        inside(torch.randn(3, 6))
    assert not lazy.weight_v.is_inference()
    assert not lazy.weight_g.is_inference()
    assert inside.weight_v.is_inference()

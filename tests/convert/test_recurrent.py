"""Recurrent layers and cells: they copy, pickle, load and move as any other."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import wn_kernels
import wn_kernels.functional as WF
from tests.comparison import assert_matches, assert_same_bits
from tests.convert.layers import FORMS, NORMALISE, Twice
from tests.library import watch_weights
from wn_kernels import plan
from wn_kernels.convert import fused

NORMALISED_BY = {**NORMALISE, "wn_kernels.weight_norm": wn_kernels.weight_norm}


class Own(nn.LSTM):
    """A layer with a forward of its own, which calls torch.nn's."""

    def forward(self, input, hx=None):
        y, state = super().forward(input, hx)
        return 2 * y, state


ENDS = ("l0", "l0_reverse", "l1", "l1_reverse")
WHOLE = [f"weight_{kind}_{end}" for end in ENDS for kind in ("ih", "hh")]
RECURRENT = {
    "rnn": (lambda: nn.RNN(6, 4), ["weight_hh_l0"]),
    "lstm": (lambda: nn.LSTM(6, 4, 2), ["weight_ih_l0", "weight_hh_l0", "weight_hh_l1"]),
    "projected": (lambda: nn.LSTM(6, 4, proj_size=3), ["weight_hr_l0", "weight_hh_l0"]),
    "gru": (lambda: nn.GRU(6, 4, bidirectional=True, bias=False), ["weight_hh_l0_reverse"]),
    "whole": (lambda: nn.LSTM(6, 4, 2, bidirectional=True), WHOLE),
    "its own forward": (lambda: Own(6, 4), ["weight_ih_l0", "weight_hh_l0"]),
    "rnn cell": (lambda: nn.RNNCell(6, 4), ["weight_hh"]),
    "lstm cell": (lambda: nn.LSTMCell(6, 4), ["weight_ih", "weight_hh"]),
    "gru cell": (lambda: nn.GRUCell(6, 4, bias=False), ["weight_ih"]),
}


def pair(kind, form):
    """A layer that computes with this package, after a forward, and PyTorch's in float64."""
    torch.manual_seed(2)
    make, names = RECURRENT[kind]
    layer, twin = make(), make()
    twin.load_state_dict(layer.state_dict())
    for name in names:
        NORMALISED_BY[form](layer, name)
        NORMALISE["weight_norm" if form not in FORMS else form](twin, name)
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        p.data.mul_(torch.rand_like(p) + 0.5)
        q.data.copy_(p)
    wn_kernels.fuse(layer)
    output(layer, torch.randn(5, 6))
    return layer, twin.double(), torch.randn(5, 6)


def output(layer, x):
    """The hidden states of two calls, the second from where the first ended."""
    first = layer(x)
    if isinstance(layer, nn.RNNBase):
        return torch.cat([first[0], layer(x, first[1])[0]])
    second = layer(x, first)
    return second[0] if isinstance(second, tuple) else second


@pytest.mark.parametrize("form", NORMALISED_BY)
@pytest.mark.parametrize("kind", RECURRENT)
def test_computes_as_pytorchs(kind, form):
    layer, twin, x = pair(kind, form)
    assert list(layer.state_dict()) == list(twin.state_dict())
    y, right = output(layer, x), output(twin, x.double())
    assert_matches(y, right.detach(), torch.float32, 64, roundings=8)
    y.pow(3).sum().backward()
    right.pow(3).sum().backward()
    terms = right.norm().item() ** 3 * 8
    for (name, p), q in zip(layer.named_parameters(), twin.parameters(), strict=True):
        assert_matches(p.grad, q.grad, torch.float32, 64, terms=terms, roundings=8, what=name)


@pytest.mark.parametrize("form", NORMALISED_BY)
@pytest.mark.parametrize("kind", RECURRENT)
def test_copies_pickles_loads_and_moves(kind, form):
    layer, twin, x = pair(kind, form)
    y, right = output(layer, x).detach(), output(twin, x.double()).detach()
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(saved, weights_only=False),
    ]
    for other in copies:
        assert list(other.state_dict()) == list(layer.state_dict())
        assert_same_bits(output(other, x).detach(), y)
        assert_matches(output(copy.deepcopy(other).double(), x.double()), right, torch.float32, 64)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(0.5)
        other.load_state_dict(twin.state_dict())
        assert_same_bits(output(other, x).detach(), y)
        for saved_form in (*FORMS, "plain"):
            state = wn_kernels.state_dict(layer, saved_form)
            other.load_state_dict(state)
            assert_matches(output(other, x), right, torch.float32, 64, roundings=8)
        wn_kernels.unfuse(other)
        assert_matches(output(other, x), right, torch.float32, 64, roundings=8)
        wn_kernels.fuse(other)
    assert_same_bits(output(layer, x).detach(), y)


@pytest.mark.parametrize("fuse_first", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", RECURRENT)
def test_folds(kind, form, fuse_first):
    layer, twin, x = pair(kind, form)
    right = output(twin, x.double()).detach()
    if not fuse_first:
        wn_kernels.unfuse(layer)
        output(layer, x)
    assert wn_kernels.fold(layer) == [""]
    plain = RECURRENT[kind][0]()
    assert type(layer) is type(plain)
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert not layer._load_state_dict_pre_hooks
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer):
        assert_matches(output(other, x), right, torch.float32, 64, roundings=8)
        moved = copy.deepcopy(other).double()
        assert_matches(output(moved, x.double()), right, torch.float32, 64, roundings=8)
        other.load_state_dict(plain.state_dict())
        assert_same_bits(output(other, x).detach(), output(plain, x).detach())


@pytest.mark.parametrize("form", NORMALISED_BY)
@pytest.mark.parametrize("kind", RECURRENT)
def test_one_call_for_all_weights(kind, form, monkeypatch):
    """Nothing is computed twice for a forward, and nothing of it is kept."""
    layer, _, x = pair(kind, form)
    calls = watch_weights(monkeypatch)
    monkeypatch.setattr(plan.sequences, "pays", lambda *size: False)
    monkeypatch.setattr(WF, "weight_norm", None)
    before = set(map(id, layer.__dict__.values()))
    layer(x)
    assert calls == ([] if kind.endswith("cell") else [len(RECURRENT[kind][1])])
    if kind != "its own forward":
        assert {id(value) for value in layer.__dict__.values()} == before
        assert not any(isinstance(w, torch.Tensor) for w in getattr(layer, "_flat_weights", []))


@pytest.mark.parametrize("kind", RECURRENT)
def test_report(kind):
    make, names = RECURRENT[kind]
    layer = make()
    for name in names:
        NORMALISE["parametrizations"](layer, name)
    note, path = "one call for all of the layer", ": weight"
    if kind == "its own forward":
        note = kind
    if kind.endswith("cell"):
        note, path = "a product with each weight of the cell", ": linear"
    for report in (wn_kernels.fuse(layer, dry_run=True), wn_kernels.fuse(layer)):
        assert [line.name for line in report] == [f".{name}" for name in names]
        assert {line.note for line in report} == {note}
        assert all(line.path.endswith(path) for line in report)
    assert {line.note for line in wn_kernels.fuse(layer)} == {"fused already"}
    if kind != "its own forward":
        own = getattr(wn_kernels, "WN" + type(layer).__name__)(6, 4)
        report = wn_kernels.fuse(own)
        assert [line.name for line in report] == [f".{name}" for name in own._normed()]
        assert {line.note for line in report} == {"of this package"}


def test_a_second_parametrization_of_one_weight():
    """It has effect. The others are computed in one call."""
    torch.manual_seed(3)
    layer = nn.LSTM(6, 4)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        NORMALISE["parametrizations"](layer, name)
    parametrize.register_parametrization(layer, "weight_hh_l0", Twice())
    twin = nn.LSTM(6, 4).double()
    weights = {name: getattr(layer, name).detach().double() for name in layer._flat_weights_names}
    twin.load_state_dict(weights)
    x = torch.randn(5, 6)
    right = output(twin, x.double()).detach()
    notes = {line.name: line.note for line in wn_kernels.fuse(layer)}
    assert notes[".weight_hh_l0"] == "a second parametrization of the tensor"
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_matches(output(other, x), right, torch.float32, 64, roundings=8)
    assert wn_kernels.fold(layer) == [""]
    assert list(fused.norms(layer)) == ["weight_hh_l0"]
    assert_matches(output(layer, x), right, torch.float32, 64, roundings=8)


def test_both_forms_in_one_cell():
    torch.manual_seed(4)
    plain = nn.GRUCell(6, 4)
    x = torch.randn(3, 6)
    right = output(copy.deepcopy(plain).double(), x.double()).detach()
    NORMALISE["weight_norm"](plain, "weight_ih")
    NORMALISE["parametrizations"](plain, "weight_hh")
    wn_kernels.fuse(plain)
    for convert in (copy.deepcopy, wn_kernels.unfuse, wn_kernels.fuse, wn_kernels.fold):
        other = pickle.loads(pickle.dumps(plain))
        convert(other)
        assert_matches(output(other, x), right, torch.float32, 64, roundings=8)
    for first, second in (("weight_ih", "weight_hh"), ("weight_hh", "weight_ih")):
        other = copy.deepcopy(plain)
        nn.utils.remove_weight_norm(other, first)
        nn.utils.remove_weight_norm(other, second)
        assert type(other) is nn.GRUCell
        assert_matches(output(other, x), right, torch.float32, 64, roundings=8)


def test_in_a_grouped_model():
    """The layer computes its weights itself; the others are prepared."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = NORMALISE["parametrizations"](nn.Linear(6, 6))
            self.lstm = NORMALISE["parametrizations"](nn.LSTM(6, 4), "weight_hh_l0")
            self.own = wn_kernels.WNGRU(4, 4)

        def forward(self, x):
            return self.own(self.lstm(self.inner(x))[0])[0]

    torch.manual_seed(5)
    model, x = Model(), torch.randn(5, 3, 6)
    right = copy.deepcopy(model).double()(x.double()).detach()
    report = wn_kernels.fuse(model, grouped=True)
    notes = {line.name: line.note for line in report}
    assert notes["lstm.weight_hh_l0"] == "one call for all of the layer"
    assert notes["own.weight_ih_l0"] == "of this package"
    assert_matches(model(x), right, torch.float32, 64, roundings=8)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert wn_kernels.fold(model) == ["inner", "lstm", "own"]
    assert_matches(model(x), right, torch.float32, 64, roundings=8)

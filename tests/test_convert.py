"""Conversion of models: what `fuse` keeps, how to go back, checkpoints, folding, the report."""

import copy
import io
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import wn_kernels
from tests.comparison import assert_matches, assert_same_bits, assert_zero
from wn_kernels import plan
from wn_kernels.convert import fused

FORMS = ["weight_norm", "parametrizations"]


def legacy(module, name="weight", dim=0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, name, dim)


NORMALISE = {"weight_norm": legacy, "parametrizations": parametrizations.weight_norm}


class Doubled(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, input):
        return 2 * super().forward(input)


class Twice(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight


def stacked():
    """A weight that another parametrization follows."""
    layer = parametrizations.weight_norm(nn.Linear(4, 4))
    return parametrize.register_parametrization(layer, "weight", Twice())


class Scaled(nn.Module):
    """A layer of no known class."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, input):
        return torch.einsum("oi,...i->...o", self.weight, input) + self.bias


# Layer, input, dim.
LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6), 0),
    "linear, no bias": (lambda: nn.Linear(6, 4, bias=False), (3, 6), 1),
    "whole": (lambda: nn.Linear(6, 4), (3, 6), None),
    "1d": (lambda: nn.Conv1d(6, 4, 3, padding=1, padding_mode="reflect"), (2, 6, 9), 0),
    "taps": (lambda: nn.Conv1d(6, 4, 3, groups=2), (2, 6, 9), 2),
    "2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=2, dilation=(1, 2)), (2, 3, 9, 8), 0),
    "3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 3), 0),
    "up": (lambda: nn.ConvTranspose1d(6, 4, 4, stride=2, padding=1), (2, 6, 5), 0),
    "up 2d": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), (1, 3, 4, 4), 1),
    "its own forward": (lambda: Doubled(6, 4), (3, 6), 0),
    "unknown": (Scaled, (3, 6), 0),
}


def made(kind, form):
    """A layer that PyTorch weight-normalised, with a `g` that is not the norm, and its input."""
    torch.manual_seed(1)
    make, shape, dim = LAYERS[kind]
    layer = NORMALISE[form](make(), dim=dim)
    g = layer.weight_g if form == "weight_norm" else layer.parametrizations.weight.original0
    with torch.no_grad():
        g.mul_(torch.rand_like(g) + 0.5)
    return layer, torch.randn(shape)


def step(layer, x):
    """Output, and the gradients of the input and of every parameter."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y.square().sum() / 2).backward()
    grads = {name: p.grad.detach().clone() for name, p in layer.named_parameters()}
    return y.detach(), {"x": x.grad} | grads


def assert_computes_as(layer, twin, x):
    """Values and gradients against a float64 twin of PyTorch's."""
    y, grads = step(layer, x)
    right, right_grads = step(twin.double(), x.double())
    length = 64
    assert_matches(y, right, torch.float32, length)
    assert grads.keys() == right_grads.keys()
    for name, grad in grads.items():
        terms = right_grads["x"].norm().item() + right.norm().item() ** 2
        assert_matches(grad, right_grads[name], torch.float32, length, terms=terms, what=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_changes(kind, form):
    layer, x = made(kind, form)
    twin = made(kind, form)[0]
    handle = layer.register_forward_hook(lambda *_: None)
    layer.register_buffer("count", torch.ones(()))
    layer.train(False)
    before = {
        "parameters": [id(p) for p in layer.parameters()],
        "keys": list(layer.state_dict()),
        "buffers": [id(b) for b in layer.buffers()],
        "hooks": list(layer._forward_hooks),
        "pre-hooks": list(layer._forward_pre_hooks),
        "training": layer.training,
    }
    plain = LAYERS[kind][0]().__class__
    report = wn_kernels.fuse(layer)
    assert len(report) == 1
    assert report[0].path.split(":")[0] in ("native", "aten")
    after = {
        "parameters": [id(p) for p in layer.parameters()],
        "keys": list(layer.state_dict()),
        "buffers": [id(b) for b in layer.buffers()],
        "hooks": list(layer._forward_hooks),
        "pre-hooks": list(layer._forward_pre_hooks),
        "training": layer.training,
    }
    assert before == after
    assert isinstance(layer, plain)
    assert type(layer).__name__ == plain.__name__
    handle.remove()
    del layer._buffers["count"]
    assert_computes_as(layer, twin, x)
    assert "dim=" in repr(layer)


@pytest.mark.parametrize("form", FORMS)
def test_known_layers_run_our_forward(form):
    known = {kind for kind in LAYERS if kind not in ("its own forward", "unknown")}
    for kind in LAYERS:
        layer, _ = made(kind, form)
        note = wn_kernels.fuse(layer)[0].note
        ours = type(layer).forward in {own.forward for own in fused.LAYERS.values()}
        assert ours == (kind in known)
        assert note == ("" if kind in known else "its own forward")


@pytest.mark.parametrize("form", FORMS)
def test_weight_is_current_and_differentiable(form):
    layer, x = made("linear", form)
    wn_kernels.fuse(layer)
    g, v = fused.tensors(layer)
    with torch.no_grad():
        g.mul_(2)
    wide = (p.detach().double() for p in (v, g))
    right = torch._weight_norm(*wide, 0)
    assert_matches(layer.weight, right, torch.float32, 6)
    layer.weight.square().sum().backward()
    assert_matches(g.grad, 2 * g.detach().double(), torch.float32, 6)
    new = torch.randn(4, 6)
    layer.weight = new
    assert fused.tensors(layer)[0] is g
    assert_matches(layer.weight, new.double(), torch.float32, 6)
    with pytest.raises(ValueError, match=r"weight has shape \(2, 2\), expected \(4, 6\)"):
        layer.weight = torch.zeros(2, 2)
    y = x @ layer.weight.t() + layer.bias
    assert_matches(layer(x), y.detach().double(), torch.float32, 6)


@pytest.mark.parametrize("form", FORMS)
def test_a_frozen_magnitude_stays_frozen(form):
    layer, x = made("linear", form)
    wn_kernels.unfuse(layer)  # nothing to do
    g = next(p for name, p in layer.named_parameters() if name.endswith(("_g", "original0")))
    g.requires_grad_(False)
    wn_kernels.fuse(layer)
    layer(x).sum().backward()
    assert g.grad is None
    assert fused.tensors(layer)[1].grad is not None


@pytest.mark.parametrize("form", FORMS)
def test_an_optimizer_made_before_goes_on(form):
    layer, x = made("1d", form)
    twin = made("1d", form)[0].double()
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.05) for m in (layer, twin)]
    wn_kernels.fuse(layer)
    for _ in range(3):
        for module, optimizer in zip((layer, twin), optimizers, strict=True):
            optimizer.zero_grad()
            module(x.to(module.bias.dtype)).square().sum().backward()
            optimizer.step()
    for (name, p), right in zip(layer.named_parameters(), twin.parameters(), strict=True):
        # Adam divides by the gradient's size: its relative error enters, three times.
        assert_matches(p, right.detach(), torch.float32, 64, roundings=20, what=name)


# --- going back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_unfuse(kind, form):
    layer, x = made(kind, form)
    parameters, keys, kind_before = list(layer.parameters()), list(layer.state_dict()), type(layer)
    right = layer(x).detach()
    wn_kernels.fuse(layer)
    assert wn_kernels.unfuse(layer) == [""]
    assert wn_kernels.unfuse(layer) == []
    assert type(layer).__name__ == kind_before.__name__
    assert list(layer.state_dict()) == keys
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    assert_same_bits(layer(x).detach(), right)
    wn_kernels.fuse(layer)
    assert_matches(layer(x), right.double(), torch.float32, 64)


@pytest.mark.parametrize("kind", LAYERS)
def test_torchs_own_removal(kind):
    for form in FORMS:
        layer, x = made(kind, form)
        copied = copy.deepcopy(wn_kernels.fuse(layer) and layer)
        right = layer(x).detach().double()
        if form == "weight_norm":
            nn.utils.remove_weight_norm(layer)
            assert not layer._forward_pre_hooks
        else:
            parametrize.remove_parametrizations(layer, "weight")
        assert type(layer) is type(LAYERS[kind][0]())
        assert set(layer.state_dict()) == set(LAYERS[kind][0]().state_dict())
        assert_matches(layer(x), right, torch.float32, 64)
        # The copy is another module, and stays as it was.
        assert fused.is_fused(copied)
        assert_matches(copied(x), right, torch.float32, 64)


# --- a module's life -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_copies_and_pickles(kind, form):
    layer, x = made(kind, form)
    model = nn.Sequential(layer)
    wn_kernels.fuse(model)
    model(x)  # PyTorch's older form cannot be copied after a forward, its newer one not pickled
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ]
    right = model(x).detach()
    for other in copies:
        assert list(other.state_dict()) == list(model.state_dict())
        assert_same_bits(other(x).detach(), right)
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        assert_zero(other(x))
        assert wn_kernels.fold(other) == ["0"]
    assert_same_bits(model(x).detach(), right)


@pytest.mark.parametrize("form", FORMS)
def test_replicas(form):
    """As `DataParallel` makes them: copies whose parameters are plain tensors."""
    layer, x = made("1d", form)
    wn_kernels.fuse(layer)

    def replica_of(module):
        replica = module._replicate_for_data_parallel()
        for name, p in module._parameters.items():
            setattr(replica, name, p.detach().clone())
            replica._former_parameters = {name: p}
        for name, child in module._modules.items():
            replica._modules[name] = replica_of(child)
        return replica

    assert_same_bits(replica_of(layer)(x).detach(), layer(x).detach())


@pytest.mark.parametrize("form", FORMS)
def test_moves_and_averages(form):
    layer, x = made("1d", form)
    model = nn.Sequential(layer)
    wn_kernels.fuse(model)
    right = copy.deepcopy(model).double()(x.double()).detach()
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert_matches(average(x), right, torch.float32, 64)
    for dtype in (torch.bfloat16, torch.float16):
        moved = copy.deepcopy(model).to(dtype)
        assert moved(x.to(dtype)).dtype == dtype
        wide = copy.deepcopy(moved).double()(x.to(dtype).double()).detach()
        assert_matches(moved(x.to(dtype)), wide, dtype, 64, roundings=4)
    again = made("1d", form)[0]
    again.to("meta")
    wn_kernels.fuse(again)
    again.to_empty(device="cpu")
    again.load_state_dict(layer.state_dict())
    assert_same_bits(again(x).detach(), layer(x).detach())


def test_attention_reads_the_weight():
    """`MultiheadAttention` takes `out_proj.weight` without calling `out_proj`."""
    torch.manual_seed(0)
    for form in FORMS:
        attention = nn.MultiheadAttention(8, 2, batch_first=True)
        NORMALISE[form](attention.out_proj)
        wn_kernels.fuse(attention)
        g, v = fused.tensors(attention.out_proj)
        with torch.no_grad():
            g.mul_(3)
        x = torch.randn(2, 5, 8)
        y = attention(x, x, x)[0]
        y.square().sum().backward()
        twin = nn.MultiheadAttention(8, 2, batch_first=True).double()
        twin.load_state_dict(wn_kernels.state_dict(attention, "plain"))
        assert_matches(y, twin(*[x.double()] * 3)[0].detach(), torch.float32, 64)
        assert g.grad is not None
        assert v.grad is not None


# --- checkpoints ---------------------------------------------------------------------------------


def checkpoint(form):
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(6, 4), nn.Conv1d(4, 3, 2))
    if form != "plain":
        for layer in plain:
            NORMALISE[form](layer)
    return plain.state_dict(), [layer.weight.detach() for layer in plain]


def targets():
    torch.manual_seed(5)
    yield nn.Sequential(wn_kernels.WNLinear(6, 4), wn_kernels.WNConv1d(4, 3, 2))
    for form in FORMS:
        model = nn.Sequential(NORMALISE[form](nn.Linear(6, 4)), NORMALISE[form](nn.Conv1d(4, 3, 2)))
        wn_kernels.fuse(model)
        yield model


@pytest.mark.parametrize("form", [*FORMS, "plain"])
def test_loads_and_saves_every_form(form):
    state, weights = checkpoint(form)
    keys = list(state)
    for model in targets():
        result = model.load_state_dict(state)
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert list(state) == keys, "the caller's state dict was changed"
        for layer, weight in zip(model, weights, strict=True):
            assert_matches(layer.weight, weight.double(), torch.float32, 8)
        # What is saved in that form is what PyTorch's own module loads.
        saved = wn_kernels.state_dict(model, form)
        assert set(saved) == set(keys)
        other = nn.Sequential(nn.Linear(6, 4), nn.Conv1d(4, 3, 2))
        if form != "plain":
            for layer in other:
                NORMALISE[form](layer)
        other.load_state_dict(saved)
        x = torch.randn(4, 6)
        assert_matches(other[0](x), model[0](x).detach().double(), torch.float32, 8)
    with pytest.raises(ValueError, match="form is 'other'; expected one of"):
        wn_kernels.state_dict(model, "other")


@pytest.mark.parametrize("form", [*FORMS, "plain"])
def test_partial_checkpoints_are_reported(form):
    state, _ = checkpoint(form)
    lost = [key for key in state if key.startswith("0.") and "bias" not in key]
    for model in targets():
        own = [key for key in model.state_dict() if key.startswith("0.") and "bias" not in key]
        partial = {key: t for key, t in state.items() if key not in lost}
        result = model.load_state_dict(partial | {"0.more": torch.ones(1)}, strict=False)
        assert set(result.missing_keys) == set(own)
        assert result.unexpected_keys == ["0.more"]


@pytest.mark.parametrize("form", [*FORMS, "plain"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_shape_mismatch_changes_nothing(form, assign):
    state, _ = checkpoint(form)
    wrong = next(key for key in state if key.startswith("1.") and key.endswith(("_v", "1", "ght")))
    state[wrong] = torch.randn(3, 4, 5)
    for model in list(targets())[1:]:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match=r"(?s)size mismatch for 1\..*\[3, 4, 5\]") as error:
            model.load_state_dict(state, assign=assign)
        assert "Missing" not in str(error.value)
        assert "Unexpected" not in str(error.value)
        for key, t in model.state_dict().items():
            assert_same_bits(t, before[key], key)


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
    assert rows["memory.0.weight_hh_l0"].note == "a recurrent layer keeps its weights in a list"
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

"""What holds of a fused layer: values, parameters, copies, the way back."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import wn_kernels
from tests.comparison import assert_matches, assert_same_bits, assert_zero
from tests.convert.layers import (
    FORMS,
    LAYERS,
    NORMALISE,
    assert_computes_as,
    made,
)
from tests.forms import parts
from wn_kernels.convert import fused


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
    g, v = parts(layer)
    with torch.no_grad():
        g.mul_(2)
    wide = (p.detach().double() for p in (v, g))
    right = torch._weight_norm(*wide, 0)
    assert_matches(layer.weight, right, torch.float32, 6)
    layer.weight.square().sum().backward()
    assert_matches(g.grad, 2 * g.detach().double(), torch.float32, 6)
    new = torch.randn(4, 6)
    layer.weight = new
    assert parts(layer)[0] is g
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
    assert parts(layer)[1].grad is not None


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
        g, v = parts(attention.out_proj)
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

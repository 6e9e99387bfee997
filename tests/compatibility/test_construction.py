"""Ways to make a layer: on no device, uninitialised, lazily, and by initialisers of `.weight`."""

import inspect

import pytest
import torch
from torch import nn

import wn_kernels
from tests.comparison import assert_matches, assert_same_bits, assert_zero
from tests.compatibility.layers import LAYERS, assert_right, gradients, made

OWN = [name for name in LAYERS if name != "fused"]


def blueprint(name):
    kind, arguments, options, _ = LAYERS[name]
    return kind, arguments, options


@pytest.mark.parametrize("name", OWN)
def test_meta(name):
    """Made on no device, given memory and a checkpoint."""
    kind, arguments, options = blueprint(name)
    layer, x = made(name)
    empty = kind(*arguments, **options, device="meta")
    assert all(p.is_meta for p in empty.parameters())
    assert empty(x.to("meta")).shape == layer(x).shape
    moved = empty.to_empty(device="cpu")
    moved.load_state_dict(layer.state_dict())
    assert_right(*gradients(moved, x), layer, x)
    on_meta = kind(*arguments, **options, device="meta")
    on_meta.load_state_dict(layer.state_dict(), assign=True)
    assert_same_bits(on_meta(x), layer(x))


@pytest.mark.parametrize("name", OWN)
def test_skip_init(name):
    kind, arguments, options = blueprint(name)
    layer, x = made(name)
    skipped = nn.utils.skip_init(kind, *arguments, **options)
    skipped.load_state_dict(layer.state_dict())
    assert_right(*gradients(skipped, x), layer, x)


OURS = "dim", "eps", "norm"


@pytest.mark.parametrize("name", OWN)
def test_reset_parameters(name):
    """As `torch.nn`'s namesake starts, for the same seed."""
    kind, arguments, options = blueprint(name)
    layer, _ = made(name)
    torch.manual_seed(3)
    layer.reset_parameters()
    plain = {key: value for key, value in options.items() if key not in OURS}
    torch.manual_seed(3)
    twin = getattr(nn, kind.__name__.removeprefix("WN"))(*arguments, **plain)
    assert_matches(layer.weight, twin.weight.detach().double(), torch.float32, 64)
    if layer.bias is not None:
        assert_same_bits(layer.bias.detach(), twin.bias.detach())


@pytest.mark.parametrize("name", OWN)
def test_repr_and_parameters(name):
    kind, arguments, options = blueprint(name)
    layer, _ = made(name)
    assert f"dim={layer.dim}" in repr(layer)
    assert repr(layer).startswith(f"{kind.__name__}(")
    assert ("eps=" in repr(layer)) == ("eps" in options)
    plain = {key: value for key, value in options.items() if key not in OURS}
    twin = getattr(nn, kind.__name__.removeprefix("WN"))(*arguments, **plain)
    count = sum(p.numel() for p in layer.parameters())
    assert count == sum(p.numel() for p in twin.parameters()) + layer.weight_g.numel()
    own = [key for key, _ in layer.named_parameters()]
    assert sorted(own) == sorted(["weight_v", "weight_g", *(["bias"] if "bias" in own else [])])


INITIALISERS = {
    "normal": lambda w: nn.init.normal_(w),
    "xavier": nn.init.xavier_uniform_,
    "kaiming": nn.init.kaiming_normal_,
    "orthogonal": nn.init.orthogonal_,
    "constant": lambda w: nn.init.constant_(w, 0.3),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("initialise", INITIALISERS)
def test_initialisers(initialise, name):
    """An initialiser fills a weight; assigned, the layer computes with it."""
    layer, x = made(name)
    weight = torch.empty_like(layer.weight)
    with torch.no_grad():
        INITIALISERS[initialise](weight)
    layer.weight = weight
    assert_matches(layer.weight, weight.double(), torch.float32, 64)
    assert_right(*gradients(layer, x), layer, x)


@pytest.mark.parametrize(
    "kind", [kind for kind in vars(wn_kernels).values() if "Lazy" in getattr(kind, "__name__", "")]
)
def test_lazy(kind):
    """The input's size comes from the first input, and with it the layer's final class."""
    rank = int(kind.__name__[-2]) if kind.__name__.endswith("d") else 0
    layer = kind(4, 3) if rank else kind(4)
    assert nn.parameter.is_lazy(layer.weight_v)
    x = torch.randn(2, 6, *(5,) * rank)
    layer(x)
    assert type(layer) is kind.cls_to_become
    assert not inspect.signature(kind).parameters.keys() & {"in_features", "in_channels"}
    with torch.no_grad():
        layer.weight_g.mul_(1.5)
    assert_right(*gradients(layer, x), layer, x)


SIZES = {
    "Linear": [(0, 3), (3, 0), (0, 0)],
    "Conv1d": [(0, 3, 2), (3, 0, 2), (3, 4, 1)],
    "Conv2d": [(0, 3, 2)],
    "Conv3d": [(0, 3, 2)],
    "ConvTranspose1d": [(0, 3, 2), (3, 0, 2)],
    "ConvTranspose2d": [(0, 3, 2)],
    "ConvTranspose3d": [(0, 3, 2)],
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize(
    ("kind", "sizes"), [(kind, sizes) for kind, some in SIZES.items() for sizes in some]
)
def test_every_size_is_initialised(kind, sizes, dim, monkeypatch):
    """Memory that is not initialised would keep the NaN that is put there."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(torch.nan)
    )
    torch.manual_seed(3)
    try:
        plain = getattr(nn, kind)(*sizes)
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        with pytest.raises(type(error)):
            getattr(wn_kernels, f"WN{kind}")(*sizes, dim=dim)
        return
    torch.manual_seed(3)
    layer = getattr(wn_kernels, f"WN{kind}")(*sizes, dim=dim)
    assert not any(p.isnan().any() for p in layer.parameters())
    if plain.bias.numel() and not plain.bias.norm():
        assert_zero(layer.bias.detach())
    elif plain.bias.numel() and not plain.bias.isnan().any():  # torch.nn leaves some as they are
        assert_same_bits(layer.bias.detach(), plain.bias.detach())
    assert layer.weight.shape == plain.weight.shape
    assert (layer.weight_g >= 0).all()

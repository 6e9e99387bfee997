"""The convolution layers as drop-ins for those of torch.nn."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import wn_kernels
from tests.comparison import FLOATS, assert_matches, assert_same_bits

KINDS = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]
ARGUMENTS = (4, 6, 3, 2, 1)  # in, out, kernel_size, stride, padding


def rank_of(kind):
    return int(kind[-2])


def pair(kind, *arguments, seed=3, **options):
    """The plain layer and ours, from one seed."""
    ours = {name: options.pop(name) for name in ("dim", "eps") if name in options}
    torch.manual_seed(seed)
    plain = getattr(nn, kind)(*arguments, **options)
    after = torch.rand(1)
    torch.manual_seed(seed)
    layer = getattr(wn_kernels, f"WN{kind}")(*arguments, **options, **ours)
    assert_same_bits(torch.rand(1), after)
    return plain, layer


def wide(plain, *inputs, **options):
    return copy.deepcopy(plain).double()(*(t.double() for t in inputs), **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [0, 1, 2, -2, None, -1])
def test_starts_as_the_plain_layer(kind, dim):
    """The same seed gives the weight of the plain layer, and leaves the generator where it does."""
    plain, layer = pair(kind, *ARGUMENTS, groups=2, dim=dim)
    assert isinstance(layer, getattr(nn, kind))
    assert_matches(layer.weight, plain.weight.double(), torch.float32, plain.weight.numel())
    assert_same_bits(layer.bias.detach(), plain.bias.detach())
    x = torch.randn(2, 4, *(7,) * rank_of(kind))
    assert_matches(layer(x), wide(plain, x), torch.float32, plain.weight.numel(), roundings=4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["Conv2d", "ConvTranspose1d"])
def test_options(kind, dtype):
    _, layer = pair(kind, *ARGUMENTS, bias=False, dtype=dtype, eps=1e-6)
    assert layer.bias is None
    assert layer.weight_v.dtype == layer.weight_g.dtype == dtype
    assert "stride=(2" in repr(layer)
    assert "dim=0, eps=1e-06" in repr(layer)
    assert {name for name, _ in layer.named_parameters()} == {"weight_v", "weight_g"}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "Transpose" in kind])
def test_output_size(kind):
    plain, layer = pair(kind, *ARGUMENTS)
    rank = rank_of(kind)
    x = torch.randn(2, 4, *(5,) * rank)
    for size in (9, 10):
        y = layer(x, output_size=[size] * rank)
        assert y.shape[2:] == (size,) * rank
        expected = wide(plain, x, output_size=[size] * rank)
        assert_matches(y, expected, torch.float32, plain.weight.numel(), roundings=4)
    with pytest.raises(ValueError, match="requested an output size"):
        layer(x, output_size=[20] * rank)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["plain", "parametrization", "legacy"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_loads_every_form(kind, form, dim):
    plain, _ = pair(kind, *ARGUMENTS)
    weight = plain.weight.detach().clone()
    if form == "parametrization":
        plain = nn.utils.parametrizations.weight_norm(plain, dim=dim)
    if form == "legacy":
        with pytest.warns(FutureWarning):
            plain = nn.utils.weight_norm(plain, dim=dim)
    layer = getattr(wn_kernels, f"WN{kind}")(*ARGUMENTS, dim=dim)
    result = layer.load_state_dict(plain.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_matches(layer.weight, weight.double(), torch.float32, weight.numel())


def test_assigns_copies_and_pickles():
    _, layer = pair("Conv1d", *ARGUMENTS, dim=2)
    weight = torch.randn(6, 4, 3)
    layer.weight = weight
    assert_matches(layer.weight, weight.double(), torch.float32, weight.numel())
    x = torch.randn(2, 4, 9)
    y = layer(x).detach()
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    with torch.no_grad():
        layer.weight_g.zero_()
    for other in others:
        assert_same_bits(other(x).detach(), y)


def test_bad_construction():
    with pytest.raises(ValueError, match="dim=3 is out of range for a weight of 3 dimensions"):
        wn_kernels.WNConv1d(4, 6, 3, dim=3)
    with pytest.raises(ValueError, match="eps must be finite"):
        wn_kernels.WNConv1d(4, 6, 3, eps=-1.0)
    with pytest.raises(ValueError, match="in_channels must be divisible by groups"):
        wn_kernels.WNConv1d(4, 6, 3, groups=3)
    with pytest.raises(ValueError, match='Only "zeros" padding mode is supported'):
        wn_kernels.WNConvTranspose1d(4, 6, 3, padding_mode="reflect")


@pytest.mark.parametrize("kind", ["Conv1d", "ConvTranspose2d"])
def test_integers_of_numpy(kind):
    """Geometry and `dim` may be NumPy's integers, as in `torch.nn`."""
    np = pytest.importorskip("numpy")
    two, one = np.int64(2), np.int32(1)
    options = {"stride": two, "padding": one, "dilation": two, "groups": two}
    plain, layer = pair(kind, 4, 6, 3, dim=np.int64(0), **options)
    x = torch.randn(2, 4, *(7,) * rank_of(kind))
    right = wide(plain, x)
    assert_matches(layer(x), right, torch.float32, 64)
    fused = torch.nn.utils.parametrizations.weight_norm(plain, dim=one - 1)
    wn_kernels.fuse(fused)
    assert_matches(fused(x), right, torch.float32, 64)


def test_an_option_of_one_value():
    layer = wn_kernels.WNConv1d(2, 3, 3, stride=(1, 1))
    with pytest.raises(ValueError, match=r"stride needs 1 value, got \(1, 1\)"):
        layer(torch.randn(1, 2, 9))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_lazy(kind, dim):
    lazy = getattr(wn_kernels, f"WNLazy{kind}")
    inputs, outputs, *rest = ARGUMENTS
    layer = lazy(outputs, *rest, groups=2, dim=dim)
    assert isinstance(layer, getattr(nn, kind))
    x = torch.randn(2, inputs, *(7,) * rank_of(kind))
    torch.manual_seed(3)
    y = layer(x)
    assert type(layer) is getattr(wn_kernels, f"WN{kind}")
    _, right = pair(kind, *ARGUMENTS, groups=2, dim=dim)
    assert_same_bits(layer.weight.detach(), right.weight.detach())
    assert_same_bits(layer(x).detach(), y.detach())
    assert y.shape == right(x).shape
    loaded = lazy(outputs, *rest, groups=2, dim=dim)
    loaded.load_state_dict(getattr(nn, kind)(*ARGUMENTS, groups=2).state_dict())
    assert loaded.weight_v.shape == right.weight_v.shape
    with pytest.raises(ValueError, match="groups=2 does not divide the input's 3 channels"):
        lazy(outputs, *rest, groups=2)(x[:, :3])


@pytest.mark.parametrize("kind", ["Linear", *KINDS])
def test_constructs_as_torch_does(kind):
    """Signatures, without initialisation, on no device, and filled in later."""
    plain, own = getattr(nn, kind), getattr(wn_kernels, f"WN{kind}")
    theirs, ours = (inspect.signature(cls).parameters for cls in (plain, own))
    assert list(ours) == [*theirs, "dim", "eps", "norm", "magnitude_preserving"]
    assert all(ours[name].default == theirs[name].default for name in theirs)
    arguments = (4, 6) if kind == "Linear" else ARGUMENTS
    skipped = nn.utils.skip_init(own, *arguments, dim=1)
    assert skipped.weight_v.device.type == "cpu"
    torch.manual_seed(0)
    layer = own(*arguments, device="meta", dim=1).to_empty(device="cpu")
    layer.reset_parameters()
    torch.manual_seed(0)
    right = own(*arguments, dim=1)
    for (name, p), q in zip(layer.named_parameters(), right.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach(), name)
    count = sum(p.numel() for p in plain(*arguments).parameters())
    assert sum(p.numel() for p in layer.parameters()) == count + layer.weight_g.numel()
    weight = torch.empty(layer.weight.shape)
    nn.init.orthogonal_(weight)
    layer.weight = weight
    assert_matches(layer.weight, weight.double(), torch.float32, weight.numel())


def test_a_constructor_of_ones_own():
    class Named(wn_kernels.WNLinear):
        def __init__(self, name, *sizes):
            super().__init__(*sizes)

    assert list(inspect.signature(Named).parameters) == ["name", "sizes"]
    assert Named("x", 3, 4).weight.shape == (4, 3)

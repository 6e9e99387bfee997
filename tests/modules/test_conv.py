"""The convolution layers as drop-ins for those of torch.nn."""

import copy
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

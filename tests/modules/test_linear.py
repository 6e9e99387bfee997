"""`WNLinear` as a drop-in for `nn.Linear`."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from tests.comparison import DIMS, FLOATS, Case, assert_matches, assert_same_bits
from wn_kernels import WNLazyLinear, WNLinear


def wide_weight(layer):
    """`.weight` from its definition, in float64, by way of PyTorch's own formula."""
    v, g = layer.weight_v.detach().double(), layer.weight_g.detach().double()
    dims = [d for d in (0, 1) if d != layer.dim]
    return g * v / v.square().sum(dims, keepdim=layer.dim is not None).sqrt()


@pytest.mark.parametrize("dim", [0, 1, None, -1, -2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_starts_as_the_plain_layer(dim, bias, dtype):
    """The same seed gives the weight that nn.Linear has, and leaves the generator where it does."""
    torch.manual_seed(3)
    plain = nn.Linear(12, 7, bias=bias, dtype=dtype)
    after_plain = torch.rand(1)
    torch.manual_seed(3)
    layer = WNLinear(12, 7, bias, dtype=dtype, dim=dim)
    assert_same_bits(torch.rand(1), after_plain)
    assert isinstance(layer, nn.Linear)
    assert_matches(layer.weight, plain.weight.double(), dtype, 84, roundings=4)
    if bias:
        assert_same_bits(layer.bias.detach(), plain.bias.detach())
    x = torch.randn(5, 12, dtype=dtype)
    expected = copy.deepcopy(plain).double()(x.double())
    assert_matches(layer(x), expected, dtype, 84, roundings=6)


@pytest.mark.parametrize("dim", DIMS)
def test_weight_reads_and_is_differentiable(dim):
    layer = WNLinear(12, 7, dim=dim)
    with torch.no_grad():
        layer.weight_g.mul_(1.5)
    assert_matches(layer.weight, wide_weight(layer), torch.float32, 84)
    layer.weight.square().sum().backward()
    # d/dg Σ W² = 2 Σ W²_j / g_j
    squares = (
        wide_weight(layer).square().sum([d for d in (0, 1) if d != dim], keepdim=dim is not None)
    )
    assert_matches(
        layer.weight_g.grad, 2 * squares / layer.weight_g.detach().double(), torch.float32, 84
    )


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("wrap", [lambda w: w, nn.Parameter])
def test_weight_assigns(dim, wrap):
    layer = WNLinear(12, 7, dim=dim)
    before = layer.weight_v, layer.weight_g
    weight = torch.randn(7, 12)
    layer.weight = wrap(weight)
    assert layer.weight_v is before[0]
    assert layer.weight_g is before[1]
    assert set(dict(layer.named_parameters())) == {"weight_v", "weight_g", "bias"}
    assert_matches(layer.weight, weight.double(), torch.float32, 84)
    with pytest.raises(ValueError, match=r"weight has shape \(12, 7\), expected \(7, 12\)"):
        layer.weight = torch.randn(12, 7)
    with pytest.raises(TypeError, match=r"weight must be a torch\.Tensor, got float"):
        layer.weight = 1.0
    assert_matches(layer.weight, weight.double(), torch.float32, 84)


def test_zero_rows_keep_a_direction():
    """A zero row takes g = 0 and keeps its direction, so that it can still learn."""
    layer = WNLinear(12, 7)
    weight = torch.randn(7, 12)
    weight[2] = 0
    layer.weight = weight
    assert_matches(layer.weight, weight.double(), torch.float32, 84)
    layer(torch.randn(5, 12)).square().sum().backward()
    layer(torch.ones(5, 12)).sum().backward()
    assert layer.weight_g.grad[2].abs() > 0


# --- state dicts ---------------------------------------------------------------------------------


def source(form, dim=0):
    """A PyTorch layer in one of the three forms, and its weight."""
    torch.manual_seed(7)
    plain = nn.Linear(12, 7)
    weight = plain.weight.detach().clone()
    if form == "plain":
        return plain, weight
    if form == "parametrization":
        return nn.utils.parametrizations.weight_norm(plain, dim=dim), weight
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(plain, dim=dim), weight


@pytest.mark.parametrize("form", ["plain", "parametrization", "legacy"])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("prefix", [False, True])
def test_loads_every_form(form, dim, prefix):
    other, weight = source(form, dim)
    layer = WNLinear(12, 7, dim=dim)
    target, origin = (nn.Sequential(layer), nn.Sequential(other)) if prefix else (layer, other)
    state = origin.state_dict()
    keys = list(state)
    result = target.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert list(state) == keys, "the caller's state dict was changed"
    assert_matches(layer.weight, weight.double(), torch.float32, 84)
    assert_same_bits(layer.bias.detach(), other.bias.detach())
    again = WNLinear(12, 7, dim=dim)
    again.load_state_dict(layer.state_dict())
    assert_same_bits(again.weight.detach(), layer.weight.detach())


def test_what_does_not_fit_is_reported():
    layer = WNLinear(12, 7)
    before = layer.weight.detach().clone()
    result = layer.load_state_dict({"bias": torch.zeros(7)}, strict=False)
    assert result.missing_keys == ["weight_v", "weight_g"]
    with pytest.raises(
        RuntimeError, match=r"(?s)size mismatch for weight_v.*\(\[3, 12\]\)|\[3, 12\]"
    ):
        layer.load_state_dict({"weight": torch.randn(3, 12), "bias": torch.zeros(7)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict(layer.state_dict() | {"extra": torch.zeros(1)})
    assert_same_bits(layer.weight.detach(), before)


def test_loads_by_assignment():
    other, weight = source("plain")
    layer = WNLinear(12, 7, device="meta")
    layer.load_state_dict(other.state_dict(), assign=True)
    assert_matches(layer.weight, weight.double(), torch.float32, 84)


# --- life as a module ----------------------------------------------------------------------------


def test_copies_and_pickles():
    layer = WNLinear(12, 7, dim=1, eps=1e-6)
    x = torch.randn(5, 12)
    y = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    others = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ]
    with torch.no_grad():
        layer.weight_g.zero_()
    for other in others:
        assert type(other) is WNLinear
        assert (other.dim, other.eps) == (1, 1e-6)
        assert_same_bits(other(x).detach(), y.detach())


def test_moves():
    layer = WNLinear(12, 7).to(torch.bfloat16)
    assert layer(torch.randn(5, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert WNLinear(12, 7, device="meta").weight.shape == (7, 12)
    assert repr(WNLinear(12, 7, dim=None, eps=0.5)) == (
        "WNLinear(in_features=12, out_features=7, bias=True, dim=None, eps=0.5)"
    )


def test_bad_construction():
    with pytest.raises(ValueError, match="dim=2 is out of range"):
        WNLinear(12, 7, dim=2)
    with pytest.raises(TypeError, match="dim must be an int"):
        WNLinear(12, 7, dim="0")
    with pytest.raises(ValueError, match="eps must be finite"):
        WNLinear(12, 7, eps=-1.0)


@pytest.mark.parametrize("dim", DIMS)
def test_lazy(dim):
    torch.manual_seed(0)
    layer = WNLazyLinear(7, dim=dim)
    assert isinstance(layer, nn.Linear)
    torch.manual_seed(5)
    x = torch.randn(5, 12)
    layer(x)
    assert type(layer) is WNLinear
    assert layer.in_features == 12
    assert_matches(layer.weight, wide_weight(layer), torch.float32, 84)
    other, weight = source("plain")
    lazy = WNLazyLinear(7, dim=dim)
    lazy.load_state_dict(other.state_dict())
    assert_matches(lazy.weight, weight.double(), torch.float32, 84)


def test_parametrized_direction():
    """A parametrization or a pruning of weight_v itself is honoured."""

    class Double(nn.Module):
        def forward(self, v):
            return 2 * v

    case = Case(5, 12, 7, 0)
    layer = WNLinear(12, 7)
    layer.load_state_dict({"weight_v": case.v, "weight_g": case.g / 2, "bias": case.bias})
    nn.utils.parametrize.register_parametrization(layer, "weight_g", Double())
    case.check_forward(layer(case.x))

"""Where PyTorch's own weight norm falls short for a linear layer, and ours does not.

Each test first shows the defect in PyTorch where it can be shown safely, so that the day it is
mended there is noticed here.
"""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd.gradcheck import GradcheckError
from torch.nn.utils.parametrizations import weight_norm as parametrized

import wn_kernels.functional as WF
from tests.comparison import Case, assert_matches, assert_same_bits
from wn_kernels import WNLazyLinear, WNLinear
from wn_kernels.backends import reference


def legacy(layer):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


def test_second_derivative():
    """PyTorch's fused operator takes the saved norm for a constant in its double backward."""
    v = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    g = torch.rand(3, 1, dtype=torch.float64, requires_grad=True)
    with pytest.raises(GradcheckError):
        torch.autograd.gradgradcheck(lambda v, g: torch._weight_norm(v, g, 0), (v, g))
    assert torch.autograd.gradgradcheck(lambda v, g: WF.weight_norm(v, g), (v, g))


def test_zero_slice():
    v, g = torch.randn(3, 4), torch.rand(3, 1)
    v[1] = 0
    assert torch.isnan(torch._weight_norm(v, g, 0)).any()
    assert torch.isfinite(WF.weight_norm(v, g)).all()
    layer = WNLinear(4, 3)
    with torch.no_grad():
        layer.weight_v[1] = 0
    layer(torch.randn(5, 4)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_wrong_shape_of_g():
    """PyTorch reads any g as a flat buffer."""
    v, wrong = torch.randn(3, 4), torch.rand(1, 3)
    assert torch._weight_norm(v, wrong, 0).shape == v.shape
    for function in (WF.weight_norm, lambda v, g: WF.wn_linear(torch.randn(2, 4), v, g)):
        with pytest.raises(ValueError, match=r"g has shape \(1, 3\).*\(3, 1\)"):
            function(v, wrong)
        with pytest.raises(ValueError, match=r"g has shape \(2,\)"):
            function(v, torch.rand(2))


def test_empty_v():
    """Later releases of PyTorch end the process here."""
    v, g = torch.randn(0, 4, requires_grad=True), torch.rand(0, 1, requires_grad=True)
    y = WF.wn_linear(torch.randn(2, 4), v, g)
    assert y.shape == (2, 0)
    y.sum().backward()
    assert v.grad.shape == (0, 4)
    assert WF.weight_norm(v, g).shape == (0, 4)


def test_mixed_dtypes():
    v, g = torch.randn(3, 4).bfloat16(), torch.rand(3, 1)
    with pytest.raises(RuntimeError):
        torch._weight_norm(v, g, 0)
    expected = reference.weight_norm(v.double(), g.double(), 0, 0.0)
    assert_matches(WF.weight_norm(v, g), expected, torch.bfloat16, 4)


def test_forward_mode():
    v, g = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 1, dtype=torch.float64)
    tangents = (torch.randn_like(v), torch.randn_like(g))
    with pytest.raises(NotImplementedError):
        torch.func.jvp(lambda v, g: torch._weight_norm(v, g, 0), (v, g), tangents)
    _, tangent = torch.func.jvp(WF.weight_norm, (v, g), tangents)
    # W = g · V/n: dW = dg · V/n + g · (dV - V ⟨V, dV⟩/n²)/n
    n = v.norm(dim=1, keepdim=True)
    dv, dg = tangents
    expected = dg * v / n + g * (dv - v * (v * dv).sum(1, keepdim=True) / n**2) / n
    assert_matches(tangent, expected, torch.float64, 4)


def test_deepcopy():
    """The legacy hook leaves a non-leaf weight behind, which cannot be copied."""
    hooked = legacy(nn.Linear(4, 3))
    hooked(torch.randn(2, 4))
    with pytest.raises(RuntimeError):
        copy.deepcopy(hooked)
    layer = WNLinear(4, 3)
    layer(torch.randn(2, 4))
    other = copy.deepcopy(layer)
    assert_same_bits(other.weight.detach(), layer.weight.detach())
    assert other.weight_v is not layer.weight_v


def test_pickle():
    with pytest.raises(RuntimeError):
        pickle.dumps(parametrized(nn.Linear(4, 3)))
    layer = WNLinear(4, 3)
    assert_same_bits(pickle.loads(pickle.dumps(layer)).weight.detach(), layer.weight.detach())


def test_a_copy_is_independent():
    """Removing the parametrization of a deep copy breaks the original: they share a class."""
    original = parametrized(nn.Linear(4, 3))
    other = copy.deepcopy(original)
    nn.utils.parametrize.remove_parametrizations(other, "weight")
    with pytest.raises((AttributeError, KeyError, RuntimeError)):
        original(torch.randn(2, 4))
    layer = WNLinear(4, 3)
    x = torch.randn(2, 4)
    before = layer(x).detach()
    other = copy.deepcopy(layer)
    other.weight = torch.randn(3, 4)
    assert_same_bits(layer(x).detach(), before)


def test_other_forms_of_checkpoints():
    """The legacy hook reads neither of the other forms."""
    new, plain = parametrized(nn.Linear(4, 3)), nn.Linear(4, 3)
    for other in (new, plain):
        with pytest.raises(RuntimeError, match="Missing key"):
            legacy(nn.Linear(4, 3)).load_state_dict(other.state_dict())
        layer = WNLinear(4, 3)
        layer.load_state_dict(other.state_dict())
        assert_matches(layer.weight, other.weight.double(), torch.float32, 12)
    with pytest.raises(RuntimeError, match="Missing key"):
        parametrized(nn.Linear(4, 3)).load_state_dict(plain.state_dict())


def test_out_projection_of_attention():
    """MultiheadAttention reads `out_proj.weight` without calling the layer: under the legacy hook
    it never sees an update of g."""

    def change(attention):
        x = torch.randn(2, 3, 8)
        before = attention(x, x, x)[0]
        with torch.no_grad():
            attention.out_proj.weight_g.mul_(2)
        return (attention(x, x, x)[0] - before).abs().max().item()

    hooked = nn.MultiheadAttention(8, 2, batch_first=True)
    hooked.out_proj = legacy(hooked.out_proj)
    assert change(hooked) == 0
    ours = nn.MultiheadAttention(8, 2, batch_first=True)
    ours.out_proj = WNLinear(8, 8)
    assert change(ours) > 1e-3


def test_type():
    assert type(parametrized(nn.Linear(4, 3))) is not nn.Linear
    layer = WNLinear(4, 3)
    assert type(layer) is WNLinear
    assert isinstance(layer, nn.Linear)


def test_lazy():
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        parametrized(nn.LazyLinear(3))
    layer = WNLazyLinear(3)
    assert layer(torch.randn(2, 4)).shape == (2, 3)


@pytest.mark.filterwarnings("ignore")
def test_quantize_dynamic():
    with pytest.raises(AssertionError, match=r"ParametrizedLinear|only works for one of"):
        torch.ao.quantization.quantize_dynamic(nn.Sequential(parametrized(nn.Linear(4, 3))))
    model = nn.Sequential(WNLinear(4, 3), nn.Linear(3, 2))
    x = torch.randn(2, 4)
    quantized = torch.ao.quantization.quantize_dynamic(model)
    assert type(quantized[0]) is WNLinear
    assert quantized(x).shape == (2, 2)


def test_parameters_are_leaves():
    """What DistributedDataParallel needs to serialise a layer: after a forward, every tensor that
    it holds is a leaf. The legacy hook's `weight` is not."""
    hooked = legacy(nn.Linear(4, 3))
    hooked(torch.randn(2, 4))
    assert not hooked.weight.is_leaf
    layer = WNLinear(4, 3)
    layer(torch.randn(2, 4))
    assert all(not isinstance(t, torch.Tensor) or t.is_leaf for t in vars(layer).values())
    assert all(p.is_leaf for p in layer.parameters())


def test_flat_g_for_sharding():
    """A 0-d g cannot be sharded; the same scalar as one element of a 1-d g can."""
    case = Case(4, 6, 5, None)
    layer = WNLinear(6, 5, dim=None)
    layer.weight_g = nn.Parameter(case.g.reshape(1))
    with torch.no_grad():
        layer.weight_v.copy_(case.v)
        layer.bias.copy_(case.bias)
    y = layer(case.x)
    case.check_forward(y)
    y.backward(case.dy)
    assert layer.weight_g.grad.shape == (1,)

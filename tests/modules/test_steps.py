"""A step of a recurrent cell on a GPU: PyTorch's operators for the gates, behind two products."""

import copy

import pytest
import torch
from torch import nn

import wn_kernels
from tests.comparison import assert_matches
from tests.modules.test_recurrent import BATCH, CELLS, HIDDEN, INPUTS, check, made
from wn_kernels import grouped
from wn_kernels.modules import steps

# --- PyTorch's operators, which it has on a GPU alone, by their formulas -------------------------


def lstm(of_x, of_h, c, bias_x=None, bias_h=None):
    gates = of_x + of_h
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    new = f * c + i * g
    return o * new.tanh(), new, torch.cat((i, f, g, o), 1)


def lstm_grads(dh, dc, c, new, activated, has_bias):
    assert not has_bias
    i, f, g, o = activated.chunk(4, 1)
    tanh = new.tanh()
    dh = torch.zeros_like(c) if dh is None else dh
    dc = dh * o * (1 - tanh**2) + (0 if dc is None else dc)
    of_gates = dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g**2), dh * tanh * o
    return torch.cat((*of_gates[:3], of_gates[3] * (1 - o)), 1), dc * f, None


def gru(of_x, of_h, h, bias_x=None, bias_h=None):
    (r, z, n), (of_r, of_z, of_n) = of_x.chunk(3, 1), of_h.chunk(3, 1)
    r, z = (r + of_r).sigmoid(), (z + of_z).sigmoid()
    n = (n + r * of_n).tanh()
    return (h - n) * z + n, torch.cat((r, z, n, h, of_n), 1)


def gru_grads(dy, kept, has_bias):
    assert not has_bias
    r, z, n, h, of_n = kept.chunk(5, 1)
    dn = dy * (1 - z) * (1 - n**2)
    dr, dz = dn * of_n * r * (1 - r), dy * (h - n) * z * (1 - z)
    return torch.cat((dr, dz, dn), 1), torch.cat((dr, dz, dn * r), 1), dy * z, None, None


OPERATORS = {
    "_thnn_fused_lstm_cell": lstm,
    "_thnn_fused_lstm_cell_backward_impl": lstm_grads,
    "_thnn_fused_gru_cell": gru,
    "_thnn_fused_gru_cell_backward": gru_grads,
}


@pytest.fixture
def fused(monkeypatch):
    """Steps take the way of a GPU on tensors of the CPU."""
    library = torch.library.Library("aten", "IMPL")
    for name, function in OPERATORS.items():
        library.impl(name, function, "CPU")
    kinds = {plain: kind._replace(gates=kind.fused) for plain, kind in steps._KINDS.items()}
    monkeypatch.setattr(steps, "_KINDS", kinds)
    yield
    library._destroy()


def argument(kind, dtype=torch.float32):
    x, h, c = (torch.randn(BATCH, n, dtype=dtype) for n in (INPUTS, HIDDEN, HIDDEN))
    return x, (h, c) if "lstm" in kind else h


@pytest.mark.parametrize("kind", CELLS)
def test_the_way_of_a_gpu(kind, fused, monkeypatch):
    """It forms no weight, and its values and gradients are right."""
    cell = made(kind)
    monkeypatch.setattr(grouped, "formed", None)
    with wn_kernels.use_backend("triton"):
        check(cell, *argument(kind))
        check(cell, argument(kind)[0])


@pytest.mark.parametrize("kind", ["lstm cell", "gru cell"])
def test_a_second_derivative_on_a_gpu(kind, fused):
    cell = made(kind, dtype=torch.float64)
    named = {name: p.detach().requires_grad_() for name, p in cell.named_parameters()}
    x, state = argument(kind, torch.float64)

    def output(x, *parameters):
        for name, p in zip(named, parameters, strict=True):
            cell._parameters[name] = p
        y = cell(x, state)
        return y[0] + y[1] if isinstance(y, tuple) else y

    tensors = x.requires_grad_(), *named.values()
    assert torch.autograd.gradgradcheck(output, tensors, fast_mode=True)


def test_shared_weights_need_no_forward_of_torch(monkeypatch):
    """PyTorch's function has them at once."""
    cell = made("lstm cell")
    x, state = argument("lstm cell")
    wide = copy.deepcopy(cell).double()
    with wn_kernels.use_backend("reference"):
        right = wide(x.double(), tuple(t.double() for t in state))
    monkeypatch.setattr(nn.LSTMCell, "forward", None)
    with torch.no_grad(), wn_kernels.frozen_weights(cell):
        for _ in range(2):
            for y, expected in zip(cell(x, state), right, strict=True):
                assert_matches(y, expected.detach(), torch.float32, 64, roundings=8)

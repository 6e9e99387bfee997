"""This file computes one step of a recurrent cell on a CPU by two products that are weight-normed
themselves, `functional.wn_linear`, instead of two weights and PyTorch's products with them.

A cell uses its weights once, for few rows. The library's product then reads `V` once and writes no
weight, and the backward needs none. PyTorch's functions for a whole step take formed weights, so
the gates are computed here, by the formulas of `torch.nn.LSTMCell`, `GRUCell` and `RNNCell`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as WF
from ..call import PLAIN_TYPES, recorder
from . import reading

# A state is one tensor, or the two of an LSTM.
State = tuple[Tensor, ...]


def step(cell: Any, input: Any, hx: Any) -> Any:
    """Returns what a cell's `forward` returns for a batch, or `None` for a call that torch.nn's
    `forward` has to serve, or to reject."""
    if type(input) not in PLAIN_TYPES or not input.is_cpu or recorder(input):
        return None
    if input.ndim != 2 or input.shape[1] != cell.input_size:
        return None
    if torch._C._is_any_autocast_enabled() or reading.is_shared(cell):
        return None
    kind = next(plain for plain in _GATES if isinstance(cell, plain))
    count = 2 if kind is nn.LSTMCell else 1
    shape = len(input), cell.hidden_size
    if hx is None:
        state: Any = (input.new_zeros(shape),) * count
    else:
        state = hx if isinstance(hx, tuple | list) else (hx,)
        if len(state) != count or any(not _is_like(t, input) or t.shape != shape for t in state):
            return None
    products = [_product(cell, name, input.dtype) for name in ("weight_ih", "weight_hh")]
    if None in products or (kind is nn.RNNCell and cell.nonlinearity not in ("tanh", "relu")):
        return None
    if cell._is_read:
        reading.warn_of_writes(cell)
    of_x, of_h = products
    gates = of_x(input, bias=cell.bias_ih), of_h(state[0], bias=cell.bias_hh)
    return _GATES[kind](cell, *gates, *state)


def _is_like(t: Any, x: Tensor) -> bool:
    return type(t) in PLAIN_TYPES and t.dtype is x.dtype and t.is_cpu


def _product(cell: Any, name: str, dtype: torch.dtype) -> Any:
    """Returns a function of `x` and a bias, or `None` if the weight is not that of parameters in
    this dtype."""
    if name not in cell._normed():
        weight = getattr(cell, name)
        return partial(F.linear, weight=weight) if weight.dtype is dtype else None
    if cell._is_claimed(name):
        return None
    g, v = cell._tensors(name)
    dim, eps, norm = cell._normalisation(name)
    if v.dtype is not dtype:
        return None
    return partial(WF.wn_linear, v=v, g=g, dim=dim, eps=eps, norm=norm)


# --- the gates -----------------------------------------------------------------------------------

# As in PyTorch, gates are computed in the memory of the products, of which nothing else has a view.


def _lstm(cell: Any, of_x: Tensor, of_h: Tensor, h: Tensor, c: Tensor) -> State:
    i, f, g, o = of_x.add_(of_h).unsafe_chunk(4, 1)
    c = f.sigmoid_() * c + i.sigmoid_() * g.tanh_()
    return o.sigmoid_() * c.tanh(), c


def _gru(cell: Any, of_x: Tensor, of_h: Tensor, h: Tensor) -> Tensor:
    (r, z, n), (of_r, of_z, of_n) = of_x.unsafe_chunk(3, 1), of_h.unsafe_chunk(3, 1)
    r, z = of_r.add_(r).sigmoid_(), of_z.add_(z).sigmoid_()
    n = (n + r * of_n).tanh_()
    return (h - n) * z + n


def _rnn(cell: Any, of_x: Tensor, of_h: Tensor, h: Tensor) -> Tensor:
    gate = of_x.add_(of_h)
    return gate.tanh_() if cell.nonlinearity == "tanh" else gate.relu_()


_GATES: dict[type[nn.Module], Callable[..., Any]] = {
    nn.LSTMCell: _lstm,
    nn.GRUCell: _gru,
    nn.RNNCell: _rnn,
}

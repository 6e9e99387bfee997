"""This file computes one step of a recurrent cell by two products that are weight-normed
themselves, `functional.wn_linear`, instead of two weights and PyTorch's products with them.

A cell uses its weights once, for few rows. The product then reads `V` once and writes no weight,
and the backward needs none. PyTorch's functions for a whole step take formed weights, so the gates
are computed here. With the native library, a step is a sequence of one (`sequences.py`). Without
it, a CPU computes them by the formulas of `torch.nn.LSTMCell`, `GRUCell` and `RNNCell`. On a GPU,
it is done by the operators which PyTorch's functions call there.

Where several steps share the weights, PyTorch's functions get them without torch.nn's `forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as WF
from ..backends.recurrence import CELLS
from ..call import PLAIN_TYPES
from . import kept, reading, sequences

# A state is one tensor, or the two of an LSTM.
State = tuple[Tensor, ...]


def step(cell: Any, input: Any, hx: Any) -> Any:
    """Returns what a cell's `forward` returns for a batch, or `None` for a call that torch.nn's
    `forward` has to serve, or to reject."""
    if not sequences.is_usual(input) or not (input.is_cpu or input.is_cuda):
        return None
    if input.ndim != 2 or input.shape[1] != cell.input_size:
        return None
    kind = next(plain for plain in _KINDS if isinstance(cell, plain))
    count = 2 if kind is nn.LSTMCell else 1
    shape = input.shape[0], cell.hidden_size
    if hx is None:
        state: Any = (input.new_zeros(shape),) * count
    else:
        state = hx if isinstance(hx, (tuple, list)) else (hx,)
        if len(state) != count or any(not _is_like(t, input) or t.shape != shape for t in state):
            return None
    if kind is nn.RNNCell and cell.nonlinearity not in ("tanh", "relu"):
        return None
    of_kind = _KINDS[kind]
    products = None
    if not reading.is_shared(cell):
        y = _by_library(cell, of_kind, input, state)
        if y is not None:
            return y
        products = [_product(cell, name, input) for name in _NAMES]
    if products is None or None in products:
        return of_kind.whole(cell, input, state, *_formed(cell), cell.bias_ih, cell.bias_hh)
    if cell._is_read:
        reading.warn_of_writes(cell)
    of_x, of_h = products
    gates = of_x(input, bias=cell.bias_ih), of_h(state[0], bias=cell.bias_hh)
    return (of_kind.gates if input.is_cpu else of_kind.fused)(cell, *gates, *state)


_NAMES, _BIASES = ("weight_ih", "weight_hh"), ("bias_ih", "bias_hh")


def _by_library(cell: Any, of_kind: Kind, x: Tensor, state: State) -> Any:
    """Returns the state after a step that the native library takes as a sequence, or `None`."""
    library = sequences.library_for(x)
    options = library and sequences.shared_options(cell, _NAMES)
    if not options or not x.numel():
        return None
    if cell._is_read:
        reading.warn_of_writes(cell)
    of_x, of_h = (
        sequences.weight_of(cell, name, getattr(cell, bias))
        for name, bias in zip(_NAMES, _BIASES, strict=True)
    )
    number = CELLS.index(of_kind.cell or cell.nonlinearity)
    start = tuple(t.contiguous() for t in state)
    found = sequences.run(library, number, False, x.unsqueeze(0), of_x, of_h, start, options)
    if found is None:
        return None
    _, h, c = found
    return h if c is None else (h, c)


def _is_like(t: Any, x: Tensor) -> bool:
    return type(t) in PLAIN_TYPES and t.dtype is x.dtype and t.device == x.device


def _product(cell: Any, name: str, x: Tensor) -> Any:
    """Returns a function of a tensor like `x` and a bias, or `None` if the weight is not that of
    parameters like `x`."""
    if name not in cell._normed():
        weight = getattr(cell, name)
        return partial(F.linear, weight=weight) if _is_like(weight, x) else None
    if cell._is_claimed(name):
        return None
    g, v = cell._tensors(name)
    dim, eps, norm = cell._normalisation(name)
    if not _is_like(v, x):
        return None
    return partial(WF.wn_linear, v=v, g=g, dim=dim, eps=eps, norm=norm)


def _formed(cell: Any) -> list[Tensor]:
    """Returns the two weights."""
    normed = cell._normed()
    found = dict(zip(normed, kept.forms(cell, normed), strict=True))
    return [found[name] if name in found else getattr(cell, name) for name in _NAMES]


# --- steps by PyTorch's functions, from formed weights -------------------------------------------


def _whole_lstm(cell: Any, x: Tensor, state: Any, *parameters: Any) -> State:
    return torch.lstm_cell(x, state, *parameters)


def _whole_gru(cell: Any, x: Tensor, state: Any, *parameters: Any) -> Tensor:
    return torch.gru_cell(x, *state, *parameters)


def _whole_rnn(cell: Any, x: Tensor, state: Any, *parameters: Any) -> Tensor:
    step = torch.rnn_tanh_cell if cell.nonlinearity == "tanh" else torch.rnn_relu_cell
    return step(x, *state, *parameters)


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


# On a GPU, PyTorch has one operator for all gates of a cell, which can be differentiated twice. The
# products have the biases already.


def _fused_lstm(cell: Any, of_x: Tensor, of_h: Tensor, h: Tensor, c: Tensor) -> State:
    return torch.ops.aten._thnn_fused_lstm_cell.default(of_x, of_h, c)[:2]


def _fused_gru(cell: Any, of_x: Tensor, of_h: Tensor, h: Tensor) -> Tensor:
    return torch.ops.aten._thnn_fused_gru_cell.default(of_x, of_h, h)[0]


class Kind(NamedTuple):
    """Holds the functions of a kind of cell, which return its state.

    Attributes:
        cell: its name in `backends.recurrence.CELLS`, or an empty one for that of `nonlinearity`.
        whole: the step by PyTorch's function, from two formed weights.
        gates: the gates from the two products on a CPU.
        fused: the same on a GPU.
    """

    cell: str
    whole: Callable[..., Any]
    gates: Callable[..., Any]
    fused: Callable[..., Any]


_KINDS: dict[type[nn.Module], Kind] = {
    nn.LSTMCell: Kind("lstm", _whole_lstm, _lstm, _fused_lstm),
    nn.GRUCell: Kind("gru", _whole_gru, _gru, _fused_gru),
    nn.RNNCell: Kind("", _whole_rnn, _rnn, _rnn),
}

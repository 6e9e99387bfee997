"""This file runs recurrent layers and cells on a CPU without forming a weight.

The products of a layer's inputs are those of one weight-normed linear layer, for all steps at once.
The native library then goes through the steps, with a packed copy of the recurrent weight's
direction (`recurrence.h`). PyTorch's functions for a sequence take formed weights, and copy them.
Where those are the faster way (`plan/sequences.py`), they stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as WF
from .. import plan
from ..backends.recurrence import CELLS, GATES
from ..call import PLAIN_TYPES, Norm, recorder
from ..operators import native_library
from . import reading


class Weight(NamedTuple):
    """Holds a weight with its bias. Without a `g`, `v` is the weight itself."""

    v: Tensor
    g: Tensor | None
    bias: Tensor | None


# The norm of the rows of all weights of a layer.
Options = tuple[float, Norm]


def output(layer: Any, input: Any, hx: Any, formed: Callable[[Any], list[Any]]) -> Any:
    """Returns what a layer's `forward` returns, or `None` for a call that torch.nn's has to serve,
    or to reject. `formed(layer)` returns the tensors of the layer with formed weights."""
    library = library_for(input) if is_usual(input) else None
    if library is None or input.ndim not in (2, 3) or layer.proj_size:
        return None
    if input.shape[-1] != layer.input_size or not input.numel():
        return None
    is_batched = input.ndim == 3
    is_turned = layer.batch_first and is_batched
    x = input.transpose(0, 1) if is_turned else input if is_batched else input.unsqueeze(1)
    start = _start(layer, x, hx, is_batched)
    cell = CELLS.index(layer.mode.rpartition("_")[2].lower())
    if start is None:
        return None
    options = None
    if not reading.is_shared(layer):
        options = shared_options(layer, (n for n in layer._flat_weights_names if n[0] == "w"))
    if not _pays(layer, cell, x, options is None):
        return None
    weights = _weights(layer, None if options else formed(layer))
    ends: list[tuple[Tensor, ...]] = []
    drops = layer.dropout and layer.training and layer.num_layers > 1
    generator = torch.get_rng_state() if drops else None
    directions = 2 if layer.bidirectional else 1
    for first in range(0, len(weights), directions):
        if first and drops:
            x = torch.dropout(x, layer.dropout, True)
        found = []
        for at in range(first, first + directions):
            states = tuple(t[at] for t in start)
            result = run(library, cell, at > first, x, *weights[at], states, options)
            if result is None:  # PyTorch's function drops the same numbers
                if generator is not None:
                    torch.set_rng_state(generator)
                return None
            found.append(result[0])
            ends.append(result[1:])
        x = found[0] if directions == 1 else torch.cat(found, 2)
    join = torch.stack if is_batched else torch.cat
    state = tuple(join(t) for t in list(zip(*ends, strict=True))[: len(start)])
    y = x.transpose_(0, 1) if is_turned else x if is_batched else x.squeeze(1)
    return y, state if len(state) > 1 else state[0]


def is_usual(input: Any) -> bool:
    """Returns whether an input is a dense tensor of torch's own kind, and nothing records or casts
    the call."""
    return (
        type(input) in PLAIN_TYPES
        and input.layout is torch.strided
        and not recorder(input)
        and not torch._C._is_any_autocast_enabled()
    )


def library_for(input: Tensor) -> Any:
    """Returns the native library if it may go through the steps of a usual input, or `None`."""
    if not input.is_cpu or input.dtype not in (torch.float32, torch.float64):
        return None
    return native_library() if plan.forced() in (None, "native") else None


def shared_options(layer: Any, names: Iterable[str]) -> Options | None:
    """Returns the options if the rows of these weights are normed, all in the same way, and nothing
    else happens to them."""
    normed, found = layer._normed(), set()
    for name in names:
        if name not in normed or layer._is_claimed(name):
            return None
        found.add(layer._normalisation(name))
    (dim, eps, norm), *others = found
    return None if dim != 0 or others else (eps, norm)


def weight_of(layer: Any, name: str, bias: Tensor | None) -> Weight:
    """Returns a weight-normed weight with its bias."""
    g, v = layer._tensors(name)
    return Weight(v, g, bias)


def run(
    library: Any,
    cell: int,
    is_reversed: bool,
    x: Tensor,
    of_x: Weight,
    of_h: Weight,
    start: tuple[Tensor, ...],
    options: Options | None,
) -> Any:
    """Returns `(y, h_n, c_n)` of one direction, or `None` if the library does not serve it.

    Args:
        cell: its number in `CELLS`.
        x: the inputs, `(T, B, inputs)`.
        of_x, of_h: the weights of the inputs and of the states.
        start: `h` before the first step, and `c` of an LSTM, `(B, H)`.
        options: of the norms, if the weights have a `g`.
    """
    eps, norm = options or (0.0, "l2")
    if of_x.g is None:
        p = F.linear(x, of_x.v, of_x.bias)
    else:
        p = WF.wn_linear(x, of_x.v, of_x.g, of_x.bias, eps=eps, norm=norm)
    h, c = start if len(start) > 1 else (*start, None)
    return library.recurrence(cell, is_reversed, p, h, c, *of_h, eps, norm, (x, *of_x))


def _pays(layer: Any, cell: int, x: Tensor, is_formed: bool) -> bool:
    """Returns whether the library is the faster way for all storeys together, judged by the first
    and by one of the others."""
    recorded = torch.is_grad_enabled() and (
        x.requires_grad or any(p.requires_grad for p in layer._parameters.values() if p is not None)
    )
    directions = 2 if layer.bidirectional else 1
    inputs = {layer.input_size}
    if layer.num_layers > 1:
        inputs.add(directions * layer.hidden_size)
    size = GATES[cell], *x.shape[:2]
    rest = layer.hidden_size, x.dtype, recorded, is_formed
    return all(plan.sequences.pays(CELLS[cell] == "lstm", *size, n, *rest) for n in inputs)


def _start(layer: Any, x: Tensor, hx: Any, is_batched: bool) -> tuple[Tensor, ...] | None:
    """Returns the states of all directions before the first step, `(directions, B, H)` each, or
    `None` if they are not those of a call."""
    is_lstm = isinstance(layer, nn.LSTM)
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    shape = (count, x.shape[1], layer.hidden_size)
    if hx is None:
        return (x.new_zeros(shape),) * (2 if is_lstm else 1)
    state = hx if is_lstm else (hx,)
    if type(state) is not tuple or len(state) != (2 if is_lstm else 1):
        return None
    if not all(type(t) in PLAIN_TYPES and t.dtype is x.dtype and t.is_cpu for t in state):
        return None
    if any(t.ndim != (3 if is_batched else 2) for t in state):
        return None
    whole = tuple(t.contiguous() if is_batched else t.contiguous().unsqueeze(1) for t in state)
    return None if any(t.shape != shape for t in whole) else whole


def _weights(layer: Any, tensors: list[Any] | None) -> list[tuple[Weight, Weight]]:
    """Returns the weights of the inputs and of the states of every direction. `tensors` are those
    of the layer if its weights are formed."""
    names = layer._flat_weights_names
    if tensors is None and layer._is_read:
        reading.warn_of_writes(layer)

    def weight(i: int, bias: int) -> Weight:
        if tensors is not None:
            return Weight(tensors[i], None, tensors[bias] if layer.bias else None)
        return weight_of(layer, names[i], getattr(layer, names[bias]) if layer.bias else None)

    step = 4 if layer.bias else 2
    return [(weight(i, i + 2), weight(i + 1, i + 3)) for i in range(0, len(names), step)]

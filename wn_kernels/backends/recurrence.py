"""This file defines a recurrent layer over a sequence in differentiable ATen operations, from the
products of its inputs. The native library's `recurrence.h` has the formulas, and its second
derivatives from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Norm
from . import reference

# The cells, as the native library numbers them.
CELLS = ("lstm", "gru", "tanh", "relu")
GATES = (4, 3, 1, 1)


def states(
    cell: str, reversed: bool, p: Tensor, h: Tensor, c: Tensor | None, w: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns `(y, h_n, c_n)`: the states `h` after every step, `(T, B, H)`, and the last ones.

    Args:
        cell: one of `CELLS`.
        reversed: whether the last step of the sequence is taken first.
        p: the products of the inputs with `W_ih`, plus its bias, `(T, B, gates · H)`.
        h, c: the states before the first step, `(B, H)`; `c` of an LSTM alone.
        w: `W_hh`, `(gates · H, H)`.
        b: its bias, or `None`.
    """
    found = []
    for of_x in reversed_if(reversed, p.unbind(0)):
        of_h = F.linear(h, w, b)
        if cell == "lstm":
            assert c is not None
            i, f, g, o = (of_x + of_h).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        elif cell == "gru":
            (x_r, x_z, x_n), (h_r, h_z, h_n) = of_x.chunk(3, 1), of_h.chunk(3, 1)
            n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
            h = n + (x_z + h_z).sigmoid() * (h - n)
        else:
            h = (of_x + of_h).tanh() if cell == "tanh" else (of_x + of_h).relu()
        found.append(h)
    return torch.stack(reversed_if(reversed, found)), h, c


def reversed_if(is_so: bool, items: Sequence[Tensor]) -> list[Tensor]:
    """Returns the items, in reverse order if that is so."""
    return [*items][::-1] if is_so else [*items]


def grads(
    cell: int,
    reversed: bool,
    given: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    eps: float,
    norm: Norm,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Returns the gradients of `(p, h, c, v, g, b)`, with derivatives of every order.

    Args:
        cell: a number of `CELLS`.
        given: the gradients of `(y, h_n, c_n)`, some of which may be `None`.
        tensors: `(h, c, v, g, b)`, and `(x, v, g, b)` of the product `p`. Without a `g`, `v` is the
            weight.
        needs: which gradients are returned.
    """
    is_recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        # Each has a node of its own, so that a gradient goes through the layer alone.
        own: list[Any] = [None if t is None else t.view_as(t) for t in tensors]
        h, c, v, g, b, x, *of_p = own
        p = F.linear(x, _weight(of_p[0], of_p[1], eps, norm), of_p[2])
        if not p.requires_grad:
            p = p.requires_grad_()
        results = states(CELLS[cell], reversed, p, h, c, _weight(v, g, eps, norm), b)
        pairs = [
            (y, dy)
            for y, dy in zip(results, given, strict=True)
            if y is not None and dy is not None
        ]
        wanted = [
            t is not None and needed and t.requires_grad
            for t, needed in zip((p, h, c, v, g, b), needs, strict=True)
        ]
        inputs = [t for t, is_wanted in zip((p, h, c, v, g, b), wanted, strict=True) if is_wanted]
        outputs, of_outputs = zip(*pairs, strict=True)
        options = {"create_graph": is_recorded, "allow_unused": True}
        found = iter(torch.autograd.grad(outputs, inputs, of_outputs, **options))
    return [next(found) if is_wanted else None for is_wanted in wanted]


def _weight(v: Tensor, g: Tensor | None, eps: float, norm: Norm) -> Tensor:
    return v if g is None else reference.weight_norm(v, g, 0, eps, norm)

"""The ATen path of a group of weights, with as few operations as it can have.

PyTorch's own kernel of the norm and the scale serves most weights on a CPU in one operation each,
and their norms are looked at together. What it does not serve has an operation for each norm, and
one over all lists for the scales and one for the weights. `aten_weight.py` has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import Member, recorder
from . import aten_weight

Lists = tuple[list[Tensor], list[Tensor]]


def weight_norms(
    v: Sequence[Tensor], g: Sequence[Tensor], members: Sequence[Member], look: bool = True
) -> Lists:
    """Returns the lists of all `W` and `n`. Each `W` has its member's dtype and `V`'s memory
    layout.

    Raises:
        OutOfRange: `look` is true, and a norm on a CPU is out of range.
    """
    reads = v[0].is_cpu and not any(recorder(t) for t in v)
    w: list[Tensor | None] = [None] * len(v)
    n: list[Tensor | None] = [None] * len(v)
    rest = []
    for i, (t, scales, m) in enumerate(zip(v, g, members, strict=True)):
        if reads and m.dtype is t.dtype and aten_weight.fused_serves(t, scales, m, m.dtype):
            assert m.dim is not None
            w[i], n[i] = torch._weight_norm_interface(t, scales, m.dim)
        else:
            rest.append(i)
            n[i] = aten_weight.norms(t, m)
    norms = [t for t in n if t is not None]
    if reads and not _are_in_range(norms):
        every = zip(v, g, members, strict=True)
        found = [aten_weight.weight_norm(t, s, m, m.dtype, look) for t, s, m in every]
        return [pair[0] for pair in found], [pair[1] for pair in found]
    s = _scales([g[i] for i in rest], [norms[i] for i in rest])
    for i, t in zip(rest, _scaled([v[i] for i in rest], s), strict=True):
        w[i] = t.to(members[i].dtype)
    return [t for t in w if t is not None], norms


def _are_in_range(norms: list[Tensor]) -> bool:
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for n in norms:
        if n.numel():
            by_dtype.setdefault(n.dtype, []).append(n.view(-1))
    return all(aten_weight.is_in_range(torch.cat(flat)) for flat in by_dtype.values())


def _scales(g: list[Tensor], n: list[Tensor]) -> list[Tensor]:
    wide = [t.to(norm.dtype) for t, norm in zip(g, n, strict=True)]
    return list(torch._foreach_div(wide, n)) if wide else []


def _scaled(v: list[Tensor], s: list[Tensor]) -> list[Tensor]:
    """Returns every product in the dtype of the scale, and in `V`'s memory layout."""
    return list(torch._foreach_mul(v, s)) if v else []


def weight_norms_backward(
    dw: Sequence[Tensor],
    v: Sequence[Tensor],
    g: Sequence[Tensor],
    n: Sequence[Tensor],
    members: Sequence[Member],
) -> Lists:
    """Returns the lists of all `dV` and `dg`, in the dtypes of `V` and `g`."""
    found = [
        aten_weight.weight_norm_backward(grad, t, scales, norm, m)
        for grad, t, scales, norm, m in zip(dw, v, g, n, members, strict=True)
    ]
    return [pair[0] for pair in found], [pair[1] for pair in found]

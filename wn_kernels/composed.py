"""Layers on the ATen path that consist of torch's own norm and torch's own product: what eager
PyTorch does, with less around it.

A layer of some hundred microseconds pays for every line around it several times, since its own
work has taken the caches. So all that follows from shapes, dtypes and options is looked up at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import mend_second_order
from .backends import aten_weight, native, vendor
from .call import PLAIN_TYPES, Call, Norm, Operands, product_dtype, recorder
from .plan import Plan
from .prepare import are_dense, prepare

_MOST = 4096  # calls that are kept


class _Known(NamedTuple):
    """Holds what was found out about a call.

    Attributes:
        call, plan: as prepared.
        infers: whether this file serves it without gradients.
        records: whether it serves a training step.
    """

    call: Call
    plan: Plan
    infers: bool
    records: bool


_known: dict[Any, Any] = {}  # a `_Known`, or `None` if this file does not serve the call
_UNSEEN = object()
native.memos.append(_known)


def composed(
    rank: int | None,
    x: Tensor | None,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, ...],
    dim: int | None,
    eps: float,
    norm: Norm,
) -> Tensor | None:
    """Returns the output of a layer, or `None` for a call that the rest of the package has to
    serve, or reject.

    Raises:
        TypeError, ValueError: as `prepare`.
    """
    if (
        rank is None
        or x is None
        or type(x) not in PLAIN_TYPES
        or type(g) not in PLAIN_TYPES
        or (bias is not None and type(bias) not in PLAIN_TYPES)
        or recorder(v)
        or not are_dense(x, v, g, bias)
        or not (v.is_cpu and v.is_contiguous() and g.is_contiguous())
    ):
        return None
    if torch._C._is_any_autocast_enabled():
        x = x.to(product_dtype(x))
    shapes = x.shape, v.shape, g.shape, None if bias is None else bias.shape
    key = *shapes, x.dtype, v.dtype, g.dtype, rank, geometry, dim, type(dim), eps, norm
    try:
        known = _known.get(key, _UNSEEN)
    except TypeError:  # an option cannot be hashed
        return None
    if known is _UNSEEN:
        if len(_known) >= _MOST:
            _known.clear()
        known = _known[key] = _find(rank, Operands(x, v, g, bias), geometry, dim, eps, norm)
    if known is None:
        return None
    call, plan, infers, records = known
    if torch.is_grad_enabled() and (
        v.requires_grad
        or g.requires_grad
        or x.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        if not (records and v.is_leaf):
            return None
    elif not infers:
        return None
    assert call.dim is not None
    w, n = torch._weight_norm_interface(v, g, call.dim)
    if not aten_weight.is_in_range(n):
        return None
    if w.grad_fn is not None:
        mend_second_order(w, n, v, g, call, plan)
    if w.dtype is not call.x_dtype:
        w = w.to(call.x_dtype)
    if bias is not None and bias.dtype is not call.x_dtype:
        bias = bias.to(call.x_dtype)
    if call.conv is None:
        return F.linear(x, w, bias)
    return torch.convolution(x, w, bias, *call.conv)


def _find(
    rank: int,
    tensors: Operands,
    geometry: tuple[Any, ...],
    dim: int | None,
    eps: float,
    norm: Norm,
) -> _Known | None:
    """Returns what is known of a call, or `None` if this file does not serve it."""
    found = prepare(rank, tensors, geometry, dim, eps, norm, "aten")
    call, plan = found.call, found.plan
    served = (
        found.fits
        and tensors.g.dtype is call.v_dtype
        and aten_weight.forms_at_once(call)
        and 0 not in call.v_shape
        and not (call.conv and vendor.is_wrong_for(call.x_dtype, len(call.v_shape)))
    )
    if not served:
        return None
    return _Known(call, plan, plan.forward == "materialize", plan.keeps == "weight")

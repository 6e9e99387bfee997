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
from .plan import forced
from .prepare import are_dense, prepare

_MOST = 4096  # calls that are kept


class _Known(NamedTuple):
    """Holds what was found out about a call.

    Attributes:
        call: as prepared.
        infers: whether this file serves it without gradients.
        records: whether it serves a training step.
        casts: whether `W` or the bias has another dtype than the product.
        adds_bias: as `vendor.adds_bias` returns it.
    """

    call: Call
    infers: bool
    records: bool
    casts: bool
    adds_bias: bool


_known: dict[Any, Any] = {}  # a `_Known`, or `None` if this file does not serve the call
_UNSEEN = object()
native.memos.append(_known)

# These are looked up once, because a look-up of each costs as much as a check.
_strided = torch.strided
_is_grad_enabled = torch.is_grad_enabled
_is_autocast_enabled = torch._C._is_any_autocast_enabled


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
        or recorder(v)
        or forced() == "native"
    ):
        return None
    try:
        if not (
            (x.is_cpu and v.is_cpu and g.is_cpu)
            and x.layout is v.layout is g.layout is _strided
            and (v.is_contiguous() and g.is_contiguous())
        ):
            return None
        if bias is None:
            of_bias: Any = None
        elif type(bias) in PLAIN_TYPES and bias.is_cpu and bias.layout is _strided:
            of_bias = bias.shape, bias.dtype
        else:
            return None
        if _is_autocast_enabled():
            x = x.to(product_dtype(x))
        shapes = x.shape, v.shape, g.shape, of_bias
        key = *shapes, x.dtype, v.dtype, g.dtype, rank, geometry, dim, type(dim), eps, norm
        known = _known.get(key, _UNSEEN)
    except (TypeError, RuntimeError):  # an option cannot be hashed, or a tensor is nested
        return None
    if known is _UNSEEN:
        if len(_known) >= _MOST:
            _known.clear()
        known = _known[key] = _find(rank, Operands(x, v, g, bias), geometry, dim, eps, norm)
    if known is None:
        return None
    call, infers, records, casts, adds_bias = known
    records_weight = False
    if _is_grad_enabled():
        records_weight = v.requires_grad or g.requires_grad
        if records_weight or x.requires_grad or (bias is not None and bias.requires_grad):
            if not records:
                return None
        elif not infers:
            return None
    elif not infers:
        return None
    w, n = torch._weight_norm_interface(v, g, call.dim)
    if not aten_weight.is_in_range(n):
        return None
    if records_weight:
        mend_second_order(w.grad_fn)
    if casts:
        w = w.to(call.x_dtype)
        bias = None if bias is None else bias.to(call.x_dtype)
    if call.conv is None:
        return F.linear(x, w, bias)
    if bias is not None and adds_bias:
        return vendor.convolution_then_bias(x, w, bias, call.conv)
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
    x, v, g, bias = tensors
    assert x is not None
    if not are_dense(x, v, g, bias):
        return None
    found = prepare(rank, tensors, geometry, dim, eps, norm, "aten")
    call, plan = found.call, found.plan
    served = (
        found.fits
        and g.dtype is call.v_dtype
        and aten_weight.forms_at_once(call)
        and 0 not in call.v_shape
        and not (call.conv and vendor.is_wrong_for(call.x_dtype, len(call.v_shape)))
    )
    if not served:
        return None
    given = call.v_dtype, call.x_dtype if bias is None else bias.dtype
    return _Known(
        call,
        plan.forward == "materialize",
        plan.keeps == "weight",
        any(dtype is not call.x_dtype for dtype in given),
        call.conv is not None
        and vendor.adds_bias(call.x_shape, call.v_shape, call.x_dtype, call.conv),
    )

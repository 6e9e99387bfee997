"""Layers on the ATen path that consist of torch's own norm and torch's own product: what eager
PyTorch does, with less around it.

A layer of some hundred microseconds pays for every line around it several times, since its own
work has taken the caches. So all that follows from shapes, dtypes and options is found out once. A
later call looks it up, and has PyTorch compare the tensors (`call.guard`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import mend_second_order
from .backends import aten_weight, native, vendor
from .call import (
    PLAIN_TYPES,
    Call,
    Norm,
    Operands,
    are_modes_active,
    guard,
    keep,
    product_dtype,
    recorder,
    scale_dtype,
)
from .plan import forced
from .prepare import are_dense, prepare


class _Known(NamedTuple):
    """Holds what was found out about a call.

    Attributes:
        fits: a function of a call's tensors that returns whether this was found out for them.
        infers: whether this file serves the call without gradients.
        records: whether it serves the call with gradients.
        needs_grad: whether a tensor requires a gradient.
        needs_weight_grad: whether `v` or `g` does.
        axis: the dimension whose slices are normalised.
        are_in_range: returns whether the norms are in range.
        multiply: PyTorch's layer, a function of `(x, W, bias)`.
    """

    fits: Callable[..., bool]
    infers: bool
    records: bool
    needs_grad: bool
    needs_weight_grad: bool
    axis: int
    are_in_range: Callable[[Tensor], bool]
    multiply: Callable[..., Tensor]


_UNSERVED = _Known(
    fits=lambda *_: False,
    infers=False,
    records=False,
    needs_grad=False,
    needs_weight_grad=False,
    axis=0,
    are_in_range=aten_weight.is_in_range,
    multiply=F.linear,
)


_known: dict[Any, list[_Known]] = {}  # by shapes and options
native.memos.append(_known)

# These are looked up once, because a look-up of each costs as much as a check.
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
    if rank is None or x is None or are_modes_active() or forced() == "native":
        return None
    try:
        if _is_autocast_enabled():
            x = x.to(product_dtype(x))
        tensors = (x, v, g) if bias is None else (x, v, g, bias)
        key = rank, x.shape, v.shape, geometry, dim, type(dim), eps, norm, len(tensors)
        for known in _known.get(key, ()):
            if known.fits(*tensors):
                break
        else:
            known = _find(key, Operands(x, v, g, bias), rank, geometry, dim, eps, norm)
    except (AttributeError, TypeError, RuntimeError):  # an option cannot be hashed, for example
        return None
    _, infers, records, needs_grad, needs_weight_grad, axis, are_in_range, multiply = known
    recorded = needs_grad and _is_grad_enabled()
    if not (records if recorded else infers):
        return None
    w, n = torch._weight_norm_interface(v, g, axis)
    if not are_in_range(n):
        return None
    if recorded and needs_weight_grad:
        mend_second_order(w.grad_fn)
    return multiply(x, w, bias)


def _find(
    key: tuple[Any, ...],
    tensors: Operands,
    rank: int,
    geometry: tuple[Any, ...],
    dim: int | None,
    eps: float,
    norm: Norm,
) -> _Known:
    """Returns what is known of a call, and keeps it unless something records the call or is wrong
    with it."""
    x, v, g, bias = tensors
    assert x is not None
    given = [t for t in tensors if t is not None]
    if (
        any(type(t) not in PLAIN_TYPES or not t.is_cpu for t in given)
        or recorder(v)
        or not are_dense(x, v, g, bias)
    ):
        return _UNSERVED
    found = prepare(rank, tensors, geometry, dim, eps, norm, "aten")
    call, plan = found.call, found.plan
    served = (
        found.fits
        and v.is_contiguous()
        and g.is_contiguous()
        and g.dtype is call.v_dtype
        and aten_weight.forms_at_once(call)
        and 0 not in call.v_shape
        and not (call.conv and vendor.is_wrong_for(call.x_dtype, len(call.v_shape)))
    )
    known = _UNSERVED._replace(fits=guard(*given))
    if served:
        assert call.dim is not None
        known = _Known(
            known.fits,
            infers=plan.forward == "materialize",
            records=plan.keeps == "weight",
            needs_grad=any(t.requires_grad for t in given),
            needs_weight_grad=v.requires_grad or g.requires_grad,
            axis=call.dim,
            are_in_range=aten_weight.range_check(g.to(scale_dtype(v))),
            multiply=_multiplication(call, bias),
        )
    keep(_known, key, known)
    return known


def _multiplication(call: Call, bias: Tensor | None) -> Callable[..., Tensor]:
    """Returns PyTorch's layer with a `W`, a function of `(x, W, bias)`, for a bias like this."""
    dtype, conv = call.x_dtype, call.conv
    adds_bias = (
        bias is not None
        and conv is not None
        and vendor.adds_bias(call.x_shape, call.v_shape, dtype, conv)
    )

    def multiply(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        if conv is None:
            return F.linear(x, w, bias)
        if adds_bias:
            assert bias is not None
            return vendor.convolution_then_bias(x, w, bias, conv)
        return torch.convolution(x, w, bias, *conv)

    if dtype is call.v_dtype and (bias is None or bias.dtype is dtype):
        return F.linear if conv is None else multiply
    return lambda x, w, b: multiply(x, w.to(dtype), None if b is None else b.to(dtype))

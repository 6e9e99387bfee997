"""The ATen path computes layers from ATen operations, on a CPU and on any device without Triton.

In every backend, the norms `n` have the shape of `g`, in float32 (float64 for a float64 `V`). The
norm of a slice of zeros is stored as `+inf`. Its scale `s = g / n`, its `dg = a / n` and its `dV`
are then zero without a special case.

The forward of a linear layer has two variants:

    scaled       y = (x Vᵀ) ⊙ s + b   (dim=0, None)        y = (x ⊙ s) Vᵀ + b   (dim=1)
    materialize  W = s ⊙ V, then y = x Wᵀ + b

The backward uses `a_j = ⟨dW_j, V_j⟩`, `dg = a / n` and `c = s · dg / n`:

    dX = (dY ⊙ s) V,   dV = s ⊙ (dYᵀ X) - c ⊙ V

A smaller product may hold `a` already, and then `a` needs no pass over the weights. It is
`a_j = Σ_m dY_mj (x Vᵀ)_mj` for dim=0, `a_k = Σ_m x_mk (dY V)_mk` for dim=1, and the sum of the
latter for `None`. `dV` then starts as `-c ⊙ V`, and the matmul accumulates onto it. `dV` is thus
written once.

A convolution has the variants `output`, `input` and `materialize`. `output` scales the channels of
its output, and `input` those of its input. The scale belongs to one of these sides. `materialize`
forms `W`. If the input is scaled, `a` comes from a smaller product again. It is `a_c = Σ x_c dX_c`
over the batch and the pixels, with `dX` before its scale.

Only float32 and float64 are scaled after a product. An unscaled float16 product can overflow where
the scaled one does not, so the planner gives lower precisions to `materialize`. In bfloat16, whose
range is that of float32, `dY` may be scaled for `dX`.

These formulas do not hold for norms far from one. Their squares leave float32's range, and so may
an unscaled product. If a caller passes `look`, norms out of range raise `OutOfRange`. The caller
then computes the definition in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import (
    NORM_RANGE,
    Call,
    Geometry,
    Grads,
    Needs,
    Operands,
    kept_shape,
    recorder,
    reduced_dims,
    scale_dtype,
)
from . import vendor
from .native.limits import LEFT_ROWS
from .vendor import channel_sums, convolution_grads

INF = float("inf")

# A block of rows has this many elements (1 MiB of float32). It stays in the cache between two
# consecutive operations.
BLOCK = 1 << 18

# The norm of a row of at least this many elements is computed without a copy.
LONG_ROW = 32

# torch's own kernels compute a norm and a scale, or their gradients, in one operation. They serve
# every weight in half precision, which no other operation reads without a copy in float32. They
# serve wider weights up to 32 MiB of float32. For larger ones the allocator maps fresh pages for
# every result, and the page faults cost more than the operation saves. A gradient that may take the
# place of `dW` needs no fresh result, which pays off from 8 MiB on.
FUSED_MAX = 1 << 23
IN_PLACE_MIN = 1 << 21
_FUSED_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))

_fused_grad = torch.ops.aten._weight_norm_interface_backward.default


# --- norms and scaled weights ----------------------------------------------------------------


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Iterates over the tensors together, in blocks of rows that fit in cache."""
    first = tensors[0]
    rows = max(1, BLOCK // max(1, first[0].numel())) if len(first) else 1
    return zip(*(t.split(rows) for t in tensors), strict=True)


def _slice_dots(a: Tensor, b: Tensor, dim: int | None, dtype: torch.dtype) -> Tensor:
    """Returns `⟨A_j, B_j⟩` for every slice, with dimensions kept, accumulated in `dtype`.

    It reads each tensor once and writes no product of full size. It adds blocks in order.
    """
    if a.numel() == 0 or a.ndim == 0:
        product = a.to(dtype) * b.to(dtype)
        dims = reduced_dims(a.ndim, dim)
        return product.sum(dims, keepdim=dim is not None) if dims else product
    dims = reduced_dims(a.ndim, dim)
    parts = []
    for a_rows, b_rows in _blocks(a, b):
        product = a_rows.to(dtype) * b_rows.to(dtype)
        parts.append(product.sum(dims, keepdim=dim is not None) if dims else product)
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if dim == 0 else torch.stack(parts).sum(0)


def _dense_rows(v: Tensor) -> Tensor | None:
    """Returns `V` as a matrix of contiguous rows, or `None` if `V` is neither contiguous nor
    channels-last."""
    if v.is_contiguous():
        return v.flatten(1)
    last = v.movedim(1, -1)
    return last.flatten(1) if last.is_contiguous() else None


class OutOfRange(Exception):
    """This error means that a norm is too large or too small for the formulas of this file."""


def is_in_range(n: Tensor) -> bool:
    """Returns whether all norms are in range. The result is false for NaN."""
    least, most = NORM_RANGE[n.dtype]
    low, high = n.aminmax()
    return low.item() >= least and high.item() <= most


def _check_range(v: Tensor, n: Tensor) -> None:
    """Raises `OutOfRange` if a norm is out of range. It checks tensors on a CPU only, because a
    check elsewhere would have to wait for the device."""
    if not v.is_cpu or not n.numel() or recorder(v) or is_in_range(n):
        return
    dead = n.isinf()  # the norm is zero or too large
    live = n[~dead]
    if (live.numel() and not is_in_range(live)) or torch.where(dead, v, 0.0).any():
        raise OutOfRange


def norms(v: Tensor, dim: int | None, eps: float, look: bool = False) -> Tensor:
    """Returns `n` with the shape of `g`. The top of this file describes a slice of norm zero.

    Raises:
        OutOfRange: `look` is true, `v` is on a CPU and a norm is out of range.
    """
    dtype = v.dtype
    if dtype is not torch.float32:
        dtype = scale_dtype(v)
    if dim == 0 and v.ndim == 2:
        if v.dtype is dtype:
            n = torch.linalg.vector_norm(v, 2, 1, True)
        else:
            parts = [torch.linalg.vector_norm(r, 2, 1, True, dtype=dtype) for (r,) in _blocks(v)]
            n = torch.cat(parts)
    elif dim == 0 and v.ndim > 2 and v.numel() and (rows := _dense_rows(v)) is not None:
        n = torch.linalg.vector_norm(rows, 2, 1, dtype=dtype).view(kept_shape(v.shape, 0))
    elif dim is None and v.is_contiguous() and v.ndim > 1 and v.numel():
        # Rows are reduced first, because one reduction over everything would use one accumulator.
        rows = torch.linalg.vector_norm(v.flatten(1), 2, 1, dtype=dtype)
        n = torch.linalg.vector_norm(rows)
    elif dim is not None and 0 < dim < v.ndim - 1 and v.numel() and v.is_contiguous():
        n = _interior_norms(v, dim, dtype).view(kept_shape(v.shape, dim))
    else:
        n = _slice_dots(v, v, dim, dtype).sqrt_()
    n = torch.threshold_(n, 0.0, INF) if eps == 0 else n.clamp_min_(eps)
    if look:
        _check_range(v, n)
    return n


def _interior_norms(v: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Returns the flat norms along an interior `dim`. If the rows behind `dim` are long, it
    computes their norms first. Otherwise it copies `V` so that slices are rows."""
    if v.stride(dim) >= LONG_ROW:
        rows = torch.linalg.vector_norm(v.flatten(dim + 1), 2, -1, dtype=dtype)
        return torch.linalg.vector_norm(rows.flatten(0, dim - 1), 2, 0)
    return torch.linalg.vector_norm(v.movedim(dim, 0).flatten(1), 2, 1, dtype=dtype)


def weight_norm(
    v: Tensor, g: Tensor, dim: int | None, eps: float, dtype: torch.dtype, look: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns `(W, n)`. `W` has `dtype` and `V`'s memory layout. `look` has the meaning of
    `norms`."""
    if dtype is v.dtype or (dtype.itemsize < v.element_size() and v.numel() <= IN_PLACE_MIN):
        fused = fused_weight_norm(v, g, dim, eps, v.dtype)
        if fused is not None:
            w, n = fused
            return w.to(dtype), n
    n = norms(v, dim, eps, look)
    return _scaled_weight(v, _scale(g, n), dtype), n


def fused_weight_norm(
    v: Tensor, g: Tensor, dim: int | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Returns `(W, n)` from torch's own kernel, or `None` if that does not serve the call. The
    result is differentiable, but only once.

    The kernel returns NaN for a slice of norm zero, and its gradient divides by the norm's third
    power. The norms are therefore checked.
    """
    if dtype is v.dtype and fused_serves(v, g, dim, eps) and not recorder(v):
        assert dim is not None
        w, n = torch._weight_norm_interface(v, g, dim)
        if is_in_range(n):
            return w, n
    return None


def fused_serves(v: Tensor, g: Tensor, dim: int | None, eps: float) -> bool:
    return (
        (dim == 0 or dim == v.ndim - 1)
        and eps == 0
        and v.dtype is g.dtype
        and v.dtype in _FUSED_DTYPES
        and v.is_cpu
        and v.is_contiguous()
        and g.is_contiguous()
        and v.numel() > 0
        and (v.numel() <= FUSED_MAX or v.element_size() == 2)
        and v.ndim > 1
    )


def _scale(g: Tensor, n: Tensor) -> Tensor:
    return g / n if g.dtype == n.dtype else g.to(n.dtype) / n


def _scaled_weight(v: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    if v.dtype is s.dtype is dtype:
        return v * s
    w = torch.empty_like(v, dtype=dtype)
    if v.ndim == 0 or not v.numel():
        return w.copy_(v.to(s.dtype) * s)
    # The product in float32 stays in cache until it is rounded.
    for w_rows, v_rows, s_rows in _blocks(w, v, s.expand_as(v)):
        w_rows.copy_(v_rows.to(s.dtype) * s_rows)
    return w


def _dot_coefficient(s: Tensor, dg: Tensor, n: Tensor, eps: float) -> Tensor:
    """Returns `c = s · dg / n`. It is zero where `n` was clamped, because the norm is constant
    there."""
    c = (s * dg).div_(n)
    return c.masked_fill_(n <= eps, 0.0) if eps > 0 else c


def weight_norm_backward(
    dw: Tensor,
    v: Tensor,
    g: Tensor,
    n: Tensor,
    dim: int | None,
    eps: float,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns `(dV, dg)` from `dW`, in the dtypes of `V` and `g`. `dV` has `V`'s layout unless `dW`
    may be overwritten."""
    in_place = overwrite and v.numel() >= IN_PLACE_MIN and v.element_size() > 2
    if (
        not in_place
        and fused_serves(v, g, dim, eps)
        and (
            dw.dtype is v.dtype
            or (dw.element_size() < v.element_size() and v.numel() <= IN_PLACE_MIN)
        )
        and dw.is_contiguous()
    ):
        return _fused_grad(dw.to(v.dtype), v, g, n, dim)
    dv = dw if overwrite and dw.dtype is v.dtype else torch.empty_like(v)
    return dv, _write_weight_grad(dv, dw, v, g, n, dim, eps)


def _write_weight_grad(
    dv: Tensor, dw: Tensor, v: Tensor, g: Tensor, n: Tensor, dim: int | None, eps: float
) -> Tensor:
    """Writes `dV = s ⊙ dW - c ⊙ V`, which may take the memory of `dW`, and returns `dg`."""
    s = _scale(g, n)
    if dim == 0 and dw.numel():  # a slice is a row, which stays in cache from its dot to its update
        dims = reduced_dims(v.ndim, 0)
        dgs = []
        for dv_rows, dw_rows, v_rows, s_rows, n_rows in _blocks(dv, dw, v, s, n):
            wide_dw, wide_v = dw_rows.to(n.dtype), v_rows.to(n.dtype)
            product = wide_dw * wide_v
            a = product.sum(dims, keepdim=True) if dims else product
            dg = a.div_(n_rows)
            c = _dot_coefficient(s_rows, dg, n_rows, eps)
            _write_difference(dv_rows, wide_dw, wide_v, s_rows, c)
            dgs.append(dg)
        dg = torch.cat(dgs)
    else:
        dg = _slice_dots(dw, v, dim, n.dtype).div_(n)
        c = _dot_coefficient(s, dg, n, eps)
        every = [(dv, dw, v)] if dw.ndim == 0 or not dw.numel() else _blocks(dv, dw, v)
        for dv_rows, dw_rows, v_rows in every:
            _write_difference(dv_rows, dw_rows.to(n.dtype), v_rows.to(n.dtype), s, c)
    return dg.to(g.dtype)


def _write_difference(dv: Tensor, dw: Tensor, v: Tensor, s: Tensor, c: Tensor) -> None:
    """Writes `dV = s ⊙ dW - c ⊙ V`. `dV` may be narrower than the other tensors."""
    if dv.dtype is dw.dtype:
        torch.mul(dw, s, out=dv).addcmul_(v, c, value=-1)
    else:
        dv.copy_((dw * s).addcmul_(v, c, value=-1))


# --- linear ------------------------------------------------------------------------------------


def linear(
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    dim: int | None,
    eps: float,
    variant: str,
    keep_product: bool,
    look: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns `(y, n, product)` for `x` of shape `(M, K)`. `look` has the meaning of `norms`.

    `product` is the unscaled `x Vᵀ` if `keep_product` is true and the variant forms it (scaled,
    dim=0), and `None` otherwise. These `M·N` numbers save the backward a pass over the weights.
    """
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if variant == "materialize":
        w, n = weight_norm(v, g, dim, eps, x.dtype, look)
        return F.linear(x, w, bias), n, None
    n = norms(v, dim, eps, look)
    s = _scale(g, n)
    if dim == 1:
        return F.linear(x * s, v, bias), n, None

    if dim == 0:
        s = s.view(-1)
    # For a few rows, MKL is up to twice as fast with `V` on the left. The epilogue transposes the
    # product when it writes the output.
    product = torch.mm(v, x.t()).t() if 1 < len(x) < LEFT_ROWS else torch.mm(x, v.t())
    kept = product if keep_product and dim == 0 else None
    y = product if kept is None and product.is_contiguous() else x.new_empty(product.shape)
    if bias is None:
        torch.mul(product, s, out=y)
    else:
        torch.addcmul(bias, product, s, out=y)
    return y, n, kept


def linear_backward(
    dy: Tensor,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    n: Tensor,
    product: Tensor | None,
    dim: int | None,
    eps: float,
    variant: str,
    needs: Needs,
) -> Grads:
    """Returns `(dX, dV, dg, db)`, with `None` for those that `needs` excludes. `dY` is `(M, N)` and
    `x` is `(M, K)`."""
    needs_x, needs_v, needs_g, needs_bias = needs
    needs_weight = needs_v or needs_g
    dx = dv = dg = None
    db = dy.sum(0) if needs_bias else None
    s = _scale(g, n)

    if variant == "materialize":
        if needs_x:
            dx = torch.mm(dy, _scaled_weight(v, s, x.dtype))
    elif dim == 0:
        scaled_dy = (dy * s.view(-1)).to(x.dtype)
        if needs_x:
            dx = torch.mm(scaled_dy, v)
        if needs_weight and product is not None:
            dg = (dy * product).sum(0).view_as(n).div_(n)
            dv = _scaled_grad(scaled_dy, x, v, s, dg, n, eps) if needs_v else None
    elif needs_x:
        unscaled = torch.mm(dy, v)
        if needs_weight:
            a = x * unscaled
            dg = (a.sum(0, keepdim=True) if dim == 1 else a.sum()).div_(n)
            dv = _scaled_grad(dy, x * s, v, s, dg, n, eps) if needs_v else None
        dx = unscaled.mul_(s)

    if needs_weight and dg is None:
        dv, dg = weight_norm_backward(torch.mm(dy.t(), x), v, g, n, dim, eps, overwrite=True)
    if dv is not None and dv.dtype != v.dtype:
        dv = dv.to(v.dtype)
    if dg is not None and dg.dtype != g.dtype:
        dg = dg.to(g.dtype)
    return dx, dv, dg, db


def _scaled_grad(
    lhs: Tensor, rhs: Tensor, v: Tensor, s: Tensor, dg: Tensor, n: Tensor, eps: float
) -> Tensor:
    """Returns `dV = lhsᵀ rhs - c ⊙ V`. One of the two factors includes the scale already."""
    dv = torch.mul(v, _dot_coefficient(s, dg, n, eps).neg_())
    return dv.addr_(lhs[0], rhs[0]) if len(lhs) == 1 else dv.addmm_(lhs.t(), rhs)


# --- convolution -------------------------------------------------------------------------------


def convolution(
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    conv: Geometry,
    dim: int | None,
    eps: float,
    variant: str,
    look: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns `(y, n)` for `x` of shape `(B, C, *sizes)`. `look` has the meaning of `norms`."""
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if variant == "materialize":
        w, n = weight_norm(v, g, dim, eps, x.dtype, look)
        return vendor.convolution(x, w, bias, conv), n
    n = norms(v, dim, eps, look)
    s = conv.per_channel(_scale(g, n), dim, x.ndim)
    if variant == "input":
        return vendor.convolution(x * s, v, bias, conv), n
    y = vendor.convolution(x, v, None, conv)
    if bias is None:
        return y.mul_(s), n
    return torch.addcmul(bias.view(-1, *[1] * (x.ndim - 2)), y, s, out=y), n


def convolution_backward(
    dy: Tensor,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    n: Tensor,
    conv: Geometry,
    dim: int | None,
    eps: float,
    variant: str,
    needs: Needs,
) -> Grads:
    """Returns `(dX, dV, dg, db)`, with `None` for those that `needs` excludes."""
    needs_x, needs_v, needs_g, needs_bias = needs
    needs_weight = needs_v or needs_g
    s = _scale(g, n)
    if variant == "input" and needs_x and needs_weight:
        # If the input is scaled, one call gives dX before its scale and s ⊙ dW.
        s_x = conv.per_channel(s, dim, x.ndim)
        dx, dv, db = convolution_grads(dy, x * s_x, v, conv, True, True, needs_bias)
        wide_dg = _channel_dots(x, dx, conv, dim).view_as(n).div_(n)
        dv.addcmul_(v, _dot_coefficient(s, wide_dg, n, eps), value=-1)
        return dx.mul_(s_x), dv, wide_dg.to(g.dtype), db

    dx = dv = None
    dg: Tensor | None = None
    if needs_x:
        if variant == "materialize":  # W is freed before dW is allocated
            w = _scaled_weight(v, s, x.dtype)
            dx, _, _ = convolution_grads(dy, x, w, conv, True, False, False)
            del w
        elif variant == "output":
            scaled_dy = dy * conv.per_channel(s, dim, x.ndim)
            dx, _, _ = convolution_grads(scaled_dy, x, v, conv, True, False, False)
        else:
            dx, _, _ = convolution_grads(dy, x, v, conv, True, False, False)
            dx.mul_(conv.per_channel(s, dim, x.ndim))
    _, dw, db = convolution_grads(dy, x, v.to(x.dtype), conv, False, needs_weight, needs_bias)
    if needs_weight:
        dv, dg = weight_norm_backward(dw, v, g, n, dim, eps, overwrite=True)
    return dx, dv, dg, db


def _channel_dots(x: Tensor, dx: Tensor, conv: Geometry, dim: int | None) -> Tensor:
    """Returns `a = ⟨dW, V⟩` of the slices along the input channels, from `dX` before its scale."""
    dots = x * dx
    if dim is None:
        return dots.sum()
    dots = channel_sums(dots)
    return dots.view(conv.groups, -1).sum(0) if dim == 1 else dots


# --- the signature that all backends share -------------------------------------------------------


def layer(
    call: Call, plan: Any, tensors: Operands, keep: bool, look: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Computes a call by `plan` and returns `(y, n, kept)`. `y` is the output, or `W` if there is
    no `x`. `n` are the norms. `kept` is the product that a linear layer saves for the backward if
    `keep` is true. The `x` of a linear layer is 2-d."""
    x, v, g, bias = tensors
    if x is None:
        return *weight_norm(v, g, call.dim, call.eps, call.x_dtype, look), None
    options = call.dim, call.eps, plan.forward
    if call.conv is not None:
        return *convolution(x, v, g, bias, call.conv, *options, look), None
    return linear(x, v, g, bias, *options, keep and plan.keeps == "product", look)


def layer_backward(
    call: Call,
    plan: Any,
    dy: Tensor,
    tensors: Operands,
    n: Tensor,
    kept: Tensor | None,
    needs: Needs,
) -> Grads:
    """Returns `(dX, dV, dg, db)`. A gradient that `needs` excludes is `None`, unless another output
    yields it at no extra cost."""
    x, v, g, _ = tensors
    if x is None:
        return None, *weight_norm_backward(dy, v, g, n, call.dim, call.eps), None
    options = call.dim, call.eps, plan.backward, needs
    if call.conv is not None:
        return convolution_backward(dy, x, v, g, n, call.conv, *options)
    return linear_backward(dy, x, v, g, n, kept, *options)

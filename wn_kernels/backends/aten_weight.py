"""The ATen path's passes over a weight: norms, `W` and its gradients, from operations of ATen.

The top of `aten.py` has the formulas.
"""

from __future__ import annotations

import ctypes
import math
import struct
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..call import NORM_RANGE, Call, Slices, kept_shape, recorder, reduced_dims, scale_dtype
from .reference import slope, slope_divisor

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
# place of `dW` needs no fresh result, which pays off from 8 MiB on if slices are rows.
FUSED_MAX = 1 << 23
IN_PLACE_MIN = 1 << 21
_FUSED_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))

# A `W` of a linear layer of at most this many bytes may be kept for the backward.
KEPT_MAX = 1 << 20

_fused_grad = torch.ops.aten._weight_norm_interface_backward.default


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Iterates over the tensors together, in blocks of rows that fit in cache."""
    first = tensors[0]
    rows = max(1, BLOCK // max(1, first[0].numel())) if len(first) else 1
    return zip(*(t.split(rows) for t in tensors), strict=True)


def _by_slice(
    dim: int | None,
    function: Callable[..., Tensor],
    *tensors: Tensor,
    reduce: Callable[..., Tensor] = torch.sum,
) -> Tensor:
    """Returns the sum, or another reduction, of a function of the tensors over every slice, with
    dimensions kept.

    It reads each tensor once and writes no result of full size. It goes through blocks in order.
    """
    dims = reduced_dims(tensors[0].ndim, dim)
    if not dims:
        return function(*tensors)
    if not tensors[0].numel():  # a maximum of nothing has no value
        return function(*tensors).sum(dims, keepdim=dim is not None)
    parts = [reduce(function(*rows), dims, keepdim=dim is not None) for rows in _blocks(*tensors)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if dim == 0 else reduce(torch.stack(parts), 0)


def _slice_dots(a: Tensor, b: Tensor, dim: int | None, dtype: torch.dtype) -> Tensor:
    """Returns `⟨A_j, B_j⟩` for every slice, with dimensions kept, accumulated in `dtype`."""
    return _by_slice(dim, lambda a, b: a.to(dtype) * b.to(dtype), a, b)


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


# At most this many norms are read as bytes.
FEW_NORMS = 512
_FORMATS = {torch.float32: ">f", torch.float64: ">d"}


def range_check(n: Tensor) -> Callable[[Tensor], bool]:
    """Returns what `is_in_range` returns, as a function for contiguous norms on a CPU of this
    number and dtype.

    The most significant byte of a number holds its sign and most of its exponent. Few norms are in
    range if these bytes are among those of which every number is in range. In a step whose work
    takes the caches, reading them takes 3 µs, and a reduction by ATen 8.
    """
    size, count = n.element_size(), n.numel()
    if not 0 < count <= FEW_NORMS:
        return is_in_range
    read = (ctypes.c_char * (size * count)).from_address
    first = size - 1 if sys.byteorder == "little" else 0
    within = _bytes_in_range(n.dtype)

    def look(n: Tensor) -> bool:
        return not read(n.data_ptr()).raw[first::size].translate(None, within) or is_in_range(n)

    return look


def _bytes_in_range(dtype: torch.dtype) -> bytes:
    """Returns the most significant bytes of which every number of a dtype is in range."""
    least, most = NORM_RANGE[dtype]

    def number(first: int, rest: int) -> float:
        return struct.unpack(_FORMATS[dtype], bytes([first, *[rest] * (dtype.itemsize - 1)]))[0]

    return bytes(b for b in range(128) if least <= number(b, 0) and number(b, 255) <= most)


def _check_range(v: Tensor, n: Tensor) -> None:
    """Raises `OutOfRange` if a norm is out of range. It checks tensors on a CPU only, because a
    check elsewhere would have to wait for the device."""
    if not v.is_cpu or not n.numel() or recorder(v) or is_in_range(n):
        return
    dead = n.isinf()  # the norm is zero or too large
    live = n[~dead]
    if (live.numel() and not is_in_range(live)) or torch.where(dead, v, 0.0).any():
        raise OutOfRange


def norms(v: Tensor, slices: Slices, look: bool = False) -> Tensor:
    """Returns `n` with the shape of `g`. The top of this file describes a slice of norm zero.

    Raises:
        OutOfRange: `look` is true, `v` is on a CPU and a norm is out of range.
    """
    dim, eps, norm = slices.dim, slices.eps, slices.norm
    dtype = v.dtype
    if dtype is not torch.float32:
        dtype = scale_dtype(v)
    if norm != "l2":  # these are many times as fast as `vector_norm`
        reduce = torch.sum if norm == "l1" else torch.amax
        n = _by_slice(dim, lambda rows: rows.to(dtype).abs(), v, reduce=reduce)
    elif dim == 0 and v.ndim == 2:
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
    v: Tensor, g: Tensor, slices: Slices, dtype: torch.dtype, look: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns `(W, n)`. `W` has `dtype` and `V`'s memory layout. `look` has the meaning of
    `norms`."""
    fused = fused_weight_norm(v, g, slices, dtype)
    if fused is not None:
        return fused[0].to(dtype), fused[1]
    n = norms(v, slices, look)
    return scaled_weight(v, scale(g, n), dtype), n


def fused_weight_norm(
    v: Tensor, g: Tensor, slices: Slices, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Returns `(W, n)` from torch's own kernel for a `W` of this dtype, or `None` if it does not
    serve the call. `W` has the dtype of `V` yet. The result is differentiable, but only once.

    The kernel returns NaN for a slice of norm zero, and its gradient divides by the norm's third
    power. The norms are therefore checked.
    """
    if fused_serves(v, g, slices, dtype) and not recorder(v):
        assert slices.dim is not None
        w, n = torch._weight_norm_interface(v, g, slices.dim)
        if is_in_range(n):
            return w, n
    return None


def suits_fused(v_dtype: torch.dtype, dtype: torch.dtype, numel: int) -> bool:
    """Returns whether torch's own kernel and a cast are a fast way to a `W` of `dtype`."""
    if v_dtype is dtype:
        return numel <= FUSED_MAX or dtype.itemsize == 2
    return dtype.itemsize < v_dtype.itemsize and numel <= IN_PLACE_MIN


def fused_serves(v: Tensor, g: Tensor, slices: Slices, dtype: torch.dtype) -> bool:
    """Returns whether torch's own kernel serves a weight, with a `W` or a `dW` of `dtype`."""
    return (
        (slices.dim == 0 or slices.dim == v.ndim - 1)
        and slices.eps == 0
        and slices.norm == "l2"
        and v.dtype is g.dtype
        and v.dtype in _FUSED_DTYPES
        and v.is_cpu
        and v.is_contiguous()
        and g.is_contiguous()
        and v.numel() > 0
        and v.ndim > 1
        and suits_fused(v.dtype, dtype, v.numel())
    )


def forms_at_once(call: Call) -> bool:
    """Returns whether torch's own kernel forms the `W` of a call whose tensors are contiguous and
    whose `g` has the dtype of `V`."""
    return (
        (call.dim == 0 or call.dim == len(call.v_shape) - 1)
        and call.eps == 0
        and call.norm == "l2"
        and call.v_dtype in _FUSED_DTYPES
        and len(call.v_shape) > 1
        and suits_fused(call.v_dtype, call.x_dtype, math.prod(call.v_shape))
    )


def keeps_weight(call: Call) -> bool:
    """Returns whether a layer may keep `W` for its backward, as eager PyTorch does.

    Where torch's own kernel forms `W` in half precision, forming it twice takes longer than eager
    does. So does a backward in Python of a linear layer whose `W` is small.
    """
    if not forms_at_once(call):
        return False
    small = call.x_dtype.itemsize * math.prod(call.v_shape) <= KEPT_MAX
    return call.x_dtype.itemsize == 2 or (call.conv is None and small)


def scale(g: Tensor, n: Tensor) -> Tensor:
    return g / n if g.dtype == n.dtype else g.to(n.dtype) / n


def scaled_weight(v: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    if v.dtype is s.dtype is dtype:
        return v * s
    w = torch.empty_like(v, dtype=dtype)
    if v.ndim == 0 or not v.numel():
        return w.copy_(v.to(s.dtype) * s)
    # The product in float32 stays in cache until it is rounded.
    for w_rows, v_rows, s_rows in _blocks(w, v, s.expand_as(v)):
        w_rows.copy_(v_rows.to(s.dtype) * s_rows)
    return w


def subtracted(
    v: Tensor, s: Tensor, dg: Tensor, n: Tensor, slices: Slices
) -> tuple[Tensor, Tensor]:
    """Returns `u`, which is `V` itself for l2, and `c = s · dg / d`: `dV = s ⊙ dW - c ⊙ u`. `c` is
    zero where `n` was clamped, because the norm is constant there."""
    u = slope(v, n, slices.norm)
    c = (s * dg).div_(slope_divisor(u, n, slices.dim, slices.norm))
    return u, c.masked_fill_(n <= slices.eps, 0.0) if slices.eps > 0 else c


def weight_norm_backward(
    dw: Tensor,
    v: Tensor,
    g: Tensor,
    n: Tensor,
    slices: Slices,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns `(dV, dg)` from `dW`, in the dtypes of `V` and `g`. `dV` has `V`'s layout unless `dW`
    may be overwritten."""
    is_large = v.numel() >= IN_PLACE_MIN and v.element_size() > 2
    in_place = overwrite and is_large and slices.dim == 0
    if not in_place and fused_serves(v, g, slices, dw.dtype) and dw.is_contiguous():
        return _fused_grad(dw.to(v.dtype), v, g, n, slices.dim)
    dv = dw if overwrite and dw.dtype is v.dtype else torch.empty_like(v)
    return dv, _write_weight_grad(dv, dw, v, g, n, slices)


def _write_weight_grad(
    dv: Tensor, dw: Tensor, v: Tensor, g: Tensor, n: Tensor, slices: Slices
) -> Tensor:
    """Writes `dV = s ⊙ dW - c ⊙ u`, which may take the memory of `dW`, and returns `dg`."""
    dim = slices.dim
    s = scale(g, n)
    if dim == 0 and dw.numel():  # a slice is a row, which stays in cache from its dot to its update
        dims = reduced_dims(v.ndim, 0)
        dgs = []
        for dv_rows, dw_rows, v_rows, s_rows, n_rows in _blocks(dv, dw, v, s, n):
            wide_dw, wide_v = dw_rows.to(n.dtype), v_rows.to(n.dtype)
            product = wide_dw * wide_v
            a = product.sum(dims, keepdim=True) if dims else product
            dg = a.div_(n_rows)
            u, c = subtracted(wide_v, s_rows, dg, n_rows, slices)
            _write_difference(dv_rows, wide_dw, u, s_rows, c)
            dgs.append(dg)
        dg = torch.cat(dgs)
    else:
        dg = _slice_dots(dw, v, dim, n.dtype).div_(n)
        u, c = subtracted(v, s, dg, n, slices)
        every = [(dv, dw, u)] if dw.ndim == 0 or not dw.numel() else _blocks(dv, dw, u)
        for dv_rows, dw_rows, u_rows in every:
            _write_difference(dv_rows, dw_rows.to(n.dtype), u_rows.to(n.dtype), s, c)
    return dg.to(g.dtype)


def _write_difference(dv: Tensor, dw: Tensor, u: Tensor, s: Tensor, c: Tensor) -> None:
    """Writes `dV = s ⊙ dW - c ⊙ u`. `dV` may be narrower than the other tensors."""
    if dv.dtype is dw.dtype:
        torch.mul(dw, s, out=dv).addcmul_(u, c, value=-1)
    else:
        dv.copy_((dw * s).addcmul_(u, c, value=-1))

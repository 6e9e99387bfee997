"""The definition: weight norm and the layers built on it, from differentiable ATen operations.

    n_j = ‖V_j‖₂,  with eps > 0: max(‖V_j‖₂, eps)
    s_j = g_j / n_j,  0 where n_j = 0
    W   = s ⊙ V

Norms and scales are computed and kept in float32, in float64 for a float64 `V`. The product runs
in the input's dtype. Every derivative of every order is the composite's own, and finite on a slice
of norm zero, whose direction is defined as zero. The other backends are tested against this file
in float64; a double backward and `torch.func` transforms run on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import Geometry, reduced_dims


def scale_dtype(v: Tensor) -> torch.dtype:
    """The dtype that norms and scales are kept in: float64 for float64, else float32."""
    return torch.float64 if v.dtype == torch.float64 else torch.float32


def narrows_range(x_dtype: torch.dtype, v_dtype: torch.dtype) -> bool:
    """Whether unscaled elements of `V` may leave the range of the product's dtype: a float16
    product of a wider `V`. Such a `V` has to be scaled before it is cast."""
    return x_dtype == torch.float16 and v_dtype != torch.float16


# The reader of the settings `fp32_precision` of torch 2.9 and later. A setting inherits from the
# more general one, and reads what the old settings have set. The old readers raise an error where
# a new setting is in use.
_fp32_precision = getattr(torch._C, "_get_fp32_precision_getter", None)


def takes_tf32(dtype: torch.dtype, op: str = "matmul") -> bool:
    """Whether PyTorch is set to take products of this dtype in TF32 on a GPU: those of cuBLAS for
    the op `"matmul"`, those of cuDNN for `"conv"`."""
    if dtype != torch.float32:
        return False
    if _fp32_precision is not None:
        return _fp32_precision("cuda", op) == "tf32"
    if op == "conv":
        return torch.backends.cudnn.allow_tf32
    return torch.get_float32_matmul_precision() != "highest"


def slice_scale(v: Tensor, g: Tensor, dim: int | None, eps: float) -> Tensor:
    """`s = g / n`, in `scale_dtype(v)`, with the shape of `g`."""
    v = v.to(scale_dtype(v))
    squares = v.square()
    if dims := reduced_dims(v.ndim, dim):  # to `sum`, an empty list would mean every dimension
        # The addition has a DTensor's partial sums reduced here, once.
        squares = squares.sum(dims, keepdim=dim is not None) + 0.0
    zero = squares == 0
    # The inner `where` keeps the infinite slope of the root at zero out of the graph: a product of
    # the outer mask's zero with it would be NaN.
    n = torch.where(zero, 1.0, squares).sqrt()
    if eps > 0:
        n = torch.where(zero | (n <= eps), eps, n)
        zero = torch.zeros_like(zero)
    return torch.where(zero, 0.0, g.to(n.dtype) / n)


def weight_norm(
    v: Tensor, g: Tensor, dim: int | None, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """`W = s ⊙ V` in `dtype` (`V`'s own by default)."""
    return (v * slice_scale(v, g, dim, eps)).to(dtype or v.dtype)


def linear(
    x: Tensor, v: Tensor, g: Tensor, bias: Tensor | None, dim: int | None, eps: float
) -> Tensor:
    """`y = x Wᵀ + b` for `x` of shape `(*, K)` and `V` of shape `(N, K)`, in `x`'s dtype."""
    w = weight_norm(v, g, dim, eps, x.dtype)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype))


def convolution(
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    conv: Geometry,
    dim: int | None,
    eps: float,
) -> Tensor:
    """The convolution of `x`, `(B, C, *sizes)`, with `W`, plus the bias, in `x`'s dtype."""
    w = weight_norm(v, g, dim, eps, x.dtype)
    return torch.convolution(x, w, None if bias is None else bias.to(x.dtype), *conv)


def in_float64(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """A function of this file, computed in float64 and returned in its first argument's dtype."""
    wide = (t.double() if isinstance(t, Tensor) else t for t in arguments)
    return function(*wide).to(arguments[0].dtype)

"""The convolutions: which kernels make up each variant, forward and backward.

    one_pass     the norms in the loop of the product, one launch
    scaled       the norms first, the scale in the product
    packed       one kernel builds W in the product's dtype with channels last, then the product
    materialize  one kernel builds W, then the vendor's convolution

`conv_product.py` has the products, `conv_grad.py` the gradient of the weight, which one kernel
turns into `dV` and `dg` (`weight.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...call import Geometry, narrows_range, scale_dtype
from .. import vendor
from ..aten import convolution_grads
from . import configs, weight
from .conv_grad import weight_grad
from .conv_product import product
from .norm import slice_norms
from .pixels import empty_channels_last


def _form(conv: Geometry, dim: int | None, narrows: bool, forward: bool) -> str:
    """The form that scales in the product itself, norms being ready."""
    axis = conv.scale_axis(dim)
    if axis == "whole" or axis == ("output" if forward else "input"):
        return "prologue_o" if narrows else "epilogue"
    return "prologue_r"


def _packed(
    v: Tensor, g: Tensor, dim: int | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`(W, n)`, `W` in `dtype` and with channels last."""
    out = empty_channels_last(v, v.shape[0], v.shape[1], v.shape[2:], dtype)
    return weight.weight_norm(v, g, dim, eps, dtype, out=out)


def _gives_channels_last(x: Tensor, v: Tensor) -> bool:
    """Whether PyTorch's convolution of these would return channels-last memory."""
    if x.ndim == 3:
        return False
    memory_format = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return any(
        t.is_contiguous(memory_format=memory_format) and not t.is_contiguous() for t in (x, v)
    )


def convolution(
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    conv: Geometry,
    dim: int | None,
    eps: float,
    variant: str,
    *,
    config: configs.MatmulConfig | configs.DirectConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`(y, n)` for `x` of shape `(B, C, *sizes)`; variants as in `costs.triton_convolution`."""
    g = g.contiguous()
    if variant == "materialize":
        w, n = weight.weight_norm(v, g, dim, eps, x.dtype)
        return vendor.convolution(x, w, None if bias is None else bias.to(x.dtype), conv), n
    sizes = conv.output_sizes(x.shape[2:], v.shape[2:])
    form, w = variant, v
    if variant == "packed":
        w, n = _packed(v, g, dim, eps, x.dtype)
    elif variant == "one_pass":
        if not conv.owns_slices(dim):
            raise ValueError(f"one_pass needs whole slices in each output channel, got dim={dim}")
        n = v.new_empty(g.shape, dtype=scale_dtype(v))
        if x.shape[0] == 0:  # no program would run
            n = slice_norms(v, dim, eps)
    else:
        n = slice_norms(v, dim, eps)
        form = _form(conv, dim, narrows_range(x.dtype, v.dtype), forward=True)
    y = product(x, w, g, n, bias, sizes, conv, conv.transposed, dim, form, eps, config)
    return y if _gives_channels_last(x, v) else y.contiguous(), n


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
    needs: tuple[bool, bool, bool, bool],
    *,
    config: configs.MatmulConfig | configs.DirectConfig | None = None,
    grad_config: configs.GradConfig | configs.DirectConfig | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`(dX, dV, dg, db)`, `None` where `needs` says so and no other output brings it along."""
    g = g.contiguous()
    needs_x, needs_v, needs_g, needs_bias = needs
    dx = dv = dg = db = None
    if variant == "materialize":
        w = weight.weight_norm(v, g, dim, eps, x.dtype)[0] if needs_x else v.to(x.dtype)
        dx, dw, db = convolution_grads(dy, x, w, conv, needs_x, needs_v or needs_g, needs_bias)
        if dw is not None:
            dv, dg = weight.weight_norm_backward(dw, v, g, n, dim, eps)
        return dx, dv, dg, db
    if needs_x:
        w, form = v, "packed"
        if variant == "packed":
            w, _ = _packed(v, g, dim, eps, x.dtype)
        else:
            form = _form(conv, dim, narrows_range(x.dtype, v.dtype), forward=False)
        sizes, phased = x.shape[2:], not conv.transposed
        dx = product(dy, w, g, n, None, sizes, conv, phased, dim, form, eps, config)
    if needs_v or needs_g:
        dw, db = weight_grad(dy, x, v, conv, needs_bias, grad_config)
        dv, dg = weight.weight_norm_backward(dw, v, g, n, dim, eps)
    if needs_bias and db is None:
        db = dy.sum([i for i in range(dy.ndim) if i != 1])
    return dx, dv, dg, db

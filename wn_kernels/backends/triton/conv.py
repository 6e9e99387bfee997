"""The convolutions: which kernels make up each variant, forward and backward.

    one_pass     the norms in the loop of the product, one launch
    scaled       the norms first, the scale in the product
    packed       one kernel builds W in the product's dtype with channels last, then the product
    materialize  one kernel builds W, then the vendor's convolution

`conv_product.py` has the products, `conv_grad.py` the gradient of the weight, which one kernel
turns into `dV` and `dg` (`weight.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...call import Geometry, narrows_range, scale_dtype, takes_tf32
from .. import vendor
from ..aten import convolution_grads
from . import configs, weight
from .configs import Target
from .conv_grad import prepare_weight_grad
from .conv_product import prepare_product
from .launch import remembered, target_of, unallocated
from .norm import remembered_slice_norms
from .passes import Pass
from .pixels import channels_last, repacker


def _form(conv: Geometry, dim: int | None, narrows: bool, forward: bool) -> str:
    """The form that scales in the product itself, norms being ready."""
    axis = conv.scale_axis(dim)
    if axis == "whole" or axis == ("output" if forward else "input"):
        return "prologue_o" if narrows else "epilogue"
    return "prologue_r"


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
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return vendor.convolution(x, w, bias, conv), n
    options = conv, dim, eps, variant, takes_tf32(x.dtype, "conv"), config
    return _convolution(target_of(x), (x, v, g, bias), *options)(x, v, g, bias)


def prepare_convolution(
    target: Target,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    conv: Geometry,
    dim: int | None,
    eps: float,
    variant: str,
    tf32: bool,
    config: configs.MatmulConfig | configs.DirectConfig | None = None,
) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    """`run(x, v, g, bias)` returns `(y, n)`."""
    sizes = conv.output_sizes(x.shape[2:], v.shape[2:])
    narrows = narrows_range(x.dtype, v.dtype)
    form = _form(conv, dim, narrows, forward=True) if variant == "scaled" else variant
    if variant == "one_pass" and not conv.owns_slices(dim):
        raise ValueError(f"one_pass needs whole slices in each output channel, got dim={dim}")
    weights = _prepare_weights(target, x, v, g, dim, eps, variant)
    w = weight.packed(v, x.dtype) if variant == "packed" else v
    transposed = conv.transposed
    product = prepare_product(
        target, x, w, bias, sizes, conv, transposed, dim, form, eps, tf32, config
    )
    repacks = not _gives_channels_last(x, v)

    def run(x: Tensor, v: Tensor, g: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        w, n = weights(v, g)
        y = product(x, w, g, n, bias)
        return y.contiguous() if repacks else y, n

    return run


_convolution = remembered(prepare_convolution)


def _prepare_weights(
    target: Target,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    dim: int | None,
    eps: float,
    variant: str,
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`run(v, g)` returns what a product multiplies by, `V` or a packed `W`, and the norms, which
    `one_pass` has yet to fill in."""
    if variant == "packed":
        options = dim, eps, x.dtype, None, None, True
        return weight.remembered_weight_norm(target, (v, g), *options)
    run = Pass("v", "g")
    if variant == "one_pass" and len(x):  # without an input, no program would run
        run.new(n=unallocated(g.shape, scale_dtype(v)))
    else:
        run.call(remembered_slice_norms(target, (v,), dim, eps), "v", gives=("n",))
    return run.returning("v", "n")


Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


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
) -> Grads:
    """`(dX, dV, dg, db)`, `None` where `needs` says so and no other output brings it along."""
    g = g.contiguous()
    options = conv, dim, eps, variant, needs, takes_tf32(x.dtype, "conv"), config, grad_config
    return _convolution_backward(target_of(x), (dy, x, v, g), *options)(dy, x, v, g, n)


def prepare_convolution_backward(
    target: Target,
    dy: Tensor,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    conv: Geometry,
    dim: int | None,
    eps: float,
    variant: str,
    needs: tuple[bool, bool, bool, bool],
    tf32: bool,
    config: configs.MatmulConfig | configs.DirectConfig | None = None,
    grad_config: configs.GradConfig | configs.DirectConfig | None = None,
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Grads]:
    """`run(dy, x, v, g, n)` returns `(dX, dV, dg, db)`."""
    needs_x, needs_v, needs_g, needs_bias = needs
    needs_weight = needs_v or needs_g
    if variant == "materialize":
        return _prepare_materialized_backward(target, x, v, g, conv, dim, eps, needs)
    repack_dy = repacker(dy)  # once for both products
    dy = channels_last(dy)
    if needs_x:
        packed = variant == "packed"
        w, form = (weight.packed(v, x.dtype), "packed") if packed else (v, "")
        if packed:
            weight_norm = _prepare_weights(target, x, v, g, dim, eps, "packed")
        else:
            form = _form(conv, dim, narrows_range(x.dtype, v.dtype), forward=False)
        sizes, phased = x.shape[2:], not conv.transposed
        product = prepare_product(
            target, dy, w, None, sizes, conv, phased, dim, form, eps, tf32, config
        )
    if needs_weight:
        weight_grad, dw = prepare_weight_grad(target, dy, x, v, conv, needs_bias, tf32, grad_config)
        finish = weight.remembered_weight_norm_backward(target, (dw, v, g), dim, eps)
    others = [i for i in range(dy.ndim) if i != 1]

    def run(dy: Tensor, x: Tensor, v: Tensor, g: Tensor, n: Tensor) -> Grads:
        dx = dv = dg = db = None
        dy = repack_dy(dy)
        if needs_x:
            w = weight_norm(v, g)[0] if packed else v
            dx = product(dy, w, g, n, None)
        if needs_weight:
            dw, db = weight_grad(dy, x)
            dv, dg = finish(dw, v, g, n)
        if needs_bias and db is None:
            db = dy.sum(others)
        return dx, dv, dg, db

    return run


_convolution_backward = remembered(prepare_convolution_backward)


def _prepare_materialized_backward(
    target: Target,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    conv: Geometry,
    dim: int | None,
    eps: float,
    needs: tuple[bool, bool, bool, bool],
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Grads]:
    """The same around the vendor's convolution, the layout of whose `dW` it alone determines."""
    needs_x, needs_v, needs_g, needs_bias = needs
    weight_norm = weight.remembered_weight_norm(target, (v, g), dim, eps, x.dtype)

    def run(dy: Tensor, x: Tensor, v: Tensor, g: Tensor, n: Tensor) -> Grads:
        w = weight_norm(v, g)[0] if needs_x else v.to(x.dtype)
        dx, dw, db = convolution_grads(dy, x, w, conv, needs_x, needs_v or needs_g, needs_bias)
        dv = dg = None
        if dw is not None:
            dv, dg = weight.weight_norm_backward(dw, v, g, n, dim, eps)
        return dx, dv, dg, db

    return run

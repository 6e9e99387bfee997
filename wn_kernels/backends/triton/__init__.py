"""The Triton kernels and their launchers, one file per operation.

Importing this package imports triton.
"""

from typing import Any

from torch import Tensor

from ...call import Call, Grads, Needs, Operands
from .conv import convolution, convolution_backward
from .linear import linear, linear_backward
from .norm import slice_norms
from .weight import weight_norm, weight_norm_backward

__all__ = [
    "convolution",
    "convolution_backward",
    "layer",
    "layer_backward",
    "linear",
    "linear_backward",
    "slice_norms",
    "weight_norm",
    "weight_norm_backward",
]


def layer(
    call: Call, plan: Any, tensors: Operands, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(y, n, kept)`, as `aten.layer`; nothing is kept."""
    x, v, g, bias = tensors
    if x is None:
        return *weight_norm(v, g, call.dim, call.eps, call.x_dtype), None
    options = call.dim, call.eps, plan.forward
    if call.conv is not None:
        return *convolution(x, v, g, bias, call.conv, *options), None
    return *linear(x, v, g, bias, *options), None


def layer_backward(
    call: Call,
    plan: Any,
    dy: Tensor,
    tensors: Operands,
    n: Tensor,
    kept: Tensor | None,
    needs: Needs,
) -> Grads:
    """`(dX, dV, dg, db)`, as `aten.layer_backward`."""
    x, v, g, _ = tensors
    if x is None:
        return None, *weight_norm_backward(dy, v, g, n, call.dim, call.eps), None
    options = call.dim, call.eps, plan.backward, needs
    if call.conv is not None:
        return convolution_backward(dy, x, v, g, n, call.conv, *options)
    return linear_backward(dy, x, v, g, n, *options)

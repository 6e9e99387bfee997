"""The Triton kernels and their launchers, one file per operation.

Importing this package imports triton.
"""

from typing import Any

from torch import Tensor

from ...call import Call, Grads, Needs, Operands
from .conv import (
    convolution,
    convolution_backward,
    remembered_convolution,
    remembered_convolution_backward,
)
from .launch import SIGNS, kept_product, target_of
from .linear import linear, linear_backward, remembered_linear, remembered_linear_backward
from .norm import slice_norms
from .passes import Pass
from .weight import (
    packed,
    remembered_weight_norm,
    remembered_weight_norm_backward,
    weight_norm,
    weight_norm_backward,
)

__all__ = [
    "SIGNS",
    "convolution",
    "convolution_backward",
    "layer",
    "layer_backward",
    "linear",
    "linear_backward",
    "pass_backward",
    "pass_forward",
    "slice_norms",
    "weight_norm",
    "weight_norm_backward",
]


def layer(
    call: Call, plan: Any, tensors: Operands, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(y, n, kept)`, as `aten.layer`."""
    x, v, g, bias = tensors
    if x is None:
        return *weight_norm(v, g, call.dim, call.eps, call.x_dtype, norm=call.norm), None
    options = call.dim, call.eps, plan.forward
    if call.conv is not None:
        y, n, w = convolution(x, v, g, bias, call.conv, *options, norm=call.norm)
        return y, n, w if keep and plan.keeps else None
    keep = keep and plan.keeps == "product"
    y, n, *kept = linear(x, v, g, bias, *options, keep, norm=call.norm)
    return y, n, kept[0] if kept else None


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
        grads = weight_norm_backward(dy, v, g, n, call.dim, call.eps, norm=call.norm)
        return None, *grads, None
    options = call.dim, call.eps, plan.backward, needs
    if call.conv is not None:
        operands = dy, x, v, g, n
        return convolution_backward(*operands, call.conv, *options, kept, norm=call.norm)
    return linear_backward(dy, x, v, g, n, *options, kept, norm=call.norm)


def pass_forward(call: Call, plan: Any, tensors: Operands, keep: bool = False) -> Pass | None:
    """The pass that computes `layer` for tensors of these layouts, `x` of a linear layer being 2-d;
    `None` where more happens than allocations, launches and PyTorch's own products. With `keep` it
    returns what the plan keeps behind the norms; that of a convolution always does."""
    x, v, g, bias = tensors
    target, options = target_of(v), (call.dim, call.eps, call.norm)
    if x is None:
        return _as_pass(remembered_weight_norm(target, (v, g), *options, call.x_dtype))
    how = plan.forward, call.tf32
    if call.conv is not None:
        run = remembered_convolution(target, (x, v, g, bias), call.conv, *options, *how)
        return _as_pass(run)
    keep = keep and plan.keeps == "product"
    return _as_pass(remembered_linear(target, (x, v, g, bias), *options, *how, keep))


def pass_backward(
    call: Call, plan: Any, dy: Tensor, tensors: Operands, needs: Needs
) -> Pass | None:
    """The pass that computes `layer_backward`, or `None`, as `pass_forward`. For the weight alone
    its arguments are `(dW, v, g, n)`, and its results `(dV, dg)`."""
    x, v, g, _ = tensors
    target, options = target_of(v), (call.dim, call.eps, call.norm)
    if x is None:
        return _as_pass(remembered_weight_norm_backward(target, (dy, v, g), *options))
    how = plan.backward, needs, call.tf32
    if call.conv is not None:
        kept = packed(v, call.x_dtype) if plan.keeps == "packed" else None
        given = dy, x, v, g, kept
        run = remembered_convolution_backward(target, given, call.conv, *options, *how)
        return _as_pass(run)
    kept = kept_product(x, v, call.norm) if plan.keeps == "product" else None
    return _as_pass(remembered_linear_backward(target, (dy, x, v, g, kept), *options, *how))


def _as_pass(run: Any) -> Pass | None:
    return run if isinstance(run, Pass) and run.needs_no_python() else None

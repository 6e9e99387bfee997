"""The `torch.autograd.Function` of every layer.

First derivatives run on the backend that served the forward. A backward that is itself being
differentiated (`create_graph=True`) runs on the composite formula of `backends/reference.py`,
whose derivatives of every order are right.

The Function saves neither its output, so an in-place activation after the layer works, nor `W`.
Where the plan keeps a small `W`, the weight is differentiable and PyTorch's own layer does the
rest, without Python in its backward.

The Function takes `ctx` in `forward` because the `setup_context` form costs 40 µs more a call (it
binds the arguments through `inspect`). `torch.func` transforms, which need that form, are served by
the composite formula.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import operators
from .backends import aten, reference, vendor
from .call import Call, Operands
from .plan import Plan


class Layer(torch.autograd.Function):
    """`y = layer(x, W, b)` with `W = g · V / ‖V‖`; `W` itself where there is no `x`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor | None,
        v: Tensor,
        g: Tensor,
        bias: Tensor | None,
        call: Call,
        plan: Plan,
    ) -> Tensor:
        needs = ctx.needs_input_grad
        tensors = Operands(x, v, g, bias)
        keep = needs[0] if plan.keeps == "packed" else needs[1] or needs[2]
        y, n, kept = operators.layer(call, plan, tensors, keep)
        ctx.save_for_backward(x, v, g, bias, n, kept)
        ctx.call, ctx.plan = call, plan
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *saved, n, kept = ctx.saved_tensors
        call, tensors, needs = ctx.call, Operands(*saved), ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            options = call.conv, call.dim, call.eps
            return *reference.differentiable_grads(dy, *tensors, *options, needs), None, None
        dx, dv, dg, db = operators.layer_backward(call, ctx.plan, dy, tensors, n, kept, needs)
        if db is not None and tensors.bias is not None and db.dtype != tensors.bias.dtype:
            db = db.to(tensors.bias.dtype)
        return dx, dv, dg, db, None, None


def layer(call: Call, plan: Plan, tensors: Operands) -> Tensor:
    """The call of a layer, differentiable."""
    x, v, g, bias = tensors
    if plan.keeps == "weight" and x is not None:
        w = layer(call, plan, Operands(None, v, g, None))  # without x, of W alone
        if bias is not None and bias.dtype != w.dtype:
            bias = bias.to(w.dtype)
        if call.conv is None:
            return F.linear(x, w, bias)
        return vendor.convolution(x, w, bias, call.conv)
    if x is None and plan.backend == "aten" and plan.forward:
        fused = _fused_weight(v, g, call)
        if fused is not None:
            return fused
    return Layer.apply(x, v, g, bias, call, plan)


def _fused_weight(v: Tensor, g: Tensor, call: Call) -> Tensor | None:
    """`W` by torch's own kernel, where that serves."""
    if v.is_leaf:  # the hook holds on to `V`, which makes no difference for a leaf
        fused = aten.fused_weight_norm(v, g, call.dim, call.eps, call.x_dtype)
        if fused is not None:
            w = fused[0]
            if w.grad_fn is not None:
                w.grad_fn.register_hook(functools.partial(_right_second_order, v, g, call.dim))
            return w
    return None


def _right_second_order(
    v: Tensor,
    g: Tensor,
    dim: int | None,
    grad_inputs: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor],
) -> tuple[Tensor | None, ...] | None:
    """Replaces torch's own backward of `W` where that is itself differentiated: its derivative
    takes the norm for a constant."""
    if not torch.is_grad_enabled():
        return None
    needs = (False, *(grad is not None for grad in grad_inputs))
    dw = grad_outputs[0]
    return tuple(reference.differentiable_grads(dw, None, v, g, None, None, dim, 0.0, needs)[1:3])

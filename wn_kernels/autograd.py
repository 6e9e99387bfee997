"""The `torch.autograd.Function` of every layer, that of its weight's gradients, and that of norms.

First derivatives run on the backend that served the forward. So does a backward that is itself
being differentiated (`create_graph=True`). It is recorded as `W`, PyTorch's own products with it,
which PyTorch differentiates, and `(dV, dg)` as a function of `dW`, `V` and `g`, whose derivative is
a closed formula (`backends/reference.py`). The forward does not run again. Third derivatives come
from the formula's own operations.

The Function saves neither its output, so an in-place activation after the layer works, nor `W`.
Where the plan keeps a small `W`, the weight is differentiable and PyTorch's own layer does the
rest, without Python in its backward.

The Function takes `ctx` in `forward` because the `setup_context` form costs 40 µs more a call (it
binds the arguments through `inspect`). `torch.func` transforms, which need that form, are served by
the composite formula.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import operators
from . import plan as plans
from .backends import aten, aten_weight, reference, vendor
from .call import Call, Geometry, Grads, Needs, Norm, Operands, recorder
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
        ctx.save_for_backward(x, v, g, n, kept)  # not the bias, which may change before a backward
        ctx.call, ctx.plan, ctx.bias_dtype = call, plan, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, v, g, n, kept = ctx.saved_tensors
        call, tensors, needs = ctx.call, Operands(x, v, g, None), ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            weight, needs = _weight_of(call, ctx.plan), needed(ctx, x is not None, needs)
            return *recorded_grads(weight, call.conv, dy, tensors, n, needs), None, None
        dx, dv, dg, db = operators.layer_backward(call, ctx.plan, dy, tensors, n, kept, needs)
        if db is not None and db.dtype != ctx.bias_dtype:
            db = db.to(ctx.bias_dtype)
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
    fused = aten.fused_weight_norm(v, g, call, call.x_dtype)
    if fused is None:
        return None
    w, _ = fused
    if w.grad_fn is not None:
        mend_second_order(w.grad_fn)
    return w.to(call.x_dtype)


def mend_second_order(node: Any) -> None:
    """Gives torch's own node of `W` a right derivative of its backward, which takes the norm for a
    constant.

    All nodes share one hook. `Node.register_hook` takes three times as long, as it makes a
    dictionary and a handle for each node.
    """
    node._register_hook_dict(_hooked)


def _mend_if_recorded(dw: Tensor) -> None:
    """Before the backward of a node of `W`: if that backward is itself differentiated, the node
    gets a hook that replaces its result."""
    if not torch.is_grad_enabled():
        return
    node: Any = torch._C._current_autograd_node()
    v, g, n = node._saved_v, node._saved_g, node._saved_result1
    call = Call(torch.Size(()), v.shape, v.dtype, v.dtype, node._saved_dim)

    def replaced(
        grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        handle.remove()
        needs_v, needs_g = (grad is not None for grad in grad_inputs)
        weight = _weight_of(call, Plan("aten", "materialize", "materialize"))
        needs = False, needs_v, needs_g, False
        operands = Operands(None, v, g, None)
        return recorded_grads(weight, None, grad_outputs[0], operands, n, needs)[1:3]

    handle = node.register_hook(replaced)


# PyTorch takes the hooks of a node from a tensor.
_hooked = torch.empty(0)
_hooked._backward_hooks = OrderedDict({0: _mend_if_recorded})


# --- norms ---------------------------------------------------------------------------------------


class SliceNorm(torch.autograd.Function):
    """The norms `n` of the slices of a `V` on a CPU. Their gradient is `dV = dn / d ⊙ u`."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, n: Tensor, dim: int | None, norm: Norm) -> Tensor:
        ctx.save_for_backward(v, n)
        ctx.options = dim, norm
        return n.clone()

    @staticmethod
    def backward(ctx: Any, dn: Tensor) -> tuple[Tensor | None, ...]:
        v, n = ctx.saved_tensors
        dim, norm = ctx.options
        if torch.is_grad_enabled() or recorder(dn):
            with torch.enable_grad():
                v = v if v.requires_grad else v.detach().requires_grad_()
                n = reference.slice_norm(v, dim, norm)
            options = {"create_graph": torch.is_grad_enabled()}
            return *torch.autograd.grad(n, v, dn.to(n.dtype), **options), None, None, None
        n = torch.where(n == 0, torch.inf, n)
        u = reference.slope(v, n, norm)
        s = dn / reference.slope_divisor(u, n, dim, norm)
        return aten_weight.scaled_weight(u, s, v.dtype), None, None, None


def slice_norm(v: Tensor, dim: int | None, norm: Norm) -> Tensor:
    """The norms of slices, differentiable. On a CPU they are those of the backends, if they are in
    the range of the formulas there."""
    if not v.is_cpu or plans.forced() == "reference" or recorder(v) or v.ndim < 2 or not v.numel():
        return reference.slice_norm(v, dim, norm)
    with torch.no_grad():
        n = _slice_norm(v, dim, norm)
    if n is None:
        return reference.slice_norm(v, dim, norm)
    if torch.is_grad_enabled() and v.requires_grad:
        return SliceNorm.apply(v, n, dim, norm)
    return n


def _slice_norm(v: Tensor, dim: int | None, norm: Norm) -> Tensor | None:
    n = operators.slice_norm(v, dim, norm)
    if n is not None:
        return n
    call = Call(torch.Size(()), v.shape, v.dtype, v.dtype, dim, norm=norm)
    try:
        n = aten_weight.norms(v, call, look=True)
    except aten.OutOfRange:
        return None
    return n.masked_fill_(n.isinf(), 0.0)


# --- a backward that is differentiated -----------------------------------------------------------


class Weight(NamedTuple):
    """The weight alone, on the path of a layer.

    Attributes:
        form: a function of `(V, g)` that returns `W` as part of the graph.
        grads: a function of `(dW, V, g, n)` that returns `(dV, dg)`.
        dim, eps, norm: as in `Call`.
    """

    form: Callable[[Tensor, Tensor], Tensor]
    grads: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Any, Any]]
    dim: int | None
    eps: float
    norm: Norm


ONLY_WEIGHT: Needs = (False, True, True, False)


def _weight_of(call: Call, plan: Plan) -> Weight:
    call, plan = call.of_weight(), plan.of_weight()

    def form(v: Tensor, g: Tensor) -> Tensor:
        return layer(call, plan, Operands(None, v, g, None))

    def grads(dw: Tensor, v: Tensor, g: Tensor, n: Tensor) -> tuple[Any, Any]:
        tensors = Operands(None, v, g, None)
        found = operators.layer_backward(call, plan, dw, tensors, n, None, ONLY_WEIGHT)
        return found[1], found[2]

    return Weight(form, grads, call.dim, call.eps, call.norm)


class WeightGrads(torch.autograd.Function):
    """`(dV, dg)` of `dW`, the backward of the weight alone. `n` are the norms of the forward."""

    @staticmethod
    def forward(
        ctx: Any, dw: Tensor, v: Tensor, g: Tensor, n: Tensor, weight: Weight
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(dw, v, g, n)
        ctx.options = weight.dim, weight.eps, weight.norm
        return weight.grads(dw, v, g, n)

    @staticmethod
    def backward(ctx: Any, ddv: Tensor, ddg: Tensor) -> tuple[Tensor | None, ...]:
        dw, v, g, n = ctx.saved_tensors
        n = None if torch.is_grad_enabled() else n
        grads = reference.weight_grads_backward(ddv, ddg, dw, v, g, n, *ctx.options)
        return *grads, None, None


def recorded_grads(
    weight: Weight,
    conv: Geometry | None,
    dy: Tensor,
    tensors: Operands,
    n: Tensor,
    needs: Needs,
) -> Grads:
    """Returns `(dX, dV, dg, db)` of a layer as part of the graph. A gradient that `needs` excludes
    may be `None`. `n` are the norms of the forward."""
    x, v, g, _ = tensors
    if recorder(dy) == "composite":  # such as a batch of gradients
        options = conv, weight.dim, weight.eps, needs, weight.norm
        return reference.differentiable_grads(dy, None, x, v, g, *options)
    needs_x, needs_v, needs_g, needs_bias = needs
    needs_weight = needs_v or needs_g
    dx, dw, db = None, dy, None
    if x is not None:
        # Without dX, the weight's values play no part.
        w = (weight.form(v, g) if needs_x else v.detach()).to(x.dtype)
        wanted = needs_x, needs_weight, needs_bias
        if conv is None:
            dx, dw, db = vendor.linear_grads(dy, x, w, *wanted)
        else:
            dx, dw, db = vendor.convolution_grads(dy, x, w, conv, *wanted)
    dv, dg = WeightGrads.apply(dw, v, g, n, weight) if needs_weight else (None, None)
    return dx, dv, dg, db


def needed(ctx: Any, has_input: bool, needs: Needs) -> Needs:
    """Returns which gradients the backward in progress needs, of those that `needs` includes.

    `ctx.needs_input_grad` includes those that `torch.autograd.grad` was not asked for. The products
    of these would be recorded for nothing.
    """
    nodes = [node for node, _ in ctx.next_functions]  # one for each tensor
    given = has_input, True, True, len(nodes) > has_input + 2
    each = iter(nodes)
    return tuple(  # type: ignore[return-value]
        is_given and (_will_run(next(each)) and need)
        for is_given, need in zip(given, needs, strict=True)
    )


def _will_run(node: Any) -> bool:
    """Returns whether the backward in progress runs a node, or returns its gradient."""
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient is returned cannot be looked up
        return True

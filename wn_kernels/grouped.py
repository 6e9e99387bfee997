"""The weights of many layers in one call: one `autograd.Function` and one operator over lists.

    weight_norms           (v, g)           -> (w, n)
    weight_norms_backward  (dW, v, g, n)    -> (dV, dg)

Every tensor has its own shape, dtype, layout, `dim`, `eps` and dtype of `W`. A backend computes all
of them with as few launches as it can: one in each direction by a Triton kernel (see
`backends/triton/group.py`), one call of the native library, whose node is its own, and on the ATen
path one operation for most weights.

A weight that the backward has no gradient for, since its layer was not used, has no `dV` and `dg`
either. A backward that is itself differentiated is recorded weight by weight, as in `autograd.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import plan as plans
from .autograd import ONLY_WEIGHT, Weight, recorded_grads
from .backends import foreach
from .call import Member, Operands, kept_shape, recorder, scale_dtype
from .operators import laid_out_like, register


class Group(NamedTuple):
    """Describes a call: the options of every weight, and the backend that computes them. Under a
    compiler the backend is `""`, and the operator chooses it when it runs. `places` is memory that
    the weights may be written to."""

    members: tuple[Member, ...]
    backend: str
    places: Sequence[Tensor] | None = None

    def only(self, indices: Sequence[int]) -> Group:
        """Returns the group of some of the weights."""
        return self._replace(members=tuple([self.members[i] for i in indices]))


def weight_norms(group: Group, v: Sequence[Tensor], g: Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns every `W`, differentiable. Each `g` has the kept shape.

    Raises:
        aten.OutOfRange: a norm on a CPU is beyond the formulas of the ATen path.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*v, *g)):
        return WeightNorms.apply(group, *v, *g)  # type: ignore[no-any-return]
    return _forward(group, v, g)[0]


class WeightNorms(torch.autograd.Function):
    """`W_i = g_i · V_i / ‖V_i‖` of a group."""

    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(tensors) // 2
        w, n = _forward(group, tensors[:count], tensors[count:])
        ctx.save_for_backward(*tensors, *n)
        ctx.group = group._replace(places=None)  # they are the outputs
        if not torch.compiler.is_compiling():  # a compiler does not trace this
            ctx.set_materialize_grads(False)
        return tuple(w)

    @staticmethod
    def backward(ctx: Any, *dw: Tensor | None) -> tuple[Tensor | None, ...]:
        group, count = ctx.group, len(dw)
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[1:]
        grads: list[Tensor | None] = [None] * (2 * count)
        used = [i for i in range(count) if dw[i] is not None and (needs[i] or needs[count + i])]
        if used:
            v, g, n = ([saved[i + part] for i in used] for part in (0, count, 2 * count))
            given: list[Any] = [dw[i] for i in used]
            for found, part in zip(_grads(group.only(used), given, v, g, n), (0, count)):
                for i, grad in zip(used, found, strict=True):
                    grads[i + part] = grad
        return None, *grads


Lists = tuple[Sequence[Tensor], Sequence[Tensor]]


def _grads(
    group: Group,
    dw: Sequence[Tensor],
    v: Sequence[Tensor],
    g: Sequence[Tensor],
    n: Sequence[Tensor],
) -> Any:
    """Returns the lists of all `dV` and `dg`, as part of the graph where it is being made."""
    if not torch.is_grad_enabled() and not any(recorder(t) == "composite" for t in dw):
        return _backward(group, dw, v, g, n)
    found = []
    for i, tensors in enumerate(zip(dw, v, g, n, strict=True)):
        operands = Operands(None, tensors[1], tensors[2], None)
        weight = _weight_of(group.only([i]))
        found.append(recorded_grads(weight, None, tensors[0], operands, tensors[3], ONLY_WEIGHT))
    return [grads[1] for grads in found], [grads[2] for grads in found]


def _weight_of(group: Group) -> Weight:
    """Returns one weight of a group, for its derivatives."""

    def form(v: Tensor, g: Tensor) -> Tensor:
        return weight_norms(group, [v], [g])[0]

    def grads(dw: Tensor, v: Tensor, g: Tensor, n: Tensor) -> tuple[Any, Any]:
        (dv,), (dg,) = _backward(group, [dw], [v], [g], [n])
        return dv, dg

    return Weight(form, grads, group.members[0].dim, group.members[0].eps)


# --- one call down -------------------------------------------------------------------------------


def _module(backend: str) -> Any:
    if backend == "triton":
        from .backends.triton import group

        return group
    return foreach


def _is_direct(group: Group, v: Sequence[Tensor]) -> bool:
    """Whether the backend can be called without the registered operator, as `operators._is_direct`
    says of a layer."""
    if group.backend == "triton":
        return not any(recorder(t) for t in v)
    return group.backend == "aten"


def _forward(group: Group, v: Sequence[Tensor], g: Sequence[Tensor]) -> Lists:
    if _is_direct(group, v):
        places = (group.places,) if group.backend == "triton" else ()
        return _module(group.backend).weight_norms(v, g, group.members, *places)
    return _op([*v], [*g], *_packed(group), [_DTYPES.index(m.dtype) for m in group.members])


def _backward(
    group: Group,
    dw: Sequence[Tensor],
    v: Sequence[Tensor],
    g: Sequence[Tensor],
    n: Sequence[Tensor],
) -> Lists:
    if _is_direct(group, v):
        return _module(group.backend).weight_norms_backward(dw, v, g, n, group.members)
    return _backward_op([*dw], [*v], [*g], [*n], *_packed(group))


# --- the registered operators --------------------------------------------------------------------

# A schema has lists of numbers, but none of dtypes.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _packed(group: Group) -> tuple[str, list[int], list[float]]:
    dims = [-1 if m.dim is None else m.dim for m in group.members]
    return group.backend, dims, [m.eps for m in group.members]


def _unpacked(
    v: Sequence[Tensor], backend: str, dims: list[int], eps: list[float], dtypes: Sequence[Any]
) -> tuple[Any, tuple[Member, ...]]:
    backend = backend or plans.choose_backend(v[0])
    options = zip(dims, eps, dtypes, strict=True)
    members = [Member(None if dim < 0 else dim, eps, dtype) for dim, eps, dtype in options]
    return _module(backend), tuple(members)


def _run(
    v: list[Tensor],
    g: list[Tensor],
    backend: str,
    dims: list[int],
    eps: list[float],
    dtypes: list[int],
) -> tuple[list[Tensor], list[Tensor]]:
    module, members = _unpacked(v, backend, dims, eps, [_DTYPES[i] for i in dtypes])
    look = () if module is not foreach else (False,)
    w, n = module.weight_norms(v, g, members, *look)
    return [*w], [*n]


def _run_fake(
    v: list[Tensor],
    g: list[Tensor],
    backend: str,
    dims: list[int],
    eps: list[float],
    dtypes: list[int],
) -> tuple[list[Tensor], list[Tensor]]:
    kept = (kept_shape(t.shape, None if dim < 0 else dim) for t, dim in zip(v, dims, strict=True))
    norms = zip(v, kept, strict=True)
    return (
        [torch.empty_like(t, dtype=_DTYPES[i]) for t, i in zip(v, dtypes, strict=True)],
        [t.new_empty(shape, dtype=scale_dtype(t)) for t, shape in norms],
    )


def _run_backward(
    dw: list[Tensor],
    v: list[Tensor],
    g: list[Tensor],
    n: list[Tensor],
    backend: str,
    dims: list[int],
    eps: list[float],
) -> tuple[list[Tensor], list[Tensor]]:
    module, members = _unpacked(v, backend, dims, eps, [t.dtype for t in dw])
    dv, dg = module.weight_norms_backward(dw, v, g, n, members)
    return (
        [laid_out_like(grad, t) for grad, t in zip(dv, v, strict=True)],
        [laid_out_like(grad, t) for grad, t in zip(dg, g, strict=True)],
    )


def _run_backward_fake(
    dw: list[Tensor], v: list[Tensor], g: list[Tensor], *_: Any
) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.empty_like(t) for t in v], [torch.empty_like(t) for t in g]


_OPTIONS = "str backend, int[] dims, float[] eps"
_op = register(
    f"weight_norms(Tensor[] v, Tensor[] g, {_OPTIONS}, int[] dtypes) -> (Tensor[], Tensor[])",
    _run,
    _run_fake,
)
_backward_op = register(
    f"weight_norms_backward(Tensor[] dw, Tensor[] v, Tensor[] g, Tensor[] n, {_OPTIONS})"
    " -> (Tensor[], Tensor[])",
    _run_backward,
    _run_backward_fake,
)

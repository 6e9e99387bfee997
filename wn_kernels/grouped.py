"""The weights of many layers in one call: one `autograd.Function` and one operator over lists.

    weight_norms           (v, g)           -> (w, n)
    weight_norms_backward  (dW, v, g, n)    -> (dV, dg)

Every tensor has its own shape, dtype, layout, `dim`, `eps`, norm and dtype of `W`. A backend
computes all of them with as few launches as it can: one in each direction by a Triton kernel (see
`backends/triton/group.py`), one call of the native library, whose node is its own, and on the ATen
path one operation for most weights.

A weight that the backward has no gradient for, since its layer was not used, has no `dV` and `dg`
either. A backward that is itself differentiated is recorded weight by weight, as in `autograd.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import plan as plans
from .autograd import ONLY_WEIGHT, Weight, recorded_grads
from .backends import aten, foreach, native, reference
from .call import NORMS, Member, Operands, kept_shape, recorder, scale_dtype
from .operators import is_direct, laid_out_like, library, native_library, register
from .prepare import prepare_member


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


def check_places(places: Sequence[Tensor], v: Sequence[Tensor], members: Sequence[Member]) -> None:
    """Checks that every `W` can be written to its place.

    Raises:
        TypeError: one is not a tensor.
        ValueError: one cannot.
    """
    if len(places) != len(v):
        raise ValueError(f"places has {len(places)} tensors, but v has {len(v)}")
    for i, (place, t, member) in enumerate(zip(places, v, members, strict=True)):
        if not isinstance(place, Tensor):
            raise TypeError(f"weight {i}: its place is no tensor, but {type(place).__name__}")
        wanted = t.shape, t.stride(), member.dtype, t.device
        if (place.shape, place.stride(), place.dtype, place.device) != wanted:
            raise ValueError(
                f"weight {i}: its place has shape {tuple(place.shape)}, strides {place.stride()}, "
                f"{place.dtype} on {place.device}, expected {tuple(t.shape)}, {t.stride()}, "
                f"{member.dtype} on {t.device}"
            )


Options = tuple[tuple[Any, ...], ...]  # every `dim`, `eps`, dtype of `W` and norm


def for_each(option: Any, count: int) -> tuple[Any, ...]:
    """Returns an option for each weight: the values of a list or a tuple, or one value repeated."""
    return tuple(option) if isinstance(option, (list, tuple)) else (option,) * count


def formed(
    v: list[Tensor],
    g: list[Tensor],
    options: Options,
    places: Sequence[Tensor] | None = None,
    together: bool = False,
) -> list[Tensor]:
    """Returns the weights of a call. If they are to be held and dropped `together`, they may have
    memory that other ones had: on a CPU that which a thread keeps, on a GPU one piece for all of
    them if nothing records the call.

    Raises:
        TypeError, ValueError: as `functional.weight_norms`.
        RuntimeError: a backend is forced that cannot serve the call.
    """
    if not is_compiling() and (found := native_library()):
        w = weights(found, v, g, options, places, together)
        if w is not None:
            return w
    return computed(v, g, options, places)


# --- by the native library -----------------------------------------------------------------------

_MOST = 1024  # groups whose checked options are kept

# What was checked, by layouts and options: the options of every weight in canonical form, and what
# launches its kernels.
_known: dict[Any, tuple[tuple[Member, ...], Any]] = {}
native.memos.append(_known)


def weights(
    library: Any,
    v: list[Tensor],
    g: list[Tensor],
    options: Options,
    places: Sequence[Tensor] | None,
    together: bool,
) -> list[Tensor] | None:
    """Returns every `W` as an output of a node of the library, which computes it on a CPU, and
    launches its kernels on a GPU. The result is `None` where the rest of the package serves the
    call, or rejects it.
    """
    first = v[0]
    backend = plans.prepares(first) if isinstance(first, Tensor) else ""
    known = _checked(library, backend, v, g, options)
    if known is None:
        return None
    members, prepared = known
    if places is not None:
        check_places(places, v, members)
    records = torch.is_grad_enabled()
    if prepared is None:
        given = map(list, zip(*members, strict=True))
        return library.weight_norms(v, g, *given, places and [*places], together)
    keeps = records and any(t.requires_grad for t in (*v, *g))
    with torch.no_grad():
        w, n = prepared(v, g, places, keeps, together and not records)
    if keeps:
        library.record(w, v, g, n, *prepared.rules, prepared.grads)
    return w


def _checked(
    library: Any, backend: str, v: list[Tensor], g: list[Tensor], options: Options
) -> tuple[tuple[Member, ...], Any] | None:
    """Returns the options of every weight in canonical form, and what launches the kernels, if any,
    or `None` if the rest of the package serves the call, or rejects it."""
    if backend not in ("native", "triton"):
        return None
    layouts = library.layouts(v + g)
    if layouts is None:
        return None
    key = layouts, options, backend
    try:
        known = _known.get(key)
    except TypeError:  # an option cannot be hashed
        return None
    if known is not None:
        return known
    every = zip(v, g, *options, strict=True)
    try:
        checked = [prepare_member(v[0], *each) for each in every]
    except (TypeError, ValueError):
        return None
    if any(t.shape != shape for t, (_, shape) in zip(g, checked, strict=True)):
        return None
    members = tuple([member for member, _ in checked])
    prepared = None
    if backend == "triton":
        if not all(t.is_contiguous() for t in g):
            return None
        from .backends.triton.group import Prepared

        prepared = Prepared(v, g, members)
    if len(_known) >= _MOST:
        _known.clear()
    _known[key] = members, prepared
    return members, prepared


def launches(v: list[Tensor], g: list[Tensor], options: Options) -> Any:
    """Returns what launches the kernels of a group on the Triton path, a `Prepared` of
    `backends/triton/group.py`, or `None` if the rest of the package serves the call."""
    known = _checked(native_library(), "triton", v, g, options)
    return known and known[1]


# --- by Python -----------------------------------------------------------------------------------


def computed(
    v: list[Tensor], g: list[Tensor], options: Options, places: Sequence[Tensor] | None
) -> list[Tensor]:
    """Checks a call and returns its weights, as `formed` does."""
    members, scales = [], []
    for i, arguments in enumerate(zip(v, g, *options, strict=True)):
        try:
            member, shape = prepare_member(v[0], *arguments)
        except (TypeError, ValueError) as error:
            raise type(error)(f"weight {i}: {error}") from None
        members.append(member)
        scales.append(g[i] if g[i].shape == shape else g[i].view(shape))
    if places is not None:
        check_places(places, v, members)
    records = {recorder(t) for t in (*v, *scales)}
    if "composite" in records and not plans.is_forced():
        backend = "reference"
    else:
        backend = plans.choose_backend(v[0])
    if backend == "native":  # the library has declined the call already
        raise plans.cannot_serve(backend)
    every = [*zip(v, scales, members, strict=True)]
    if backend == "reference":
        return [reference.weight_norm(t, s, m.dim, m.eps, m.norm, m.dtype) for t, s, m in every]
    try:
        return [*weight_norms(Group(tuple(members), backend, places), v, scales)]
    except aten.OutOfRange:
        return [
            reference.weight_norm(t.double(), s.double(), m.dim, m.eps, m.norm, m.dtype)
            for t, s, m in every
        ]


def weight_norms(group: Group, v: Sequence[Tensor], g: Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns every `W`, differentiable. Each `g` has the kept shape.

    Raises:
        aten.OutOfRange: a norm on a CPU is beyond the formulas of the ATen path.
    """
    if not group.backend:  # a compiler records the operator, which is differentiable by itself
        return _forward(group, v, g)[0]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*v, *g)):
        return WeightNorms.apply(group, *v, *g)
    return _forward(group, v, g)[0]


class WeightNorms(torch.autograd.Function):
    """`W_i = g_i · V_i / ‖V_i‖` of a group."""

    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(tensors) // 2
        w, n = _forward(group, tensors[:count], tensors[count:])
        ctx.save_for_backward(*tensors, *n)
        ctx.group = group._replace(places=None)  # they are the outputs
        ctx.set_materialize_grads(False)
        return tuple(w)

    @staticmethod
    def backward(ctx: Any, *dw: Tensor | None) -> tuple[Tensor | None, ...]:
        count, needs = len(dw), ctx.needs_input_grad[1:]
        wanted = [needs[i] or needs[count + i] for i in range(count)]
        dv, dg = _used_grads(ctx.group, dw, ctx.saved_tensors, wanted, _grads)
        return None, *dv, *dg


def _used_grads(
    group: Group,
    dw: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    wanted: Sequence[bool],
    function: Callable[..., Any],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Returns the lists of `dV` and `dg` that a function gives, of the weights that have a
    gradient. The other elements are `None`. What is saved are all `v`, all `g` and all `n`."""
    count = len(dw)
    used = [i for i in range(count) if dw[i] is not None and wanted[i]]
    grads: tuple[list[Tensor | None], list[Tensor | None]] = [None] * count, [None] * count
    if used:
        v, g, n = ([saved[i + part] for i in used] for part in (0, count, 2 * count))
        found = function(group.only(used), [dw[i] for i in used], v, g, n)
        for into, each in zip(grads, found, strict=True):
            for i, grad in zip(used, each, strict=True):
                into[i] = grad
    return grads


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

    member = group.members[0]
    return Weight(form, grads, member.dim, member.eps, member.norm)


# --- one call down -------------------------------------------------------------------------------


def _module(backend: str) -> Any:
    if backend == "triton":
        from .backends.triton import group

        return group
    return foreach


def _forward(group: Group, v: Sequence[Tensor], g: Sequence[Tensor]) -> Lists:
    if is_direct(group.backend, *v):
        places = (group.places,) if group.backend == "triton" else ()
        return _module(group.backend).weight_norms(v, g, group.members, *places)
    dtypes = [_DTYPES.index(m.dtype) for m in group.members]
    return _op([*v], [*g], *_packed(group), dtypes)


def _backward(
    group: Group,
    dw: Sequence[Tensor],
    v: Sequence[Tensor],
    g: Sequence[Tensor],
    n: Sequence[Tensor],
) -> Lists:
    if is_direct(group.backend, *v):
        return _module(group.backend).weight_norms_backward(dw, v, g, n, group.members)
    return _call_backward_op(group, dw, v, g, n)


def _call_backward_op(
    group: Group,
    dw: Sequence[Tensor],
    v: Sequence[Tensor],
    g: Sequence[Tensor],
    n: Sequence[Tensor],
) -> Lists:
    return _backward_op([*dw], [*v], [*g], [*n], *_packed(group))


# --- the registered operators --------------------------------------------------------------------

# A schema has lists of numbers, but none of dtypes. Norms are numbered as well.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _packed(group: Group) -> tuple[str, list[int], list[float], list[int]]:
    dims = [-1 if m.dim is None else m.dim for m in group.members]
    norms = [NORMS.index(m.norm) for m in group.members]
    return group.backend, dims, [m.eps for m in group.members], norms


def _unpacked(
    v: Sequence[Tensor],
    backend: str,
    dims: list[int],
    eps: list[float],
    norms: list[int],
    dtypes: Sequence[Any],
) -> tuple[Any, tuple[Member, ...]]:
    members = _members(dims, eps, norms, dtypes)
    return _module(backend or plans.choose_backend(v[0])), members


def _members(
    dims: Sequence[int], eps: Sequence[float], norms: Sequence[int], dtypes: Sequence[Any]
) -> tuple[Member, ...]:
    return tuple(
        [
            Member(None if dim < 0 else dim, least, dtype, NORMS[norm])
            for dim, least, norm, dtype in zip(dims, eps, norms, dtypes, strict=True)
        ]
    )


def _run(
    v: list[Tensor],
    g: list[Tensor],
    backend: str,
    dims: list[int],
    eps: list[float],
    norms: list[int],
    dtypes: list[int],
) -> tuple[list[Tensor], list[Tensor]]:
    module, members = _unpacked(v, backend, dims, eps, norms, [_DTYPES[i] for i in dtypes])
    look = () if module is not foreach else (False,)
    w, n = module.weight_norms(v, g, members, *look)
    return [*w], [*n]


def _run_fake(
    v: list[Tensor],
    g: list[Tensor],
    backend: str,
    dims: list[int],
    eps: list[float],
    norms: list[int],
    dtypes: list[int],
) -> tuple[list[Tensor], list[Tensor]]:
    kept = (kept_shape(t.shape, None if dim < 0 else dim) for t, dim in zip(v, dims, strict=True))
    return (
        [torch.empty_like(t, dtype=_DTYPES[i]) for t, i in zip(v, dtypes, strict=True)],
        [t.new_empty(s, dtype=scale_dtype(t)) for t, s in zip(v, kept, strict=True)],
    )


def _run_backward(
    dw: list[Tensor],
    v: list[Tensor],
    g: list[Tensor],
    n: list[Tensor],
    backend: str,
    dims: list[int],
    eps: list[float],
    norms: list[int],
) -> tuple[list[Tensor], list[Tensor]]:
    module, members = _unpacked(v, backend, dims, eps, norms, [t.dtype for t in dw])
    dv, dg = module.weight_norms_backward(dw, v, g, n, members)
    return (
        [laid_out_like(grad, t) for grad, t in zip(dv, v, strict=True)],
        [laid_out_like(grad, t) for grad, t in zip(dg, g, strict=True)],
    )


def _run_backward_fake(
    dw: list[Tensor], v: list[Tensor], g: list[Tensor], *_: Any
) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.empty_like(t) for t in v], [torch.empty_like(t) for t in g]


_OPTIONS = "str backend, int[] dims, float[] eps, int[] norms"
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


# --- the operator as part of a graph that a compiler records -------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    v, g, backend, dims, eps, norms, dtypes = inputs
    ctx.save_for_backward(*v, *g, *output[1])
    ctx.group = Group(_members(dims, eps, norms, [_DTYPES[i] for i in dtypes]), backend)
    ctx.set_materialize_grads(False)


def _op_backward(ctx: Any, dw: list[Tensor | None], dn: Any) -> tuple[Any, ...]:
    function = _grads if torch.is_grad_enabled() else _call_backward_op
    wanted = [True] * len(dw)
    return *_used_grads(ctx.group, dw, ctx.saved_tensors, wanted, function), *[None] * 5


torch.library.register_autograd(
    "wn_kernels::weight_norms", _op_backward, setup_context=_setup_context, lib=library
)

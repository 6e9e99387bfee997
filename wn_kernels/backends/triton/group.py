"""The weights of many layers in one launch, and all of their gradients in another one.

A kernel walks a table. Each program takes the next block of slices of some weight, finds that
weight's sizes and strides in the table, and computes the block as the kernels of one weight do
(`weight.py`). What has to be known when a kernel is compiled (dtypes, the form of a sum, a tile) is
a *kind*. A kernel holds the code of every kind among its weights, and a program branches to one.

The table is made once for the layouts of a group. The addresses are a table of their own, which is
kept while they stay the same (`uploads.py`).

A weight whose slices are few and long, so that a program would walk one of them for too long, and
one whose layout is not that of at most three loops have launches of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from ...call import Member, Norm, scale_dtype
from .. import native
from . import configs, weight
from .configs import Target
from .launch import Launcher, Slices, acc_type, as_slices, is_wide, remembered, target_of
from .uploads import Uploads
from .weight import weight_grad_kernel, weight_kernel

# --- the kinds of weights ------------------------------------------------------------------------


class Kind(NamedTuple):
    """Holds what a kernel is compiled for."""

    V: tl.dtype
    G: tl.dtype
    W: tl.dtype
    ACC: tl.dtype
    FORM: str
    EPS: float
    NORM: Norm
    NESTED: int
    UNIT: bool
    EVEN: bool
    BLOCK_N: int
    BLOCK_P: int
    BLOCK_R: int


# Kernels take the kinds as tuples, and these are the places of their fields.
_V, _G, _W, _ACC, _FORM, _EPS, _NORM, _NESTED, _UNIT, _EVEN, _BLOCK_N, _BLOCK_P, _BLOCK_R = map(
    tl.constexpr, range(len(Kind._fields))
)

# --- kernels -----------------------------------------------------------------------------------


@triton.jit
def placed(BASE, PLACES, index, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The tensor at a place: a number of bytes from BASE."""
    at = tl.load(PLACES + index)
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return (BASE + at).to(tl.pointer_type(TYPE), bitcast=True)


@triton.jit
def strides_at(AT, UNIT: tl.constexpr, EVEN: tl.constexpr):
    """A tensor's four strides. The innermost is one in a UNIT kind, and the others are multiples of
    16 in an EVEN one."""
    n = tl.load(AT)
    outer = tl.load(AT + 1)
    middle = tl.load(AT + 2)
    if EVEN:
        n = tl.multiple_of(n, 16)
        outer = tl.multiple_of(outer, 16)
        middle = tl.multiple_of(middle, 16)
    if UNIT:
        return n, outer, middle, 1
    else:
        return n, outer, middle, tl.load(AT + 3)


@triton.jit
def loops_at(AT, EVEN: tl.constexpr):
    inner = tl.load(AT + 2)
    if EVEN:
        inner = tl.multiple_of(inner, 16)
    return tl.load(AT), tl.load(AT + 1), inner


@triton.jit
def group_weight_kernel(
    BASE,
    PLACES,
    TABLE,
    COUNT: tl.constexpr,
    KINDS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """W and NORMS of every weight."""
    program = TABLE + 2 * tl.program_id(0)
    row = TABLE + tl.load(program)
    block_n = tl.load(program + 1)
    kind = tl.load(row)
    place = tl.load(row + 6)
    for i in tl.static_range(COUNT):
        if kind == i:
            V = placed(BASE, PLACES, place, KINDS[i][_V], ALIGNED)
            G = placed(BASE, PLACES, place + 1, KINDS[i][_G], ALIGNED)
            NORMS = placed(BASE, PLACES, place + 2, KINDS[i][_ACC], ALIGNED)
            W = placed(BASE, PLACES, place + 3, KINDS[i][_W], ALIGNED)
            weight_kernel(
                V=V,
                G=G,
                PARTIAL=NORMS,
                NORMS=NORMS,
                W=W,
                block_n=block_n,
                N=tl.load(row + 1),
                loops=loops_at(row + 2, KINDS[i][_EVEN]),
                steps=tl.load(row + 5),
                stride_v=strides_at(row + 11, KINDS[i][_UNIT], KINDS[i][_EVEN]),
                stride_w=strides_at(row + 7, KINDS[i][_UNIT], KINDS[i][_EVEN]),
                SPLITS=1,
                FORM=KINDS[i][_FORM],
                EPS=KINDS[i][_EPS],
                NORM=KINDS[i][_NORM],
                NESTED=KINDS[i][_NESTED],
                WIDE=False,
                ACC=KINDS[i][_ACC],
                BLOCK_N=KINDS[i][_BLOCK_N],
                BLOCK_P=KINDS[i][_BLOCK_P],
                BLOCK_R=KINDS[i][_BLOCK_R],
                BLOCK_S=1,
            )


@triton.jit
def group_grad_kernel(
    BASE,
    PLACES,
    TABLE,
    COUNT: tl.constexpr,
    KINDS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """DV and DG of every weight."""
    program = TABLE + 2 * tl.program_id(0)
    row = TABLE + tl.load(program)
    block_n = tl.load(program + 1)
    kind = tl.load(row)
    place = tl.load(row + 6)
    for i in tl.static_range(COUNT):
        if kind == i:
            DW = placed(BASE, PLACES, place, KINDS[i][_W], ALIGNED)
            V = placed(BASE, PLACES, place + 1, KINDS[i][_V], ALIGNED)
            G = placed(BASE, PLACES, place + 2, KINDS[i][_G], ALIGNED)
            NORMS = placed(BASE, PLACES, place + 3, KINDS[i][_ACC], ALIGNED)
            DG = placed(BASE, PLACES, place + 4, KINDS[i][_G], ALIGNED)
            DV = placed(BASE, PLACES, place + 5, KINDS[i][_V], ALIGNED)
            weight_grad_kernel(
                DW=DW,
                V=V,
                G=G,
                NORMS=NORMS,
                PARTIAL=NORMS,
                DG=DG,
                DV=DV,
                block_n=block_n,
                N=tl.load(row + 1),
                loops=loops_at(row + 2, KINDS[i][_EVEN]),
                steps=tl.load(row + 5),
                stride_w=strides_at(row + 11, KINDS[i][_UNIT], KINDS[i][_EVEN]),
                stride_v=strides_at(row + 15, KINDS[i][_UNIT], KINDS[i][_EVEN]),
                stride_d=strides_at(row + 7, KINDS[i][_UNIT], KINDS[i][_EVEN]),
                SPLITS=1,
                FORM=KINDS[i][_FORM],
                EPS=KINDS[i][_EPS],
                NORM=KINDS[i][_NORM],
                NESTED=KINDS[i][_NESTED],
                WIDE=False,
                ACC=KINDS[i][_ACC],
                BLOCK_N=KINDS[i][_BLOCK_N],
                BLOCK_P=KINDS[i][_BLOCK_P],
                BLOCK_R=KINDS[i][_BLOCK_R],
                BLOCK_S=1,
            )


# --- the table -----------------------------------------------------------------------------------


class Row(NamedTuple):
    """A weight that shares a launch."""

    member: int
    kind: Kind
    n: int
    loops: tuple[int, int, int]
    steps: int
    strides: list[int]


# A launch has the code of this many kinds at most.
MOST_KINDS = 12

_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def _row(index: int, tensors: Sequence[Tensor], g: Tensor, w: Tensor, member: Member) -> Row | None:
    """The row of a weight whose kernel walks these tensors, the last of which is `V`. `None` where
    it has launches of its own."""
    v = tensors[-1]
    slices = as_slices(tensors, member.dim)
    if slices is None or is_wide(*tensors) or not v.numel():
        return None
    config = configs.grouped(slices.n, slices.loops, _is_along_rows(slices), v.element_size())
    outer, middle, inner = slices.loops
    steps = outer * cdiv(middle, config.BLOCK_P) * cdiv(inner, config.BLOCK_R)
    if steps > configs.GROUPED_STEPS:
        return None
    rest = [stride for strides in slices.strides for stride in strides[:3]]
    unit = all(strides[3] == 1 for strides in slices.strides)
    kind = Kind(
        V=_TYPES[v.dtype],
        G=_TYPES[g.dtype],
        W=_TYPES[w.dtype],
        ACC=acc_type(v),
        FORM="held" if steps == 1 else "walked",
        EPS=member.eps,
        NORM=member.norm,
        NESTED=sum(size > 1 for size in slices.loops[:2]),
        UNIT=unit,
        EVEN=unit and not any(n % 16 for n in (inner, *rest)),
        BLOCK_N=config.BLOCK_N,
        BLOCK_P=config.BLOCK_P,
        BLOCK_R=config.BLOCK_R,
    )
    strides = [stride for strides in slices.strides for stride in strides]
    return Row(index, kind, slices.n, slices.loops, steps, strides)


def _is_along_rows(slices: Slices) -> bool:
    """Whether every slice is a run of memory in all tensors."""
    outer, middle, _ = slices.loops
    return outer == middle == 1 and all(strides[3] == 1 for strides in slices.strides)


class Table:
    """One launch of a group: its table on the device, and its kernel.

    Attributes:
        rows: the weights of the launch.
        numbers: the table.
        uploads: what of it is on the device.
    """

    def __init__(self, kernel: Any, target: Target, rows: list[Row], places: int) -> None:
        self.rows = rows
        kinds = list(dict.fromkeys(row.kind for row in rows))
        programs: list[int] = []
        numbers: list[int] = []
        blocks = [cdiv(row.n, row.kind.BLOCK_N) for row in rows]
        first = 2 * sum(blocks)
        for i, (row, count) in enumerate(zip(rows, blocks, strict=True)):
            programs += [n for block in range(count) for n in (first + len(numbers), block)]
            place = places * i
            numbers += [kinds.index(row.kind), row.n, *row.loops, row.steps, place, *row.strides]
        self.numbers = torch.tensor(programs + numbers, dtype=torch.int32)
        grid = (sum(blocks),)
        self.launchers = [
            Launcher(
                kernel,
                target,
                grid,
                COUNT=len(kinds),
                KINDS=tuple(tuple(map(tl.constexpr, kind)) for kind in kinds),
                ALIGNED=aligned,
                num_warps=configs.GROUPED_WARPS,
                num_stages=1,
            )
            for aligned in (False, True)
        ]
        self._members = [row.member for row in rows]
        self.uploads = Uploads(self.numbers, places * len(rows))

    def launch(self, lists: Sequence[list[Tensor]], base: Tensor | None = None) -> None:
        """Launches the kernel on these tensors: a list for each place, with a tensor for each
        weight of the group. Addresses are counted from `base`, which is the table by default."""
        found = self.uploads.find(lists, self._members, base)
        self.launchers[found.are_aligned](found.base, found.offsets, found.table)


# --- launchers ---------------------------------------------------------------------------------


class Grouped(NamedTuple):
    """What was prepared for a group: launches, and the weights that have launches of their own.
    `dtypes` are those of the two lists of results."""

    tables: list[Table]
    alone: list[int]
    dtypes: tuple[list[torch.dtype], list[torch.dtype]]


def _tables(
    kernel: Any, target: Target, rows: list[Row | None], places: int, *dtypes: list[torch.dtype]
) -> Grouped:
    """Divides the weights of a group into launches of few kinds each."""
    kinds: dict[Kind, list[Row]] = {}
    for row in rows:
        if row is not None:
            kinds.setdefault(row.kind, []).append(row)
    every = list(kinds.values())
    parts = [every[i : i + MOST_KINDS] for i in range(0, len(every), MOST_KINDS)]
    # The longest rows come first, so that no program is left alone with one at the end.
    tables = []
    for part in parts:
        longest = sorted(itertools.chain(*part), key=lambda row: -row.steps)
        tables.append(Table(kernel, target, longest, places))
    alone = [i for i, row in enumerate(rows) if row is None]
    return Grouped(tables, alone, (dtypes[0], dtypes[1]))


def _prepare(target: Target, *given: Any) -> Grouped:
    *tensors, members = given
    count = len(members)
    v, g = tensors[:count], tensors[count:]
    rows = []
    for i, member in enumerate(members):
        w = torch.empty_like(v[i], dtype=member.dtype)
        rows.append(_row(i, [w, v[i]], g[i], w, member))
    dtypes = [member.dtype for member in members], [scale_dtype(t) for t in v]
    return _tables(group_weight_kernel, target, rows, 4, *dtypes)


def _prepare_backward(target: Target, *given: Any) -> Grouped:
    *tensors, members = given
    count = len(members)
    dw, v, g = (tensors[i : i + count] for i in range(0, 3 * count, count))
    rows = []
    for i, member in enumerate(members):
        dv = torch.empty_like(v[i])
        rows.append(_row(i, [dv, dw[i], v[i]], g[i], dw[i], member))
    dtypes = [t.dtype for t in v], [t.dtype for t in g]
    return _tables(group_grad_kernel, target, rows, 6, *dtypes)


_remembered = remembered(_prepare)
_remembered_backward = remembered(_prepare_backward)

Lists = tuple[list[Tensor], list[Tensor]]


def empty_like(
    tensors: list[Tensor], dtypes: list[torch.dtype], together: bool = False
) -> list[Tensor]:
    """Memory like that of tensors, in these dtypes. If they will be dropped `together`, it may be
    one piece."""
    library = native.helpers()
    if library is not None:
        return library.empty_like(tensors, dtypes, together)
    return [torch.empty_like(t, dtype=dtype) for t, dtype in zip(tensors, dtypes, strict=True)]


def _run(
    made: Grouped,
    members: Sequence[Member],
    v: list[Tensor],
    g: list[Tensor],
    w: list[Tensor],
    n: list[Any],
) -> Lists:
    """The lists of all `W` and `n`, by what was prepared. The launches that weights share write to
    these tensors, and no norms where `n` has `None`."""
    for i in made.alone:
        m = members[i]
        w[i], n[i] = weight.weight_norm(v[i], g[i], m.dim, m.eps, m.dtype, norm=m.norm)
    for table in made.tables:
        table.launch([v, g, n, w])
    return w, n


def _run_backward(
    made: Grouped,
    members: Sequence[Member],
    dw: list[Tensor],
    v: list[Tensor],
    g: list[Tensor],
    n: list[Tensor],
) -> Lists:
    """The lists of all `dV` and `dg`, by what was prepared."""
    dv, dg = empty_like(v, made.dtypes[0]), empty_like(g, made.dtypes[1])
    for i in made.alone:
        m = members[i]
        tensors = dw[i], v[i], g[i], n[i]
        dv[i], dg[i] = weight.weight_norm_backward(*tensors, m.dim, m.eps, norm=m.norm)
    for table in made.tables:
        table.launch([dw, v, g, n, dg, dv])
    return dv, dg


class Prepared:
    """The launches of a group, for the dtypes and layouts of its `v` and `g`.

    Attributes:
        members: the options of every weight.
        rules: every `eps` and every norm.
        backwards: the launches of the gradients, by the layouts of `dW` and by which there are.
    """

    def __init__(
        self, v: Sequence[Tensor], g: Sequence[Tensor], members: tuple[Member, ...]
    ) -> None:
        self.members = members
        self.rules = [m.eps for m in members], [m.norm for m in members]
        self._forward = _remembered(target_of(v[0]), (*v, *g), members)
        self.backwards: dict[Any, Grouped] = {}

    def __call__(
        self,
        v: list[Tensor],
        g: list[Tensor],
        places: Sequence[Tensor] | None = None,
        keeps: bool = True,
        together: bool = False,
    ) -> Lists:
        """The lists of all `W` and `n`, each `W` in its member's dtype and `V`'s memory layout. The
        launches that weights share write `W` to its place, if there is one. All `W` are in one
        piece of memory if they are to be dropped `together`. Without `keeps`, such launches write
        no norms. With it, a node keeps all of them, and they are in one piece as well."""
        made = self._forward
        together = together and not made.alone  # these are allocated by themselves
        w = [*places] if places else empty_like(v, made.dtypes[0], together)
        n: list[Any] = empty_like(g, made.dtypes[1], True) if keeps else [None] * len(g)
        return _run(made, self.members, v, g, w, n)

    def grads(
        self,
        dw: list[Tensor],
        v: list[Tensor],
        g: list[Tensor],
        n: list[Tensor],
        indices: Sequence[int],
    ) -> Lists:
        """The lists of `dV` and `dg` of some of the weights, in the dtypes of `V` and `g`."""
        members = tuple([self.members[i] for i in indices])
        library = native.helpers()
        known = library is not None and not dw[0].is_meta  # autocast has no such device
        layouts = library.layouts(dw) if known else None
        if layouts is None:
            layouts = tuple([(t.shape, t.stride(), t.dtype) for t in dw])
        key = layouts, tuple(indices)
        made = self.backwards.get(key)
        if made is None:
            made = _remembered_backward(target_of(v[0]), (*dw, *v, *g), members)
            if len(self.backwards) >= configs.GROUPED_KNOWN:
                self.backwards.clear()
            self.backwards[key] = made
        return _run_backward(made, members, dw, v, g, n)


def weight_norms(
    v: Sequence[Tensor],
    g: Sequence[Tensor],
    members: tuple[Member, ...],
    places: Sequence[Tensor] | None = None,
) -> Lists:
    """The lists of all `W` and `n`, as `Prepared` returns them."""
    g = [t.contiguous() for t in g]
    made = _remembered(target_of(v[0]), (*v, *g), members)
    w = [*places] if places else empty_like([*v], made.dtypes[0])
    return _run(made, members, [*v], g, w, empty_like(g, made.dtypes[1]))


def weight_norms_backward(
    dw: Sequence[Tensor],
    v: Sequence[Tensor],
    g: Sequence[Tensor],
    n: Sequence[Tensor],
    members: tuple[Member, ...],
) -> Lists:
    """The lists of all `dV` and `dg`, in the dtypes of `V` and `g`."""
    g = [t.contiguous() for t in g]
    made = _remembered_backward(target_of(v[0]), (*dw, *v, *g), members)
    return _run_backward(made, members, [*dw], [*v], g, [*n])

"""The linear layer: `y = x Wᵀ + b` and its gradients, with `W = s ⊙ V`, `s = g / n`.

Both products with `V` are one matmul, `C[m, o] = Σ_r A[m, r] · W[o, r]`:

    forward   C = y    A = x    o = n (outputs)   r = k
    dX        C = dX   A = dY   o = k (inputs)    r = n

and the scale enters where its axis lies:

    one_pass    s along o, taken in the loop: C = (Σ_r A V) / ‖V_o‖ · g, V read once, one launch
    epilogue    s along o (or a scalar), norms ready: scaled in the float32 accumulator
    prologue_r  s along r: V's tile is scaled, and is W's tile from then on
    prologue_o  s along o, but V would leave the range of the product's dtype unscaled

`linear_grad.py` has the weight gradient, which `linear_backward` puts beside `dX`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...call import narrows_range, scale_dtype, takes_tf32
from . import configs, weight
from .common import as_norm, cast, dot, offsets
from .configs import Target
from .launch import (
    Launcher,
    allocator,
    describer,
    is_describable,
    is_wide,
    product_types,
    remembered,
    target_of,
    unallocated,
)
from .linear_grad import prepare_weight_grad
from .norm import remembered_slice_norms
from .passes import Pass

# --- kernels -----------------------------------------------------------------------------------


@triton.jit
def matmul_kernel(
    A,
    V,
    G,
    NORM,
    BIAS,
    C,
    M,
    O,
    R,
    stride_am,
    stride_ar,
    stride_vo,
    stride_vr,
    stride_s,
    stride_bias,
    stride_cm,
    stride_co,
    FORM: tl.constexpr,
    EPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_R: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    LOADS: tl.constexpr,
    TURNED: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """C = A Wᵀ + bias. `stride_s` is 0 for a scalar scale. one_pass stores the norms.

    LOADS other than "pointers": A and V are tensor descriptors, V's of its transpose where it lies
    so (TURNED). "specialized": loads and products have warps of their own. SPLIT > 1: so many
    products of a share of r each, one to a warp.
    """
    # Programs in groups of GROUP row tiles, so that tiles of V are reused while in cache.
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_o = tl.cdiv(O, BLOCK_O)
    group = pid // (GROUP * tiles_o)
    group_size = min(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + (pid % (GROUP * tiles_o)) % group_size
    tile_o = (pid % (GROUP * tiles_o)) // group_size

    offs_m = offsets(tile_m, BLOCK_M, WIDE)
    offs_o = offsets(tile_o, BLOCK_O, WIDE)
    mask_m = offs_m < M
    mask_o = offs_o < O
    norm_type = NORM.dtype.element_ty
    if SPLIT == 1:
        acc = tl.zeros((BLOCK_M, BLOCK_O), ACC)
    else:
        acc = tl.zeros((SPLIT, BLOCK_M, BLOCK_O), ACC)
    # Squares stay inside a thread until the loop is over: no shuffles in it.
    squares = tl.zeros((BLOCK_O, BLOCK_R // 8), norm_type)
    if FORM == "prologue_o":
        n = tl.load(NORM + offs_o * stride_s, mask=mask_o, other=1.0)
        scale_o = tl.load(G + offs_o * stride_s, mask=mask_o, other=0.0).to(norm_type) / n

    for start in tl.range(0, R, BLOCK_R, warp_specialize=LOADS == "specialized"):
        offs_r = offsets(start // BLOCK_R, BLOCK_R, WIDE)
        if LOADS != "pointers":
            a = A.load([tile_m * BLOCK_M, start])
            if TURNED:
                v = tl.trans(V.load([start, tile_o * BLOCK_O]))
            else:
                v = V.load([tile_o * BLOCK_O, start])
        else:
            a_at = A + offs_m[:, None] * stride_am + offs_r[None, :] * stride_ar
            v_at = V + offs_o[:, None] * stride_vo + offs_r[None, :] * stride_vr
            if EVEN_R:
                a = tl.load(a_at, mask=mask_m[:, None], other=0.0)
                v = tl.load(v_at, mask=mask_o[:, None], other=0.0)
            else:
                mask_r = offs_r < R
                a = tl.load(a_at, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
                v = tl.load(v_at, mask=mask_o[:, None] & mask_r[None, :], other=0.0)
        if FORM == "one_pass":
            wide = v.to(norm_type)
            squares += tl.sum(tl.reshape(wide * wide, (BLOCK_O, BLOCK_R // 8, 8)), axis=2)
        if FORM == "prologue_o":
            v = v.to(norm_type) * scale_o[:, None]
        if FORM == "prologue_r":
            n = tl.load(NORM + offs_r, mask=offs_r < R, other=1.0)
            g = tl.load(G + offs_r, mask=offs_r < R, other=0.0).to(norm_type)
            v = v.to(norm_type) * (g / n)[None, :]
        v = cast(v, a.dtype)
        if SPLIT == 1:
            acc = dot(a, tl.trans(v), acc, PRECISION)
        else:
            v = tl.permute(tl.reshape(v, (BLOCK_O, SPLIT, BLOCK_R // SPLIT)), (1, 2, 0))
            a = tl.permute(tl.reshape(a, (BLOCK_M, SPLIT, BLOCK_R // SPLIT)), (1, 0, 2))
            acc = dot(a, v, acc, PRECISION)
    if SPLIT > 1:
        acc = tl.sum(acc, axis=0)

    if FORM == "one_pass":
        n = as_norm(tl.sum(squares, axis=1), EPS)
        tl.store(NORM + offs_o, n, mask=mask_o & (tile_m == 0))
        g = tl.load(G + offs_o, mask=mask_o, other=0.0).to(norm_type)
        acc *= (g / n).to(ACC)[None, :]
    # A large tile in halves: scales, bias and addresses of all columns would not fit the registers.
    PARTS: tl.constexpr = 1 if LOADS == "pointers" else 2
    PART: tl.constexpr = BLOCK_O // PARTS
    parts = (acc,)
    if PARTS == 2:
        parts = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, PART)), (0, 2, 1)))
    for i in tl.static_range(PARTS):
        c = parts[i]
        offs_o = offsets(tile_o * PARTS + i, PART, WIDE)
        mask_o = offs_o < O
        if FORM == "epilogue":
            n = tl.load(NORM + offs_o * stride_s, mask=mask_o, other=1.0)
            g = tl.load(G + offs_o * stride_s, mask=mask_o, other=0.0).to(norm_type)
            c *= (g / n).to(ACC)[None, :]
        if HAS_BIAS:
            c += tl.load(BIAS + offs_o * stride_bias, mask=mask_o, other=0.0).to(ACC)[None, :]
        c_at = C + offs_m[:, None] * stride_cm + offs_o[None, :] * stride_co
        tl.store(c_at, c, mask=mask_m[:, None] & mask_o[None, :])


# --- launchers ---------------------------------------------------------------------------------


def linear(
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    dim: int | None,
    eps: float,
    variant: str,
    *,
    config: configs.MatmulConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`(y, n)` for `x` of shape `(M, K)`; variants as in `costs.triton_linear`."""
    g = g.contiguous()
    options = dim, eps, variant, takes_tf32(x.dtype), config
    return remembered_linear(target_of(x), (x, v, g, bias), *options)(x, v, g, bias)


def prepare_linear(
    target: Target,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    dim: int | None,
    eps: float,
    variant: str,
    tf32: bool,
    config: configs.MatmulConfig | None = None,
) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    """`run(x, v, g, bias)` returns `(y, n)`."""
    if variant == "materialize":
        weight_norm = weight.remembered_weight_norm(target, (v, g), dim, eps, x.dtype)

        def run_materialized(
            x: Tensor, v: Tensor, g: Tensor, bias: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            w, n = weight_norm(v, g)
            return F.linear(x, w, None if bias is None else bias.to(x.dtype)), n

        return run_materialized
    if variant == "one_pass" and dim != 0:
        raise ValueError(f"one_pass needs dim=0, got dim={dim}")
    form = "one_pass" if variant == "one_pass" else _form(dim, 1, narrows_range(x.dtype, v.dtype))
    run = Pass("x", "v", "g", "bias")
    if form == "one_pass" and len(x):  # without a row, no program would run
        run.new(n=unallocated((len(v), 1), scale_dtype(v)))
    else:
        run.call(remembered_slice_norms(target, (v,), dim, eps), "v", gives=("n",))
    product = _prepare_matmul(target, x, v, bias, dim, form, eps, tf32, config)
    run.call(product, "x", "v", "g", "n", "bias", gives=("y",))
    return run.returning("y", "n")


remembered_linear = remembered(prepare_linear)


def _form(dim: int | None, reduced: int, narrows: bool) -> str:
    """The form of a product with ready norms that sums over the dimension `reduced` of `V`."""
    if dim == reduced:
        return "prologue_r"
    return "prologue_o" if narrows else "epilogue"


def _prepare_matmul(
    target: Target,
    a: Tensor,
    v: Tensor,
    bias: Tensor | None,
    dim: int | None,
    form: str,
    eps: float,
    tf32: bool,
    config: configs.MatmulConfig | None,
    may_copy: bool = True,
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor]]:
    """`run(a, v, g, n, bias)` returns `(A Wᵀ + bias,)` for `a` of shape `(M, R)` and `v` laid out
    here as `(O, R)`; `run` takes either view of its memory."""
    (m, r), o = a.shape, v.shape[0]
    c = unallocated((m, o), a.dtype)
    turned = v.stride(1) != 1
    lying = v.t() if turned else v
    size = max(a.element_size(), v.element_size())  # V's tile is held in its own dtype
    copies = may_copy and configs.may_copy(m, size, target)
    copies = copies and is_describable(a) and is_describable(lying)
    if config is None and form == "one_pass":
        config = configs.one_pass(m, o, size, target)
    elif config is None:
        ieee = a.dtype == torch.float32 and not tf32
        prologue = form.startswith("prologue")
        config = configs.matmul(m, o, size, prologue, ieee, copies, target)
    loads = configs.loads(config, form, target) if copies else "pointers"
    described = loads != "pointers"
    launch = Launcher(
        matmul_kernel,
        target,
        (triton.cdiv(m, config.BLOCK_M) * triton.cdiv(o, config.BLOCK_O),),
        M=m,
        O=o,
        R=r,
        EPS=eps,
        stride_am=a.stride(0),
        stride_ar=a.stride(1),
        stride_vo=v.stride(0),
        stride_vr=v.stride(1),
        stride_s=0 if dim is None else 1,
        stride_bias=0 if bias is None else bias.stride(0),
        stride_cm=c.stride(0),
        stride_co=c.stride(1),
        FORM=form,
        HAS_BIAS=bias is not None,
        EVEN_R=r % config.BLOCK_R == 0,
        WIDE=is_wide(a, v, c),
        LOADS=loads,
        TURNED=turned and described,
        SPLIT=configs.split(config, a.element_size()),
        GROUP=8,
        descriptors=described,
        **product_types(a, tf32),
        **config._asdict(),
    )

    if not described:
        run = Pass("a", "v", "g", "n", "bias")
        run.new(c=c)
        run.call(launch, "a", "v", "g", "n", "c" if bias is None else "bias", "c")
        return run.returning("c")
    new_c = allocator(c)
    block_m, block_o, block_r = config[:3]
    describe_a = describer(a, (block_m, block_r))
    describe_v = describer(lying, (block_r, block_o) if turned else (block_o, block_r))
    layouts = a, v, bias

    @cache
    def unaligned() -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor]]:
        return _prepare_matmul(target, *layouts, dim, form, eps, tf32, None, may_copy=False)

    def run_described(
        a: Tensor, v: Tensor, g: Tensor, n: Tensor, bias: Tensor | None
    ) -> tuple[Tensor]:
        if (a.data_ptr() | v.data_ptr()) & 15:
            return unaligned()(a, v, g, n, bias)
        c = new_c(a)
        launch(describe_a(a), describe_v(v), g, n, c if bias is None else bias, c)
        return (c,)

    return run_described


Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def linear_backward(
    dy: Tensor,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    n: Tensor,
    dim: int | None,
    eps: float,
    variant: str,
    needs: tuple[bool, bool, bool, bool],
    *,
    matmul_config: configs.MatmulConfig | None = None,
    grad_config: configs.GradConfig | None = None,
) -> Grads:
    """`(dX, dV, dg, db)`, `None` where `needs` says so and no other output brings it along."""
    g = g.contiguous()
    options = dim, eps, variant, needs, takes_tf32(x.dtype), matmul_config, grad_config
    return remembered_linear_backward(target_of(x), (dy, x, v, g), *options)(dy, x, v, g, n)


def prepare_linear_backward(
    target: Target,
    dy: Tensor,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    dim: int | None,
    eps: float,
    variant: str,
    needs: tuple[bool, bool, bool, bool],
    tf32: bool,
    matmul_config: configs.MatmulConfig | None = None,
    grad_config: configs.GradConfig | None = None,
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Grads]:
    """`run(dy, x, v, g, n)` returns `(dX, dV, dg, db)`."""
    needs_x, needs_v, needs_g, needs_bias = needs
    needs_weight = needs_v or needs_g
    if variant == "materialize":
        weight_norm = weight.remembered_weight_norm(target, (v, g), dim, eps, x.dtype)
        dw = unallocated(v.shape, x.dtype)
        finish = weight.remembered_weight_norm_backward(target, (dw, v, g), dim, eps)

        def run_materialized(dy: Tensor, x: Tensor, v: Tensor, g: Tensor, n: Tensor) -> Grads:
            dx = torch.mm(dy, weight_norm(v, g)[0]) if needs_x else None
            dv, dg = finish(torch.mm(dy.t(), x), v, g, n) if needs_weight else (None, None)
            return dx, dv, dg, dy.sum(0) if needs_bias else None

        return run_materialized
    run = Pass("dy", "x", "v", "g", "n")
    if needs_x:
        form = _form(dim, 0, narrows_range(x.dtype, v.dtype))
        product = _prepare_matmul(target, dy, v.t(), None, dim, form, eps, tf32, matmul_config)
        run.call(product, "dy", "v", "g", "n", None, gives=("dx",))
    dx = "dx" if needs_x else None
    if needs_weight:
        one_pass = variant == "one_pass"
        weight_grad = prepare_weight_grad(
            target, dy, x, v, g, dim, eps, one_pass, needs_bias, tf32, grad_config
        )
        run.call(weight_grad, "dy", "x", "v", "g", "n", gives=("dv", "dg", "db"))
        return run.returning(dx, "dv", "dg", "db")
    if not needs_bias:
        return run.returning(dx, None, None, None)
    run.call(lambda dy: (dy.sum(0),), "dy", gives=("db",))
    return run.returning(dx, None, None, "db")


remembered_linear_backward = remembered(prepare_linear_backward)

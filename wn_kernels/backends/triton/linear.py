"""The linear layer: `y = x Wᵀ + b` and its gradients, with `W = s ⊙ V`, `s = g / n`.

    one_pass     y = (Σ_k x V) / ‖V_n‖ · g + b    the norm in the loop of the product: V is read
                                                  once, for a few rows of x; where programs share
                                                  the k of a tile, a pass adds what they leave
    scaled       y = (x Vᵀ) ⊙ s + b               dim=0 or None: PyTorch's product with V itself,
                 dX = (dY ⊙ s) V                  and a pass over the smaller factor or result
                 y = (x ⊙ s) Vᵀ + b               dim=1: the scale lies on the other side
                 dX = (dY V) ⊙ s
    materialize  W = s ⊙ V by a kernel            PyTorch's product with it

The scaled form rounds twice, as PyTorch rounds `W` and then the product. It needs one dtype, and
one whose range an unscaled product does not leave (`call.fits_unscaled`); elsewhere `dX` takes `W`.

The weight's gradient is `dW = dYᵀ x` by PyTorch and a pass that turns it into `dV` and `dg`. For a
few rows (`linear_grad.py`), one kernel recomputes `dW` instead, or computes `dX` as well from one
read of `V`, if the forward kept the product `x Vᵀ`.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...call import Norm, fits_unscaled, scale_dtype, takes_tf32
from .. import tiles
from . import configs, weight
from .common import as_norm, cast, dot, finished, merged, merged_along, offsets, partial_of
from .configs import Target
from .launch import Launcher, is_wide, product_types, remembered, target_of, unallocated
from .linear_grad import prepare_grads, prepare_weight_grad, prepare_weight_product
from .norm import remembered_slice_norms
from .passes import Pass, Product, Sums
from .scale import prepare_dots, prepare_scale

# --- kernels -----------------------------------------------------------------------------------


@triton.jit
def _store_scaled(
    product,
    partial,
    G,
    NORMS,
    BIAS,
    Y,
    P,
    at,
    offs_o,
    mask,
    mask_o,
    stores_norms,
    stride_bias,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Stores a tile of Y, and with KEEP of the product, from the product and the slices' partials."""
    if KEEP:
        tl.store(P + at, product, mask=mask)
    n = as_norm(partial, EPS, NORM)
    tl.store(NORMS + offs_o, n, mask=mask_o & stores_norms)
    g = tl.load(G + offs_o, mask=mask_o, other=0.0).to(n.dtype)
    y = product * (g / n).to(product.dtype)[None, :]
    if HAS_BIAS:
        bias = tl.load(BIAS + offs_o * stride_bias, mask=mask_o, other=0.0)
        y += bias.to(product.dtype)[None, :]
    tl.store(Y + at, y, mask=mask)


@triton.jit
def one_pass_kernel(
    X,
    V,
    G,
    NORMS,
    BIAS,
    Y,
    P,
    M,
    O,
    R,
    steps,
    stride_xm,
    stride_xr,
    stride_vo,
    stride_vr,
    stride_bias,
    stride_ym,
    stride_yo,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN_R: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    WAITS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Y = X Wᵀ + bias and the norms, for a tile of the rows of X and of those of V. The programs of
    all tiles of X compute the norms, and those of the first one store them.

    PARTS: programs share the r of a tile, `steps` tiles of it each. They leave the product of their
    share in Y, (shares, M, O), and its partial of each norm in NORMS, (shares, O).
    SPLIT > 1: so many products of a share of a tile's r each, one to a warp.
    KEEP: P, which lies as Y does, is X Vᵀ.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles = tiles_m * tl.cdiv(O, BLOCK_O)
    share = tl.program_id(0) // tiles
    tile_m = tl.program_id(0) % tiles_m
    offs_m = offsets(tile_m, BLOCK_M, WIDE)
    offs_o = offsets(tl.program_id(0) % tiles // tiles_m, BLOCK_O, WIDE)
    mask_m = offs_m < M
    mask_o = offs_o < O
    norm_type = NORMS.dtype.element_ty
    if SPLIT == 1:
        acc = tl.zeros((BLOCK_M, BLOCK_O), ACC)
    else:
        acc = tl.zeros((SPLIT, BLOCK_M, BLOCK_O), ACC)
    # Partials of the norms stay inside a thread until the loop is over: no shuffles in it.
    partials = tl.zeros((BLOCK_O, BLOCK_R // 8), norm_type)

    first = share * steps
    end = tl.minimum(tl.cdiv(R, BLOCK_R), first + steps)
    for tile in range(first, end):
        offs_r = offsets(tile, BLOCK_R, WIDE)
        x_at = X + offs_m[:, None] * stride_xm + offs_r[None, :] * stride_xr
        v_at = V + offs_o[:, None] * stride_vo + offs_r[None, :] * stride_vr
        if EVEN_R:
            x = tl.load(x_at, mask=mask_m[:, None], other=0.0)
            v = tl.load(v_at, mask=mask_o[:, None], other=0.0)
        else:
            mask_r = offs_r < R
            x = tl.load(x_at, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
            v = tl.load(v_at, mask=mask_o[:, None] & mask_r[None, :], other=0.0)
        factor = cast(v, x.dtype)
        if SPLIT == 1:
            acc = dot(x, tl.trans(factor), acc, PRECISION)
        else:
            factor = tl.reshape(factor, (BLOCK_O, SPLIT, BLOCK_R // SPLIT))
            x = tl.permute(tl.reshape(x, (BLOCK_M, SPLIT, BLOCK_R // SPLIT)), (1, 0, 2))
            acc = dot(x, tl.permute(factor, (1, 2, 0)), acc, PRECISION)
        single = partial_of(v.to(norm_type), NORM)
        eight = merged_along(tl.reshape(single, (BLOCK_O, BLOCK_R // 8, 8)), 2, NORM)
        partials = merged(partials, eight, NORM)
        acc = finished(acc, first, end, WAITS)
    if SPLIT > 1:
        acc = tl.sum(acc, axis=0)

    partial = merged_along(partials, 1, NORM)
    mask = mask_m[:, None] & mask_o[None, :]
    if PARTS:
        tl.store(Y + (share * M + offs_m)[:, None] * O + offs_o[None, :], acc, mask=mask)
        tl.store(NORMS + share * O + offs_o, partial, mask=mask_o & (tile_m == 0))
    else:
        at = offs_m[:, None] * stride_ym + offs_o[None, :] * stride_yo
        _store_scaled(
            acc,
            partial,
            G,
            NORMS,
            BIAS,
            Y,
            P,
            at,
            offs_o,
            mask,
            mask_o,
            tile_m == 0,
            stride_bias,
            EPS=EPS,
            NORM=NORM,
            HAS_BIAS=HAS_BIAS,
            KEEP=KEEP,
        )


@triton.jit
def add_parts_kernel(
    PARTS,
    PARTIALS,
    G,
    NORMS,
    BIAS,
    Y,
    P,
    M,
    O,
    shares,
    stride_bias,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Y, the norms and P of `one_pass_kernel` from what its programs left of their shares of r, by
    a tile of the dense Y. They are added in order."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_m = tl.program_id(0) % tiles_m
    offs_m = offsets(tile_m, BLOCK_M, WIDE)
    offs_o = offsets(tl.program_id(0) // tiles_m, BLOCK_C, WIDE)
    mask_o = offs_o < O
    mask = (offs_m < M)[:, None] & mask_o[None, :]
    at = offs_m[:, None] * O + offs_o[None, :]
    product = tl.load(PARTS + at, mask=mask, other=0.0)
    partial = tl.load(PARTIALS + offs_o, mask=mask_o, other=0.0)
    for share in range(1, shares):
        offs_m += M
        part = PARTS + offs_m[:, None] * O + offs_o[None, :]
        product += tl.load(part, mask=mask, other=0.0)
        other = tl.load(PARTIALS + share * O + offs_o, mask=mask_o, other=0.0)
        partial = merged(partial, other, NORM)
    _store_scaled(
        product,
        partial,
        G,
        NORMS,
        BIAS,
        Y,
        P,
        at,
        offs_o,
        mask,
        mask_o,
        tile_m == 0,
        stride_bias,
        EPS=EPS,
        NORM=NORM,
        HAS_BIAS=HAS_BIAS,
        KEEP=KEEP,
    )


# --- the forward -------------------------------------------------------------------------------


def linear(
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    dim: int | None,
    eps: float,
    variant: str,
    keep: bool = False,
    *,
    norm: Norm = "l2",
    config: configs.SplitConfig | None = None,
) -> tuple[Tensor, ...]:
    """`(y, n)` for `x` of shape `(M, K)`; variants as in `costs.triton_linear`. With `keep`, `x Vᵀ`
    follows, for dim=0, of a variant that computes it."""
    g = g.contiguous()
    options = dim, eps, norm, variant, takes_tf32(x.dtype), keep, config
    return remembered_linear(target_of(x), (x, v, g, bias), *options)(x, v, g, bias)


def prepare_linear(
    target: Target,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    dim: int | None,
    eps: float,
    norm: Norm,
    variant: str,
    tf32: bool,
    keep: bool = False,
    config: configs.SplitConfig | None = None,
) -> Pass:
    """`run(x, v, g, bias)` returns `(y, n)` and, with `keep`, `x Vᵀ`, or nothing in its place where
    there is no row.

    Raises:
        ValueError: the variant cannot serve the call.
    """
    _check(variant, x, v, dim)
    if keep and (dim != 0 or variant == "materialize"):
        raise ValueError(f"{variant} does not compute the product x Vᵀ, or dim={dim} is not 0")
    kept: list[str | None] = ["p"] if keep else []
    run = Pass("x", "v", "g", "bias")
    product, added = Product(turns_b=True), "bias" if bias is not None else None
    if variant == "materialize" or not len(x):  # without a row, no program would run
        weight_norm = weight.remembered_weight_norm(target, (v, g), dim, eps, norm, x.dtype)
        run.call(weight_norm, "v", "g", gives=("w", "n"))
        run.call(product, "x", "w", added, gives=("y",))
        kept = [None] * keep
    elif variant == "one_pass":
        one_pass = _prepare_one_pass(target, x, v, bias, eps, norm, tf32, keep, config)
        run.call(one_pass, "x", "v", "g", "bias", gives=("y", "n", *kept))
    else:
        run.call(remembered_slice_norms(target, (v,), dim, eps, norm), "v", gives=("n",))
        if dim == 1:
            run.call(prepare_scale(target, x, dim), "x", "g", "n", None, gives=("s", "_"))
            run.call(product, "s", "v", added, gives=("y",))
        else:
            run.call(product, "x", "v", None, gives=("p",))
            scale = prepare_scale(target, _result(x, v), dim, bias, in_place=not keep)
            run.call(scale, "p", "g", "n", "bias", gives=("y", "_"))
    return run.returning("y", "n", *kept)


remembered_linear = remembered(prepare_linear)


def _check(variant: str, x: Tensor, v: Tensor, dim: int | None) -> None:
    """Raises a `ValueError` where a variant of the forward cannot serve a call."""
    if variant == "one_pass" and dim != 0:
        raise ValueError(f"one_pass needs dim=0, got dim={dim}")
    if variant == "scaled" and not fits_unscaled(x.dtype, v.dtype):
        raise ValueError(
            f"scaled needs x and V of one dtype other than float16, got {x.dtype} and {v.dtype}"
        )


def _result(x: Tensor, v: Tensor) -> Tensor:
    """The layout of `x Vᵀ`."""
    return unallocated((len(x), len(v)), x.dtype)


def _prepare_one_pass(
    target: Target,
    x: Tensor,
    v: Tensor,
    bias: Tensor | None,
    eps: float,
    norm: Norm,
    tf32: bool,
    keep: bool,
    config: configs.SplitConfig | None,
) -> Pass:
    """`run(x, v, g, bias)` returns `(y, n)` and, with `keep`, `x Vᵀ`."""
    (m, r), o, y = x.shape, len(v), _result(x, v)
    if config is None:  # V's tile is held in its own dtype
        size = max(x.element_size(), v.element_size())
        ieee = x.element_size() >= 4 and not tf32
        config = configs.one_pass(m, o, r, size, ieee, target)
    tiles_r = triton.cdiv(r, config.BLOCK_R)
    steps = triton.cdiv(tiles_r, config.splits)
    shares = max(1, triton.cdiv(tiles_r, max(1, steps)))  # none of which is empty
    n, types = unallocated((o, 1), scale_dtype(v)), product_types(x, tf32)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts = unallocated((shares, m, o), acc)
    options = {"EPS": eps, "NORM": norm, "HAS_BIAS": bias is not None, "KEEP": keep}
    options["stride_bias"] = 0 if bias is None else bias.stride(0)
    launch = Launcher(
        one_pass_kernel,
        target,
        (triton.cdiv(m, config.BLOCK_M) * triton.cdiv(o, config.BLOCK_O) * shares,),
        M=m,
        O=o,
        R=r,
        steps=steps,
        stride_xm=x.stride(0),
        stride_xr=x.stride(1),
        stride_vo=v.stride(0),
        stride_vr=v.stride(1),
        stride_ym=y.stride(0),
        stride_yo=y.stride(1),
        PARTS=shares > 1,
        EVEN_R=r % config.BLOCK_R == 0,
        WIDE=is_wide(x, v, parts),
        WAITS=target.is_hopper,
        SPLIT=configs.split(config, x.element_size()),
        **types,
        **(options if shares == 1 else options | {"HAS_BIAS": False, "KEEP": False}),
        **config.of_kernel(),
    )
    run = Pass("x", "v", "g", "bias")
    run.new(y=y, n=n)
    if keep:
        run.new(p=y)
    results = ("g", "n", "y" if bias is None else "bias", "y", "p" if keep else "y")
    if shares == 1:
        run.call(launch, "x", "v", *results)
    else:
        run.new(parts=parts, partials=unallocated((shares, o), n.dtype))
        run.call(launch, "x", "v", "g", "partials", "parts", "parts", "parts")
        tile = configs.added(m)
        add = Launcher(
            add_parts_kernel,
            target,
            (triton.cdiv(m, tile.BLOCK_M) * triton.cdiv(o, tile.BLOCK_C),),
            M=m,
            O=o,
            shares=shares,
            WIDE=is_wide(parts),
            **options,
            **tile._asdict(),
        )
        run.call(add, "parts", "partials", *results)
    return run.returning("y", "n", *["p"] * keep)


# --- the backward ------------------------------------------------------------------------------

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
    kept: Tensor | None = None,
    *,
    norm: Norm = "l2",
    config: configs.GradConfig | configs.SplitConfig | None = None,
) -> Grads:
    """`(dX, dV, dg, db)`, `None` where `needs` says so and no other output brings it along. `kept`
    is the product that `linear` returned, where it was kept."""
    g = g.contiguous()
    options = dim, eps, norm, variant, needs, takes_tf32(x.dtype), config
    run = remembered_linear_backward(target_of(x), (dy, x, v, g, kept), *options)
    return run(dy, x, v, g, n, *([] if kept is None else [kept]))


def prepare_linear_backward(
    target: Target,
    dy: Tensor,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    kept: Tensor | None,
    dim: int | None,
    eps: float,
    norm: Norm,
    variant: str,
    needs: tuple[bool, bool, bool, bool],
    tf32: bool,
    config: configs.GradConfig | configs.SplitConfig | None = None,
) -> Pass:
    """`run(dy, x, v, g, n)` returns `(dX, dV, dg, db)`. Where the product is `kept`, it comes last.

    `product` is the form that takes it. Without it, and where nothing but `dX` and `db` is needed,
    another one serves the call.

    Raises:
        ValueError: the variant cannot serve the call.
    """
    needs_x, needs_v, needs_g, needs_bias = needs
    run = Pass("dy", "x", "v", "g", "n", *([] if kept is None else ["p"]))
    if variant == "product":
        if dim != 0 or x.dtype == torch.float16:
            raise ValueError(f"product needs dim=0 and no float16, got dim={dim} and {x.dtype}")
        if norm == "linf":
            raise ValueError("product has no walk over V that counts the ties of the norm linf")
        if kept is not None and (needs_v or needs_g) and v.numel() and len(x):
            dots = prepare_dots(target, dy, v, g, eps, norm)
            run.call(dots, "dy", "p", "g", "n", gives=("s", "db", "dg", "c"))
            if _walks(x, v, config):
                grads = prepare_grads(target, x, v, norm, needs_x, tf32, config)
                run.call(grads, "s", "x", "v", "c", gives=("dx", "dv"))
            else:
                if needs_x:
                    run.call(Product(), "s", "v", None, gives=("dx",))
                weight_product = prepare_weight_product(target, x, v, norm, tf32, config)
                run.call(weight_product, "s", "x", "v", "c", gives=("dv",))
            return run.returning("dx" if needs_x else None, "dv", "dg", "db" * needs_bias or None)
        config, variant = None, _without_product(x, v)
    assert not isinstance(config, configs.SplitConfig)
    one_pass = variant == "one_pass"
    late = variant != "materialize" and fits_unscaled(x.dtype, v.dtype)
    if variant == "scaled":
        _check(variant, x, v, dim)
    dv = dg = db = None
    if needs_x and not late:
        weight_norm = weight.remembered_weight_norm(target, (v, g), dim, eps, norm, x.dtype)
        run.call(weight_norm, "v", "g", gives=("w", "_"))
        run.call(Product(), "dy", "w", None, gives=("dx",))
    elif needs_x and dim == 1:
        run.call(Product(), "dy", "v", None, gives=("dx",))
        scale = prepare_scale(target, unallocated(x.shape, x.dtype), dim, in_place=True)
        run.call(scale, "dx", "g", "n", None, gives=("dx", "_"))
    elif needs_x:
        rides = needs_bias and not one_pass and len(dy) <= tiles.SUMMED_ROWS
        scale = prepare_scale(target, dy, dim, sums=rides)
        run.call(scale, "dy", "g", "n", None, gives=("s", "sums"))
        run.call(Product(), "s", "v", None, gives=("dx",))
        db = "sums" if rides else None
    if needs_v or needs_g:
        dv, dg = "dv", "dg"
        if one_pass:
            weight_grad = prepare_weight_grad(
                target, dy, x, v, g, dim, eps, norm, needs_bias, tf32, config
            )
            run.call(weight_grad, "dy", "x", "v", "g", "n", gives=("dv", "dg", "db"))
            db = "db" if needs_bias else None
        else:
            run.call(Product(turns_a=True), "dy", "x", None, gives=("dw",))
            dw = unallocated(v.shape, x.dtype)
            finish = weight.remembered_weight_norm_backward(target, (dw, v, g), dim, eps, norm)
            run.call(finish, "dw", "v", "g", "n", gives=("dv", "dg"))
    if needs_bias and db is None:
        run.call(Sums(), "dy", gives=("db",))
        db = "db"
    return run.returning("dx" if needs_x else None, dv, dg, db)


def _walks(x: Tensor, v: Tensor, config: Any) -> TypeGuard[configs.SplitConfig | None]:
    """Whether one walk over `V` computes both gradients of a kept product."""
    if config is not None:
        return isinstance(config, configs.SplitConfig)
    few = len(x) <= tiles.walked_rows(max(x.element_size(), v.element_size()))
    return few or not fits_unscaled(x.dtype, v.dtype)


def _without_product(x: Tensor, v: Tensor) -> str:
    """The form that serves a call of `product` without the product."""
    if len(x) <= tiles.one_pass_rows(max(x.element_size(), v.element_size()), grad=True):
        return "one_pass"
    return "scaled" if fits_unscaled(x.dtype, v.dtype) else "materialize"


remembered_linear_backward = remembered(prepare_linear_backward)

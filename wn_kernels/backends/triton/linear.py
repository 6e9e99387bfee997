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

from typing import Any

import torch
from torch import Tensor

from ...call import Norm, fits_unscaled, takes_tf32
from .. import tiles
from . import configs, weight
from .configs import Target
from .launch import kept_product, remembered, target_of, unallocated
from .linear_grad import prepare_grads, prepare_weight_grad, prepare_weight_product
from .norm import prepare_slice_norms
from .one_pass import prepare_one_pass
from .passes import Pass, Product, Sums
from .scale import prepare_dots, prepare_scale

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
    """`(y, n)` for `x` of shape `(M, K)`; variants as in `costs.triton_linear`. With `keep`, the
    `kept_product` follows, for dim=0, of a variant that computes it."""
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
    """`run(x, v, g, bias)` returns `(y, n)` and, with `keep`, the `kept_product`, or nothing in its
    place where there is no row.

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
        one_pass = prepare_one_pass(target, x, v, bias, eps, norm, tf32, keep, config)
        run.call(one_pass, "x", "v", "g", "bias", gives=("y", "n", "p")[: 2 + keep])
    else:
        counts = keep and norm == "linf"
        into = ["p"] * counts  # its first row takes the ties, and the others the product
        if counts:
            run.new(p=kept_product(x, v, norm))
        norms = prepare_slice_norms(target, v, dim, eps, norm, counts=counts)
        run.call(norms, "v", *into, gives=("n",))
        if dim == 1:
            run.call(prepare_scale(target, x, dim), "x", "g", "n", None, gives=("s", "_"))
            run.call(product, "s", "v", added, gives=("y",))
        else:
            run.call(product, "x", "v", None, *into, gives=("xv",))
            scale = prepare_scale(target, _result(x, v), dim, bias, in_place=not keep)
            run.call(scale, "xv", "g", "n", "bias", gives=("y", "_"))
            kept = ["p" if counts else "xv"] * keep
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
        if kept is not None and (needs_v or needs_g) and v.numel() and len(x):
            dots = prepare_dots(target, dy, v, g, eps, norm)
            run.call(dots, "dy", "p", "g", "n", gives=("s", "db", "dg", "c"))
            if _walks(x, v, config):
                own = config if isinstance(config, configs.SplitConfig) else None
                grads = prepare_grads(target, x, v, norm, needs_x, tf32, own)
                run.call(grads, "s", "x", "v", "c", "n", gives=("dx", "dv"))
            else:
                if needs_x:
                    run.call(Product(), "s", "v", None, gives=("dx",))
                tile = config if isinstance(config, configs.GradConfig) else None
                weight_product = prepare_weight_product(target, x, v, norm, tf32, tile)
                run.call(weight_product, "s", "x", "v", "c", "n", gives=("dv",))
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


def _walks(x: Tensor, v: Tensor, config: Any) -> bool:
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

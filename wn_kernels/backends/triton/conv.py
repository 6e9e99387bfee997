"""The convolutions: which kernels make up each variant, forward and backward.

    packed       one kernel builds W in the product's dtype with channels last, then our product
    materialize  one kernel builds W, then the vendor's convolution
    one_pass     the norms in the loop of the product, one launch; forward, for groups of few
                 channels
    weight_grad  backward: the vendor's dX, from a W that one kernel builds, and our gradient of the
                 weight

`conv_product.py` has the products, `conv_grad.py` the gradient of the weight, which one kernel
turns into `dV` and `dg` (`weight.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ...call import Geometry, Norm, takes_tf32
from .. import vendor
from ..vendor import convolution_grads
from . import configs, weight
from .configs import Target
from .conv_grad import prepare_weight_grad
from .conv_product import prepare_one_pass, prepare_product
from .launch import remembered, target_of, unallocated
from .passes import InputGrad, Pass, Sums
from .pixels import with_channels_last
from .repack import repack


def _like(x: Tensor, channels: int, sizes: list[int] | torch.Size, v: Tensor) -> Tensor:
    """The layout of an activation of these sizes, channels-last where PyTorch's convolution of `x`
    with `V` would return it so."""
    if x.ndim > 3:
        memory_format = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        if any(
            t.is_contiguous(memory_format=memory_format) and not t.is_contiguous() for t in (x, v)
        ):
            return with_channels_last(len(x), channels, sizes, x.dtype)
    return unallocated((len(x), channels, *sizes), x.dtype)


def convolution(
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    conv: Geometry,
    dim: int | None,
    eps: float,
    variant: str,
    *,
    norm: Norm = "l2",
    config: configs.SplitConfig | configs.DirectConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(y, n, W)` for `x` of shape `(B, C, *sizes)`; variants as in `costs.triton_convolution`. `W`
    is `None` where none is formed."""
    g = g.contiguous()
    if variant == "materialize":
        w, n = weight.weight_norm(v, g, dim, eps, x.dtype, norm=norm)
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return vendor.convolution(x, w, bias, conv), n, w
    options = conv, dim, eps, norm, variant, takes_tf32(x.dtype, "conv"), config
    return remembered_convolution(target_of(x), (x, v, g, bias), *options)(x, v, g, bias)


def prepare_convolution(
    target: Target,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    conv: Geometry,
    dim: int | None,
    eps: float,
    norm: Norm,
    variant: str,
    tf32: bool,
    config: configs.SplitConfig | configs.DirectConfig | None = None,
) -> Pass:
    """`run(x, v, g, bias)` returns `(y, n, W)`."""
    sizes = conv.output_sizes(x.shape[2:], v.shape[2:])
    out = _like(x, conv.out_channels(v.shape), sizes, v)
    run = Pass("x", "v", "g", "bias")
    a, x = repack(run, target, "x", x)
    given_bias = "bias"
    if bias is not None and bias.stride(0) != 1:
        given_bias, bias = "dense bias", unallocated(bias.shape, bias.dtype)
        run.call(lambda bias: (bias.contiguous(),), "bias", gives=(given_bias,))
    # Without an input, no program would run that takes the norms.
    if variant == "one_pass" and len(x):
        if not (conv.has_small_groups(v.shape) and conv.owns_slices(dim)):
            raise ValueError(
                "one_pass needs groups of few channels and whole slices in each output channel, "
                f"got groups={conv.groups} of a weight of {tuple(v.shape)} and dim={dim}"
            )
        assert not isinstance(config, configs.SplitConfig)
        product = prepare_one_pass(target, x, v, bias, out, conv, eps, norm, config)
        run.call(product, a, "v", "g", given_bias, gives=("y", "n"))
        return run.returning("y", "n", None)
    weight_norm = _prepare_weight(target, x, v, g, dim, eps, norm, channels_last=True)
    run.call(weight_norm, "v", "g", gives=("w", "n"))
    w = weight.packed(v, x.dtype)
    product = prepare_product(target, x, w, bias, out, conv, conv.transposed, tf32, config)
    run.call(product, a, "w", given_bias, gives=("y",))
    return run.returning("y", "n", "w")


remembered_convolution = remembered(prepare_convolution)


def _prepare_weight(
    target: Target,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    dim: int | None,
    eps: float,
    norm: Norm,
    channels_last: bool,
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`run(v, g)` returns a `W` in `x`'s dtype, and the norms."""
    options = dim, eps, norm, x.dtype, None, None, channels_last
    return weight.remembered_weight_norm(target, (v, g), *options)


Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def convolution_backward(
    dy: Tensor,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    n: Tensor,
    conv: Geometry,
    dim: int | None,
    eps: float,
    variant: str,
    needs: tuple[bool, bool, bool, bool],
    kept: Tensor | None = None,
    *,
    norm: Norm = "l2",
    config: configs.SplitConfig | configs.DirectConfig | None = None,
    grad_config: configs.GradConfig | configs.DirectConfig | None = None,
) -> Grads:
    """`(dX, dV, dg, db)`, `None` where `needs` says so and no other output brings it along. `kept`
    is the `W` that `convolution` returned, where it was kept."""
    g = g.contiguous()
    how = variant, needs, takes_tf32(x.dtype, "conv"), config, grad_config
    options = conv, dim, eps, norm, *how
    run = remembered_convolution_backward(target_of(x), (dy, x, v, g, kept), *options)
    return run(dy, x, v, g, n, *([] if kept is None else [kept]))


def prepare_convolution_backward(
    target: Target,
    dy: Tensor,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    kept: Tensor | None,
    conv: Geometry,
    dim: int | None,
    eps: float,
    norm: Norm,
    variant: str,
    needs: tuple[bool, bool, bool, bool],
    tf32: bool,
    config: configs.SplitConfig | configs.DirectConfig | None = None,
    grad_config: configs.GradConfig | configs.DirectConfig | None = None,
) -> Pass:
    """`run(dy, x, v, g, n)` returns `(dX, dV, dg, db)`. Where `W` is `kept`, it comes last."""
    needs_x, needs_v, needs_g, needs_bias = needs
    needs_weight = needs_v or needs_g
    run = Pass("dy", "x", "v", "g", "n", *([] if kept is None else ["kept"]))
    own = variant == "packed"
    w = "kept"
    if needs_x and kept is None:
        # A vendor's convolution takes a weight that lies as its activations do.
        last = own or _is_channels_last(x)
        weight_norm = _prepare_weight(target, x, v, g, dim, eps, norm, last)
        run.call(weight_norm, "v", "g", gives=("w", "_"))
        w = "w"
    results: dict[str, str | None] = {"dx": None, "dv": None, "dg": None, "db": None}
    if variant == "materialize":

        def grads(dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor | None, ...]:
            w = w.to(x.dtype)  # V's values do not matter for dW
            return convolution_grads(dy, x, w, conv, needs_x, needs_weight, needs_bias)

        run.call(grads, "dy", "x", w if needs_x else "v", gives=("dx", "dw", "db"))
        results |= {"dx": "dx", "db": "db"}
        if needs_weight:
            run.call(_finish(dim, eps, norm), "dw", "v", "g", "n", gives=("dv", "dg"))
            results |= {"dv": "dv", "dg": "dg"}
        return run.returning(*results.values())

    if needs_x and not own:
        run.call(InputGrad(conv), "dy", "x", w, gives=("dx",))
        results["dx"] = "dx"
    if (needs_x and own) or needs_weight:
        given_dy, packed_dy = repack(run, target, "dy", dy)  # once for both products
    if needs_x and own:
        product = prepare_product(
            *(target, packed_dy, weight.packed(v, x.dtype), None, torch.empty_like(x)),
            *(conv, not conv.transposed, tf32, config),
        )
        run.call(product, given_dy, w, None, gives=("dx",))
        results["dx"] = "dx"
    if needs_weight:
        given_x, packed_x = repack(run, target, "x", x)
        weight_grad, dw = prepare_weight_grad(
            target, packed_dy, packed_x, v, conv, needs_bias, tf32, grad_config
        )
        run.call(weight_grad, given_dy, given_x, gives=("dw", "db"))
        finish = weight.remembered_weight_norm_backward(target, (dw, v, g), dim, eps, norm)
        run.call(finish, "dw", "v", "g", "n", gives=("dv", "dg"))
        results |= {"dv": "dv", "dg": "dg", "db": "db"}
    if needs_bias and (not needs_weight or conv.transposed):
        run.call(Sums(), "dy", gives=("db",))
        results["db"] = "db"
    return run.returning(*results.values())


remembered_convolution_backward = remembered(prepare_convolution_backward)


def _finish(dim: int | None, eps: float, norm: Norm) -> Callable[..., tuple[Tensor, Tensor]]:
    """`run(dw, v, g, n)` returns `(dV, dg)`; the vendor alone determines the layout of its `dW`."""
    return functools.partial(weight.weight_norm_backward, dim=dim, eps=eps, norm=norm)


def _is_channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.shape[1] > 1

"""This file holds the public functions. They check their arguments and call the engine once.

    import wn_kernels.functional as WF

    y = WF.wn_linear(x, v, g, bias)                # x Wᵀ + b, with W = g · V / ‖V‖
    y = WF.wn_conv1d(x, v, g, bias, padding=1)     # and 2d, 3d, and the transposed ones
    w = WF.weight_norm(v, g)                       # W itself, differentiable

Weight normalisation was introduced by Salimans & Kingma, *Weight Normalization: A Simple
Reparameterization to Accelerate Training of Deep Neural Networks*, 2016, equation (2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import autograd, composed, grouped, launched, operators, plan
from .backends import aten, native, reference
from .call import (
    Norm,
    Operands,
    canonical_dim,
    canonical_norm,
    product_dtype,
)
from .prepare import are_dense, prepare, reject

# By backend, the function that a call goes to first. It takes the arguments of `run`, and returns
# `None` for a call that it does not serve.
_servers: dict[str, Callable[..., Tensor | None]] = {}
native.memos.append(_servers)


def _find_server(backend: str) -> Callable[..., Tensor | None]:
    library = operators.native_library()
    if backend == "triton":
        _servers[backend] = (library or launched).launched
    elif backend == "native" and library:
        _servers[backend] = library.computed
    else:
        _servers[backend] = composed.composed
    return _servers[backend]


def run(
    rank: int | None,
    x: Tensor | None,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, ...],
    dim: int | None,
    eps: float,
    norm: Norm,
) -> Tensor:
    """Runs every call. `rank` is the number of spatial dimensions of a convolution, 0 for a linear
    layer, and `None` for the weight alone, which has no `x`."""
    if backend := plan.prepares(v):
        serve = _servers.get(backend) or _find_server(backend)
        y = serve(rank, x, v, g, bias, geometry, dim, eps, norm)
        if y is not None:
            return y
    return _run_checked(rank, x, v, g, bias, geometry, dim, eps, norm)


def _run_checked(
    rank: int | None,
    x: Tensor | None,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, ...],
    dim: int | None,
    eps: float,
    norm: Norm,
) -> Tensor:
    """Runs a call that its backend's server declines. The arguments are those of `run`."""
    if rank is None:
        rank = 0
    elif x is None:
        reject(input=x, v=v, g=g, bias=bias)
    if not are_dense(v if x is None else x, v, g, bias):
        if not isinstance(x, Tensor) and has_torch_function((x,)):  # torch.fx traces a layer
            return handle_torch_function(run, (x,), rank, x, v, g, bias, geometry, dim, eps, norm)
        reject(**{} if x is None else {"input": x}, v=v, g=g, bias=bias)
    if x is not None and torch._C._is_any_autocast_enabled():
        x = x.to(product_dtype(x))
    backend = plan.choose_backend(v)
    tensors = Operands(x, v, g, bias)
    found = prepare(rank, tensors, geometry, dim, eps, norm, backend)
    call, chosen, g_shape, pad, batched, fits = found
    if backend == "native":  # the library has declined the call already
        raise plan.cannot_serve(backend)
    if not fits:
        g = g.view(g_shape)
        if x is not None and not batched:
            x = x.unsqueeze(0)
        if x is not None and pad is not None:
            x = F.pad(x, pad)
        tensors = Operands(x, v, g, bias)
    options = call.conv, call.dim, call.eps, call.norm
    if backend == "reference":
        y = reference.layer(*tensors, *options)
    else:
        try:
            if torch.is_grad_enabled() and (
                v.requires_grad
                or g.requires_grad
                or (x is not None and x.requires_grad)
                or (bias is not None and bias.requires_grad)
            ):
                y = autograd.layer(call, chosen, tensors)
            else:
                y = operators.layer(call, chosen, tensors, False)[0]
        except aten.OutOfRange:
            y = reference.layer_in_float64(*tensors, *options)
    return y if batched else y.squeeze(0)


def slice_norm(v: Tensor, *, dim: int | None = 0, norm: Norm = "l2") -> Tensor:
    """Returns the norms `‖V_j‖` of every slice along `dim`, in the shape of `g` and in `v`'s dtype.

    Those of `norm="l2"` are what `torch.norm_except_dim` returns. The others are the sum of
    magnitudes (`"l1"`) and the largest magnitude (`"linf"`). On a CPU they are accumulated as those
    of `weight_norm`, on a CUDA device in float64, and elsewhere in float32 or wider. The result is
    differentiable.

    Raises:
        TypeError, ValueError: as `weight_norm`.
    """
    n = operators.slice_norm(v, dim, norm)
    if n is None:
        if not are_dense(v, v, v, None):
            reject(v=v)
        dim, norm = canonical_dim(dim, v.ndim), canonical_norm(norm)
        n = autograd.slice_norm(v, dim, norm)
    return n if n.dtype is v.dtype else n.to(v.dtype)


def weight_norm(
    v: Tensor, g: Tensor, *, dim: int | None = 0, eps: float = 0.0, norm: Norm = "l2"
) -> Tensor:
    """Returns the weight `W = g · V / ‖V‖`, differentiable with respect to `v` and `g`.

    The norm `‖V_j‖` of every slice along `dim` is accumulated and kept in float32 (float64 for a
    float64 `v`). With `eps > 0` it is `max(‖V_j‖, eps)`. A slice of norm zero has direction zero:
    its weight is zero and its gradients are finite.

    The subgradients of the other norms are PyTorch's: that of `|v|` is zero at zero, and elements
    that share the largest magnitude share its gradient evenly.

    On a CPU, norms whose squares float32 cannot hold are computed in float64. On a GPU and in a
    compiled program norms are not checked. There they should lie between 1e-10 and 1e10.

    Args:
        v: the direction, of any shape, in float16, bfloat16, float32 or float64.
        g: the magnitude, of `v`'s shape with every dimension but `dim` set to 1 (0-d for
            `dim=None`), or 1-d of the same length. Any of the dtypes above.
        dim: the dimension whose slices are normalised; `None` or `-1` for one norm over the whole
            tensor, as in `torch._weight_norm`; `-2`, `-3`, ... count from the end.
        eps: the smallest norm.
        norm: `"l2"`, `"l1"` (the sum of magnitudes) or `"linf"` (the largest magnitude), after
            Hoffer et al. 2018, *Norm matters*.

    Returns:
        `W`, with the shape, the dtype and the memory layout of `v`.

    Raises:
        TypeError: an argument has the wrong type, dtype or layout.
        ValueError: the shape of `g` does not fit, `dim` or `eps` is out of range, `norm` is
            unknown, or the tensors are on different devices.
    """
    # This is how `run` begins, written out: for a small weight, a function more is 4 % of the time.
    if serve := _servers.get(plan.prepares(v)):
        w = serve(None, None, v, g, None, (), dim, eps, norm)
        return w if w is not None else _run_checked(None, None, v, g, None, (), dim, eps, norm)
    return run(None, None, v, g, None, (), dim, eps, norm)


def weight_norms(
    v: Sequence[Tensor],
    g: Sequence[Tensor],
    *,
    dim: int | Sequence[int | None] | None = 0,
    eps: float | Sequence[float] = 0.0,
    dtype: torch.dtype | Sequence[torch.dtype | None] | None = None,
    places: Sequence[Tensor] | None = None,
    norm: Norm | Sequence[Norm] = "l2",
) -> list[Tensor]:
    """Returns the weights `W_i = g_i · V_i / ‖V_i‖` of many layers, differentiable with respect to
    every `v` and `g`.

    Each of them is that of `weight_norm`. All are computed together: on a GPU by one launch, and so
    are all of their gradients; on a CPU by one call of the native library, whose threads share the
    work of all layers. Shapes, dtypes, memory layouts and options may differ.

    Args:
        v: the directions, as in `weight_norm`, all on one device.
        g: the magnitudes, one for each direction.
        dim: the kept dimension, one for all or one for each.
        eps: the smallest norm, one for all or one for each.
        dtype: the dtype of `W`, one for all or one for each. `None` is that of `v`.
        places: memory for the weights, one tensor for each, which nothing else uses. Each has the
            shape, the dtype and the memory layout of its weight. A path that can write a weight to
            its place does so, and returns that tensor.
        norm: the norm of a slice, as in `weight_norm`, one for all or one for each.

    Returns:
        A list of the weights. Each has the shape and the memory layout of its `v`. None of them
        shares memory with another one, unless their places do.

    Raises:
        TypeError: an argument has the wrong type, dtype or layout.
        ValueError: the lists differ in length, the shape of a `g` does not fit, a `dim` or an
            `eps` is out of range, a `norm` is unknown, or the tensors are on different devices. The
            message names the index.
    """
    for name, given in (("v", v), ("g", g)):
        if isinstance(given, Tensor) or not hasattr(given, "__iter__"):
            raise TypeError(f"{name} must be a list of tensors, got {type(given).__name__}")
    v, g = [*v], [*g]
    if len(v) != len(g):
        raise ValueError(f"v has {len(v)} tensors, but g has {len(g)}")
    if not v:
        return []
    named = {"dim": dim, "eps": eps, "dtype": dtype, "norm": norm}
    options = tuple([grouped.for_each(each, len(v)) for each in named.values()])
    for name, each in zip(named, options, strict=True):
        if len(each) != len(v):
            raise ValueError(f"{name} has {len(each)} values, but v has {len(v)} tensors")
    return grouped.formed(v, g, options, places)


def wn_linear(
    input: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None = None,
    *,
    dim: int | None = 0,
    eps: float = 0.0,
    norm: Norm = "l2",
) -> Tensor:
    """Computes a linear layer with a weight-normalised weight: `y = x Wᵀ + b`, `W = g · V / ‖V‖`.

    It equals `torch.nn.functional.linear(input, weight_norm(v, g, dim=dim, eps=eps), bias)`, but
    need not form the weight. Dtypes may differ. The product runs in the dtype of `input` (under
    autocast, in autocast's). Norms and scales are computed in float32 or wider. `v` is read in its
    own dtype.

    Args:
        input: `x`, of shape `(*, K)` with any number of leading dimensions.
        v: the direction, of shape `(N, K)`.
        g: the magnitude: `(N, 1)` for `dim=0`, `(1, K)` for `dim=1`, `()` for `dim=None`, or 1-d
            of the same length.
        bias: of shape `(N,)`, or `None`.
        dim: the dimension of `v` whose slices are normalised: 0 (each output), 1 (each input), or
            `None` / `-1` (one norm over the whole of `v`).
        eps: the smallest norm; see `weight_norm`.
        norm: the norm of a slice; see `weight_norm`.

    Returns:
        A tensor of shape `(*, N)` in the dtype of the product.

    Raises:
        TypeError: an argument has the wrong type, dtype or layout.
        ValueError: shapes do not fit, `dim` or `eps` is out of range, `norm` is unknown, or the
            tensors are on different devices.
    """
    return run(0, input, v, g, bias, (), dim, eps, norm)


def wn_conv1d(
    input: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    dim: int | None = 0,
    eps: float = 0.0,
    norm: Norm = "l2",
) -> Tensor:
    """Computes a 1-d convolution with a weight-normalised weight.

    It equals `torch.nn.functional.conv1d(input, weight_norm(v, g, dim=dim, eps=eps), bias, ...)`.
    Dtypes may differ. The product runs in the dtype of `input` (under autocast, in autocast's).
    Norms and scales are computed in float32 or wider.

    Args:
        input: `x`, of shape `(B, C, L)` or, unbatched, `(C, L)`.
        v: the direction, of shape `(N, C / groups, k)`.
        g: the magnitude: `v`'s shape with every dimension but `dim` set to 1 (0-d for `dim=None`),
            or 1-d of the same length.
        bias: of shape `(N,)`, or `None`.
        stride: as in `torch.nn.functional.conv1d`.
        padding: zeros on both sides, or `"same"` or `"valid"`.
        dilation: the distance between taps.
        groups: the number of groups that channels are divided into.
        dim: the dimension of `v` whose slices are normalised: 0 (each output channel), 1 (each
            input channel of a group), a kernel dimension (each of its positions), or `None` / `-1`
            (one norm over the whole of `v`).
        eps: the smallest norm; see `weight_norm`.
        norm: the norm of a slice; see `weight_norm`.

    Returns:
        A tensor of shape `(B, N, L_out)` or `(N, L_out)`, in the dtype of the product.

    Raises:
        TypeError: an argument has the wrong type, dtype or layout.
        ValueError: shapes or options do not fit, the output would be empty, `dim` or `eps` is out
            of range, `norm` is unknown, or the tensors are on different devices.
    """
    geometry = stride, padding, dilation, False, 0, groups
    return run(1, input, v, g, bias, geometry, dim, eps, norm)


def wn_conv2d(
    input: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    dim: int | None = 0,
    eps: float = 0.0,
    norm: Norm = "l2",
) -> Tensor:
    """Computes a 2-d convolution with a weight-normalised weight.

    It equals `torch.nn.functional.conv2d(input, weight_norm(v, g, dim=dim, eps=eps), bias, ...)`.

    Arguments, result and errors are those of `wn_conv1d`, with spatial dimensions `(H, W)` and a
    kernel of `(kh, kw)`.
    """
    geometry = stride, padding, dilation, False, 0, groups
    return run(2, input, v, g, bias, geometry, dim, eps, norm)


def wn_conv3d(
    input: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    dim: int | None = 0,
    eps: float = 0.0,
    norm: Norm = "l2",
) -> Tensor:
    """Computes a 3-d convolution with a weight-normalised weight.

    It equals `torch.nn.functional.conv3d(input, weight_norm(v, g, dim=dim, eps=eps), bias, ...)`.

    Arguments, result and errors are those of `wn_conv1d`, with spatial dimensions `(D, H, W)` and a
    kernel of `(kd, kh, kw)`.
    """
    geometry = stride, padding, dilation, False, 0, groups
    return run(3, input, v, g, bias, geometry, dim, eps, norm)


def wn_conv_transpose1d(
    input: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    dim: int | None = 0,
    eps: float = 0.0,
    norm: Norm = "l2",
) -> Tensor:
    """Computes a 1-d transposed convolution with a weight-normalised weight.

    It equals `torch.nn.functional.conv_transpose1d(input, weight_norm(v, g, dim=dim, eps=eps),
    bias, ...)`.

    Args:
        input: `x`, of shape `(B, C, L)` or, unbatched, `(C, L)`.
        v: the direction, of shape `(C, N / groups, k)`.
        g: the magnitude, as in `wn_conv1d`.
        bias: of shape `(N,)`, or `None`.
        stride: as in `torch.nn.functional.conv_transpose1d`.
        padding: the number of elements cut off each side of the output.
        output_padding: the number of elements added at one side of the output.
        groups: the number of groups that channels are divided into.
        dilation: the distance between taps.
        dim: the dimension of `v` whose slices are normalised: 0 (each input channel, PyTorch's
            default), 1 (each output channel of a group), a kernel dimension, or `None` / `-1`.
        eps: the smallest norm; see `weight_norm`.
        norm: the norm of a slice; see `weight_norm`.

    Returns:
        A tensor of shape `(B, N, L_out)` or `(N, L_out)`.

    Raises:
        TypeError, ValueError: as `wn_conv1d`.
    """
    geometry = stride, padding, dilation, True, output_padding, groups
    return run(1, input, v, g, bias, geometry, dim, eps, norm)


def wn_conv_transpose2d(
    input: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    dim: int | None = 0,
    eps: float = 0.0,
    norm: Norm = "l2",
) -> Tensor:
    """Computes a 2-d transposed convolution with a weight-normalised weight.

    It equals `torch.nn.functional.conv_transpose2d(input, weight_norm(v, g, dim=dim, eps=eps),
    bias, ...)`.

    Arguments, result and errors are those of `wn_conv_transpose1d`, with spatial dimensions
    `(H, W)` and a kernel of `(kh, kw)`.
    """
    geometry = stride, padding, dilation, True, output_padding, groups
    return run(2, input, v, g, bias, geometry, dim, eps, norm)


def wn_conv_transpose3d(
    input: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    dim: int | None = 0,
    eps: float = 0.0,
    norm: Norm = "l2",
) -> Tensor:
    """Computes a 3-d transposed convolution with a weight-normalised weight.

    It equals `torch.nn.functional.conv_transpose3d(input, weight_norm(v, g, dim=dim, eps=eps),
    bias, ...)`.

    Arguments, result and errors are those of `wn_conv_transpose1d`, with spatial dimensions
    `(D, H, W)` and a kernel of `(kd, kh, kw)`.
    """
    geometry = stride, padding, dilation, True, output_padding, groups
    return run(3, input, v, g, bias, geometry, dim, eps, norm)

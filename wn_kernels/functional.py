"""The public functions: they check their arguments, then make one call down.

    import wn_kernels.functional as WF

    y = WF.wn_linear(x, v, g, bias)      # x Wᵀ + b, with W = g · V / ‖V‖
    w = WF.weight_norm(v, g)             # W itself, differentiable

Weight normalisation is Salimans & Kingma, *Weight Normalization: A Simple Reparameterization to
Accelerate Training of Deep Neural Networks*, 2016, equation (2).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import autograd, ops, plan
from .backends import reference
from .backends.shapes import canonical_dim, canonical_eps, kept_shape, reduced_dims

_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


# --- checks --------------------------------------------------------------------------------------


def _dense(x: Tensor, v: Tensor, g: Tensor, bias: Tensor | None) -> bool:
    """Whether all are dense, real floating-point tensors on one device.

    Written out because it runs in every call; `_reject` names what a failure was.
    """
    try:
        return (
            x.dtype in _DTYPES
            and v.dtype in _DTYPES
            and g.dtype in _DTYPES
            and x.layout is v.layout is g.layout is torch.strided
            and x.device == v.device == g.device
            and not (x.is_nested or v.is_nested or g.is_nested)
            and (
                bias is None
                or (
                    bias.dtype in _DTYPES
                    and bias.layout is torch.strided
                    and bias.device == v.device
                    and not bias.is_nested
                )
            )
        )
    except AttributeError:
        return False


def _reject(**tensors: Tensor | None) -> NoReturn:
    """Raises the error that names why `_dense` is false for these arguments."""
    given = {name: t for name, t in tensors.items() if t is not None or name != "bias"}
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if t.layout is not torch.strided or t.is_nested:
            kind = "a nested tensor" if t.is_nested else f"layout {t.layout}"
            raise TypeError(f"{name} must be a dense (strided) tensor, got {kind}")
        if t.dtype not in _DTYPES:
            raise TypeError(
                f"{name} has dtype {t.dtype}; expected float16, bfloat16, float32 or float64"
            )
    devices = ", ".join(f"{name} on {t.device}" for name, t in given.items() if t is not None)
    raise ValueError(f"all tensors must be on one device, got {devices}")


def _memoised(check: Callable[..., Any]) -> Callable[..., Any]:
    """Remembers the answers of a check that depends on shapes and options alone."""
    cached = functools.lru_cache(maxsize=4096, typed=True)(check)

    @functools.wraps(check)
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return check(*args)
        try:
            return cached(*args)
        except TypeError:  # an argument that cannot be hashed, or the check's own error
            return check(*args)

    return call


@_memoised
def _check_weight(
    v_shape: torch.Size, g_shape: torch.Size, dim: int | None, eps: float
) -> tuple[int | None, float, tuple[int, ...]]:
    """`dim` and `eps` in canonical form, and the shape that `g` has to be viewed in."""
    dim = canonical_dim(dim, len(v_shape))
    shape = kept_shape(v_shape, dim)
    length = math.prod(shape)
    if g_shape != shape and g_shape != (length,):
        raise ValueError(
            f"g has shape {tuple(g_shape)}, but v of shape {tuple(v_shape)} with dim={dim} needs "
            f"g of shape {shape} or ({length},)"
        )
    return dim, canonical_eps(eps), shape


@_memoised
def _check_linear(
    x_shape: torch.Size,
    v_shape: torch.Size,
    g_shape: torch.Size,
    bias_shape: torch.Size | None,
    dim: int | None,
    eps: float,
) -> tuple[int | None, float, tuple[int, ...]]:
    """As `_check_weight`, for a linear layer."""
    if len(v_shape) != 2:
        raise ValueError(f"v must be 2-d, (out_features, in_features), got shape {tuple(v_shape)}")
    n, k = v_shape
    if len(x_shape) == 0 or x_shape[-1] != k:
        raise ValueError(
            f"input of shape {tuple(x_shape)} does not fit v of shape {tuple(v_shape)}: the last "
            f"dimension of input must be {k}"
        )
    if bias_shape is not None and bias_shape != (n,):
        raise ValueError(
            f"bias has shape {tuple(bias_shape)}, but v of shape {tuple(v_shape)} needs bias of "
            f"shape ({n},)"
        )
    return _check_weight(v_shape, g_shape, dim, eps)


# --- functions -----------------------------------------------------------------------------------


def _composite(backend: str) -> bool:
    """Whether the differentiable composite serves the call: it was forced, or a `torch.func`
    transform or forward-mode AD is active, which see through it to every order.

    Raises:
        RuntimeError: Triton is forced, and a transform is active.
    """
    if backend == "reference":
        return True
    # No public query exists for either; both are stable across the supported releases.
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if transformed and backend == "triton" and plan.is_forced():
        raise RuntimeError(
            "backend 'triton' was forced but cannot serve this call: a torch.func transform or "
            "forward-mode AD is active"
        )
    return transformed


def _autocast(input: Tensor) -> Tensor:
    """`input` as autocast would hand it to a linear layer: float64 stays as it is."""
    device_type = input.device.type
    if torch.is_autocast_enabled(device_type) and input.dtype != torch.float64:
        return input.to(torch.get_autocast_dtype(device_type))
    return input


def slice_norm(v: Tensor, *, dim: int | None = 0) -> Tensor:
    """The norms `‖V_j‖₂` of every slice along `dim`, in the shape of `g` and in `v`'s dtype.

    What `torch.norm_except_dim` returns, accumulated in float32 or wider. Differentiable.

    Raises:
        TypeError, ValueError: as `weight_norm`.
    """
    if not _dense(v, v, v, None):
        _reject(v=v)
    dim = canonical_dim(dim, v.ndim)
    dims = reduced_dims(v.ndim, dim)
    if not dims:
        return v.abs()
    dtype = reference.scale_dtype(v)
    n = torch.linalg.vector_norm(v, 2, dims, keepdim=dim is not None, dtype=dtype)
    return n.to(v.dtype)


def weight_norm(v: Tensor, g: Tensor, *, dim: int | None = 0, eps: float = 0.0) -> Tensor:
    """The weight `W = g · V / ‖V‖`, differentiable with respect to `v` and `g`.

    The norm `‖V_j‖₂` of every slice along `dim` is accumulated and kept in float32 (float64 for a
    float64 `v`). With `eps > 0` it is `max(‖V_j‖₂, eps)`. A slice of norm zero has direction zero:
    its weight is zero and its gradients are finite.

    Args:
        v: the direction, of any shape, in float16, bfloat16, float32 or float64.
        g: the magnitude, of `v`'s shape with every dimension but `dim` set to 1 (0-d for
            `dim=None`), or 1-d of the same length. Any of the dtypes above.
        dim: the dimension whose slices are normalised; `None` or `-1` for one norm over the whole
            tensor, as in `torch._weight_norm`; `-2`, `-3`, ... count from the end.
        eps: the smallest norm.

    Returns:
        `W`, with the shape, the dtype and the memory layout of `v`.

    Raises:
        TypeError: an argument has the wrong type, dtype or layout.
        ValueError: the shape of `g` does not fit, `dim` or `eps` is out of range, or the tensors
            are on different devices.
    """
    if not _dense(v, v, g, None):
        _reject(v=v, g=g)
    dim, eps, shape = _check_weight(v.shape, g.shape, dim, eps)
    if g.ndim != len(shape):
        g = g.view(shape)
    backend = plan.choose_backend(v)
    if _composite(backend):
        return reference.weight_norm(v, g, dim, eps)
    if torch.is_grad_enabled() and (v.requires_grad or g.requires_grad):
        return autograd.WeightNorm.apply(v, g, dim, eps, v.dtype, backend)
    return ops.weight_norm(v, g, dim, eps, v.dtype, backend)[0]


def wn_linear(
    input: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None = None,
    *,
    dim: int | None = 0,
    eps: float = 0.0,
) -> Tensor:
    """A linear layer with a weight-normalised weight: `y = x Wᵀ + b`, `W = g · V / ‖V‖`.

    Equal to `torch.nn.functional.linear(input, weight_norm(v, g, dim=dim, eps=eps), bias)`,
    without the weight. Dtypes may differ: the product runs in the dtype of `input` (under
    autocast, in autocast's), norms and scales in float32 or wider, and `v` is read once in its own
    dtype.

    Args:
        input: `x`, of shape `(*, K)` with any number of leading dimensions.
        v: the direction, of shape `(N, K)`.
        g: the magnitude: `(N, 1)` for `dim=0`, `(1, K)` for `dim=1`, `()` for `dim=None`, or 1-d
            of the same length.
        bias: of shape `(N,)`, or `None`.
        dim: the dimension of `v` whose slices are normalised: 0 (each output), 1 (each input), or
            `None` / `-1` (one norm over the whole of `v`).
        eps: the smallest norm; see `weight_norm`.

    Returns:
        A tensor of shape `(*, N)` in the dtype of the product.

    Raises:
        TypeError: an argument has the wrong type, dtype or layout.
        ValueError: shapes do not fit, `dim` or `eps` is out of range, or the tensors are on
            different devices.
    """
    if not _dense(input, v, g, bias):
        _reject(input=input, v=v, g=g, bias=bias)
    bias_shape = None if bias is None else bias.shape
    dim, eps, shape = _check_linear(input.shape, v.shape, g.shape, bias_shape, dim, eps)
    if g.ndim != len(shape):
        g = g.view(shape)

    if torch._C._is_any_autocast_enabled():
        input = _autocast(input)
    backend = plan.choose_backend(input)
    if _composite(backend):
        return reference.linear(input, v, g, bias, dim, eps)
    if torch.is_grad_enabled() and (
        input.requires_grad
        or v.requires_grad
        or g.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return autograd.Linear.apply(input, v, g, bias, dim, eps, backend)
    return ops.linear(input, v, g, bias, dim, eps, backend, False)[0]

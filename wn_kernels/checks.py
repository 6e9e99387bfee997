"""What the public functions accept. Everything is checked before anything is computed.

These run in every call, so what depends on shapes and options alone is memoised.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import plan
from .backends import native
from .backends.shapes import Geometry, canonical_dim, canonical_eps, kept_shape
from .costs import Call

_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def check_module(name: str, module: Any) -> None:
    """Raises a `TypeError` where an argument is no module."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")


def are_dense(x: Tensor, v: Tensor, g: Tensor, bias: Tensor | None) -> bool:
    """Whether all are dense, real floating-point tensors on one device.

    Written out because it runs in every call; `reject` names what a failure was.
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


def reject(**tensors: Tensor | None) -> NoReturn:
    """Raises the error that names why `are_dense` is false for these arguments."""
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


def _is_eager() -> bool:
    """Whether sizes are numbers, which the planner can rank paths by: nobody traces the call."""
    return not is_compiling() and torch._C._get_tracing_state() is None


_memos: list[Callable[[], None]] = []


def remembers(forget: Callable[[], None]) -> None:
    """Tells of somebody else who remembers how calls are planned, and how to have it forgotten."""
    _memos.append(forget)


def _memoised(check: Callable[..., Any]) -> Callable[..., Any]:
    """Remembers the answers of a check that depends on shapes and options alone."""
    cached = functools.lru_cache(maxsize=4096, typed=True)(check)

    @functools.wraps(check)
    def call(*args: Any) -> Any:
        if is_compiling():
            return check(*args)
        if torch._C._get_tracing_state() is not None:
            with warnings.catch_warnings():  # what is checked need not be in the trace
                warnings.simplefilter("ignore", torch.jit.TracerWarning)
                return check(*args)
        try:
            return cached(*args)
        except TypeError:  # an argument that cannot be hashed, or the check's own error
            return check(*args)

    _memos.append(cached.cache_clear)
    return call


def forget() -> None:
    """Has every call planned anew."""
    for clear in _memos:
        clear()


@_memoised
def check_weight(
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


class LinearCall(NamedTuple):
    """What a linear layer's call is made with: as `ConvolutionCall`."""

    dim: int | None
    eps: float
    path: plan.AtenLinear | None
    g_shape: tuple[int, ...]


@_memoised
def check_linear(
    x_shape: torch.Size,
    v_shape: torch.Size,
    g_shape: torch.Size,
    bias_shape: torch.Size | None,
    dim: int | None,
    eps: float,
    x_dtype: torch.dtype,
    v_dtype: torch.dtype,
    backend: str = "aten",
) -> LinearCall:
    """Everything that a linear layer's call needs and that shapes, dtypes and options decide."""
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
    dim, eps, shape = check_weight(v_shape, g_shape, dim, eps)
    path = None
    if _is_eager():
        path = plan.choose(Call(x_shape, v_shape, x_dtype, v_dtype, dim), backend)
    return LinearCall(dim, eps, path, shape)


def _per_axis(name: str, value: Any, rank: int, least: int) -> tuple[int, ...]:
    """`value` as one number for each of `rank` spatial dimensions, none smaller than `least`."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise TypeError(f"{name} must be an int or a sequence of ints, got {value!r}")
    if len(values) not in (1, rank):
        raise ValueError(f"{name} needs 1 or {rank} values, got {value!r}")
    if min(values) < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return values * rank if len(values) == 1 else values


class ConvolutionCall(NamedTuple):
    """What a convolution's call is made with; see `check_convolution`.

    Attributes:
        conv, dim, eps: in canonical form.
        path: the variants of the ATen path, or of the native library; `None` where the call is
            traced or compiled, which the planner must not be.
        g_shape: the shape that `g` has to be viewed in.
        end: what has to be added to the end of each spatial dimension beforehand, in
            `torch.nn.functional.pad`'s order, or `None`.
        reshape: whether `g` or the input need any of that, or a batch dimension.
    """

    conv: Geometry
    dim: int | None
    eps: float
    path: plan.AtenConvolution | None
    g_shape: tuple[int, ...]
    end: list[int] | None
    reshape: bool


@_memoised
def check_convolution(
    x_shape: torch.Size,
    v_shape: torch.Size,
    g_shape: torch.Size,
    bias_shape: torch.Size | None,
    rank: int,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    dim: int | None,
    eps: float,
    x_dtype: torch.dtype,
    v_dtype: torch.dtype,
    backend: str = "aten",
) -> ConvolutionCall:
    """Everything that a convolution's call needs and that shapes, dtypes and options decide."""
    if len(v_shape) != rank + 2:
        order = "in_channels, out" if transposed else "out_channels, in"
        raise ValueError(
            f"v must be {rank + 2}-d, ({order}_channels / groups, *kernel_size), got shape "
            f"{tuple(v_shape)}"
        )
    if len(x_shape) not in (rank + 1, rank + 2):
        raise ValueError(
            f"input must be {rank + 1}-d (unbatched) or {rank + 2}-d (batched), got shape "
            f"{tuple(x_shape)}"
        )
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups must be an int, got {groups!r}")
    if groups < 1 or v_shape[0] % groups:
        raise ValueError(f"groups={groups} does not divide {v_shape[0]}, v's first dimension")
    channels = v_shape[0] if transposed else v_shape[1] * groups
    sizes, taps = x_shape[-rank:], v_shape[2:]
    if x_shape[-rank - 1] != channels:
        raise ValueError(
            f"input of shape {tuple(x_shape)} does not fit v of shape {tuple(v_shape)} with "
            f"groups={groups}: it needs {channels} channels, at dimension {-rank - 1}"
        )
    if min(v_shape[0], *taps) < 1:
        raise ValueError(f"v has no elements to convolve with: shape {tuple(v_shape)}")
    stride = _per_axis("stride", stride, rank, 1)
    dilation = _per_axis("dilation", dilation, rank, 1)
    output_padding = _per_axis("output_padding", output_padding, rank, 0)
    reach = [d * (t - 1) for d, t in zip(dilation, taps, strict=True)]
    extra = [0] * rank
    if padding == "same" and not transposed:
        if stride != (1,) * rank:
            raise ValueError(f"padding='same' needs a stride of 1, got stride={stride}")
        extra = [r % 2 for r in reach]
        padding = tuple(r // 2 for r in reach)
    elif padding == "valid" and not transposed:
        padding = (0,) * rank
    elif isinstance(padding, str):
        expected = "numbers" if transposed else "numbers, 'same' or 'valid'"
        raise ValueError(f"padding must be {expected}, got {padding!r}")
    else:
        padding = _per_axis("padding", padding, rank, 0)
    for value, s, d in zip(output_padding, stride, dilation, strict=True):
        if value >= max(s, d):
            raise ValueError(
                f"output_padding={output_padding} must be smaller than the stride {stride} or the "
                f"dilation {dilation}"
            )
    conv = Geometry(stride, padding, dilation, transposed, output_padding, groups)
    outputs = conv.output_sizes([n + e for n, e in zip(sizes, extra, strict=True)], taps)
    if min(sizes) < 1 or min(outputs) < 1:
        raise ValueError(
            f"input of shape {tuple(x_shape)} with v of shape {tuple(v_shape)}, stride={stride}, "
            f"padding={padding} and dilation={dilation} leaves an output of sizes {outputs}"
        )
    if bias_shape is not None and bias_shape != (conv.out_channels(v_shape),):
        raise ValueError(
            f"bias has shape {tuple(bias_shape)}, but v of shape {tuple(v_shape)} with "
            f"groups={groups} needs bias of shape ({conv.out_channels(v_shape)},)"
        )
    end = [n for e in reversed(extra) for n in (0, e)] if any(extra) else None
    dim, eps, shape = check_weight(v_shape, g_shape, dim, eps)
    batch = x_shape[: -rank - 1] or (1,)
    padded = torch.Size((*batch, channels, *(n + e for n, e in zip(sizes, extra, strict=True))))
    path = None
    # The native library pads no input.
    serves = backend != "native" or (end is None and native.knows(dim, len(v_shape)))
    if serves and _is_eager():
        path = plan.choose(Call(padded, v_shape, x_dtype, v_dtype, dim, conv), backend)
    reshape = g_shape != shape or end is not None or len(x_shape) == rank + 1
    return ConvolutionCall(conv, dim, eps, path, shape, end, reshape)

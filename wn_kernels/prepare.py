"""This file checks a call and plans it once, from its shapes, dtypes and options.

Every call gets its plan from `prepare`, which memoises it for every backend. The native library
keeps its own plans in a table, which it fills through `plan_native`.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import plan
from .backends import native
from .call import (
    Call,
    Geometry,
    Member,
    Norm,
    Operands,
    canonical_dim,
    canonical_eps,
    canonical_norm,
    is_integer,
    kept_shape,
    takes_tf32,
)
from .plan import Plan

DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))

# --- tensors -------------------------------------------------------------------------------------


def check_module(name: str, module: Any) -> None:
    """Raises a `TypeError` if an argument is not a module."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")


def are_dense(x: Tensor, v: Tensor, g: Tensor, bias: Tensor | None) -> bool:
    """Returns whether all are dense, real floating-point tensors on one device.

    It is written out because it runs in every call. `reject` names the fault if it returns false.
    """
    try:
        return (
            x.dtype in DTYPES
            and v.dtype in DTYPES
            and g.dtype in DTYPES
            and x.layout is v.layout is g.layout is torch.strided
            and x.device == v.device == g.device
            and not (x.is_nested or v.is_nested or g.is_nested)
            and (
                bias is None
                or (
                    bias.dtype in DTYPES
                    and bias.layout is torch.strided
                    and bias.device == v.device
                    and not bias.is_nested
                )
            )
        )
    except AttributeError:
        return False


def reject(**tensors: Tensor | None) -> NoReturn:
    """Raises an error that names why `are_dense` is false for these arguments."""
    given = {name: t for name, t in tensors.items() if t is not None or name != "bias"}
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if t.layout is not torch.strided or t.is_nested:
            kind = "a nested tensor" if t.is_nested else f"layout {t.layout}"
            raise TypeError(f"{name} must be a dense (strided) tensor, got {kind}")
        if t.dtype not in DTYPES:
            raise TypeError(
                f"{name} has dtype {t.dtype}; expected float16, bfloat16, float32 or float64"
            )
    devices = ", ".join(f"{name} on {t.device}" for name, t in given.items() if t is not None)
    raise ValueError(f"all tensors must be on one device, got {devices}")


# --- shapes and options --------------------------------------------------------------------------


class Prepared(NamedTuple):
    """Holds a checked and planned call.

    Attributes:
        call: the description of the call, for the backends.
        plan: how the call is computed. It has no variants under a compiler or a tracer, whose sizes
            may be symbols, or if the native library does not serve the call.
        g_shape: the shape that `g` has to be viewed in.
        pad: the padding at the end of each spatial dimension that the input needs beforehand, in
            `torch.nn.functional.pad`'s order, or `None`.
        batched: whether the input has a batch dimension.
        fits: whether the tensors can be used as they are.
    """

    call: Call
    plan: Plan
    g_shape: tuple[int, ...]
    pad: list[int] | None = None
    batched: bool = True
    fits: bool = True


def check_weight(
    v_shape: torch.Size, g_shape: torch.Size, dim: int | None, eps: float, norm: Norm
) -> tuple[int | None, float, Norm, tuple[int, ...]]:
    """Returns `dim`, `eps` and `norm` in canonical form, and the shape that `g` has to be viewed
    in."""
    dim = canonical_dim(dim, len(v_shape))
    shape = kept_shape(v_shape, dim)
    length = math.prod(shape)
    if g_shape != shape and g_shape != (length,):
        expected = " or ".join(dict.fromkeys((str(shape), f"({length},)")))
        raise ValueError(
            f"g has shape {tuple(g_shape)}, but v of shape {tuple(v_shape)} with dim={dim} needs "
            f"g of shape {expected}"
        )
    return dim, canonical_eps(eps), canonical_norm(norm), shape


def _check_linear(x_shape: torch.Size, v_shape: torch.Size, bias_shape: torch.Size | None) -> None:
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


def _per_axis(name: str, value: Any, rank: int, least: int) -> tuple[int, ...]:
    """Returns `value` as one number for each of `rank` spatial dimensions. None may be smaller than
    `least`."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    if not all(map(is_integer, values)):
        raise TypeError(f"{name} must be an int or a sequence of ints, got {value!r}")
    if len(values) not in (1, rank):
        expected = "1 value" if rank == 1 else f"1 or {rank} values"
        raise ValueError(f"{name} needs {expected}, got {value!r}")
    if min(values) < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    numbers = tuple(int(v) for v in values)
    return numbers * rank if len(numbers) == 1 else numbers


def _check_convolution(
    x_shape: torch.Size,
    v_shape: torch.Size,
    bias_shape: torch.Size | None,
    rank: int,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> tuple[Geometry, torch.Size, list[int] | None]:
    """Returns the geometry, the padded input's shape `(B, C, *sizes)`, and that padding."""
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
    if not is_integer(groups):
        raise TypeError(f"groups must be an int, got {groups!r}")
    groups = int(groups)
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
    batch = x_shape[: -rank - 1] or (1,)
    padded = torch.Size((*batch, channels, *(n + e for n, e in zip(sizes, extra, strict=True))))
    end = [n for e in reversed(extra) for n in (0, e)] if any(extra) else None
    return conv, padded, end


# --- the one memo --------------------------------------------------------------------------------


def _prepare(
    x_shape: torch.Size | None,
    v_shape: torch.Size,
    g_shape: torch.Size,
    bias_shape: torch.Size | None,
    x_dtype: torch.dtype,
    v_dtype: torch.dtype,
    rank: int,
    geometry: tuple[Any, ...],
    dim: int | None,
    eps: float,
    norm: Norm,
    backend: str,
    channels_last: bool = False,
    tf32: bool = False,
    device: torch.device | None = None,
) -> Prepared:
    conv, pad, batched = None, None, True
    if x_shape is None:
        x_shape = _NONE
    elif rank == 0:
        _check_linear(x_shape, v_shape, bias_shape)
    else:
        batched = len(x_shape) == rank + 2
        conv, x_shape, pad = _check_convolution(x_shape, v_shape, bias_shape, rank, *geometry)
    dim, eps, norm, shape = check_weight(v_shape, g_shape, dim, eps, norm)
    fits = g_shape == shape and pad is None and batched
    if _has_symbols():
        call = Call(_NONE, _NONE, x_dtype, v_dtype, dim, conv, eps=eps, norm=norm)
        return Prepared(call, Plan(backend, "", ""), shape, pad, batched, fits)
    options = conv, channels_last, tf32, eps, device, norm
    call = Call(x_shape, v_shape, x_dtype, v_dtype, dim, *options)
    chosen = Plan(backend, "", "")
    # The native library pads nothing, and accepts a flat `g` only if slices are rows.
    if backend != "native" or (
        pad is None and batched and (g_shape == shape or dim == 0) and native.serves(call)
    ):
        if _watched is not None and x_shape and backend != "reference":
            _watched.append((call, backend))
        chosen = planned(call, backend)
    return Prepared(call, chosen, shape, pad, batched, fits)


_NONE = torch.Size(())
_memoised = functools.lru_cache(maxsize=4096, typed=True)(_prepare)


def _has_symbols() -> bool:
    """Returns whether sizes may be symbols. A call with symbols cannot be planned."""
    return is_compiling() or torch._C._get_tracing_state() is not None


def prepare(
    rank: int,
    tensors: Operands,
    geometry: tuple[Any, ...],
    dim: int | None,
    eps: float,
    norm: Norm,
    backend: str,
    dtype: torch.dtype | None = None,
) -> Prepared:
    """Checks and plans a call.

    Args:
        rank: the number of spatial dimensions of a convolution; 0 for a linear layer and for the
            weight alone, whose `x` is `None`.
        tensors: the operands, for which `are_dense` is true.
        geometry: the arguments of `torch.convolution` after the bias, for a convolution.
        dim, eps, norm: the user's values.
        backend: the backend that the call is planned for.
        dtype: the dtype of `W` for the weight alone, by default that of `v`.

    Raises:
        TypeError, ValueError: shapes or options do not fit. The message names which.
    """
    x, v, g, bias = tensors
    v_dtype = v.dtype
    if x is None:
        x_shape, x_dtype = None, dtype or v_dtype
    else:
        x_shape, x_dtype = x.shape, x.dtype
    key: tuple = (
        x_shape,
        v.shape,
        g.shape,
        None if bias is None else bias.shape,
        x_dtype,
        v_dtype,
        rank,
        geometry,
        dim,
        eps,
        norm,
        backend,
    )
    if backend == "triton":
        last = rank > 0 and x is not None and x.stride(1) == 1
        tf32 = takes_tf32(x_dtype, "conv" if rank else "matmul")
        key = (*key, last, tf32, v.device if v.is_cuda else None)
    if is_compiling():
        return _prepare(*key)
    if torch._C._get_tracing_state() is not None:
        with warnings.catch_warnings():  # the checks need not be part of the trace
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            return _prepare(*key)
    try:
        return _memoised(*key)
    except TypeError:  # an argument cannot be hashed, or a check failed
        return _prepare(*key)


_checked_weight = functools.lru_cache(maxsize=4096, typed=True)(check_weight)


def prepare_member(
    first: Tensor, v: Tensor, g: Tensor, dim: int | None, eps: float, dtype: Any, norm: Norm
) -> tuple[Member, tuple[int, ...]]:
    """Checks one weight of a group, whose first `v` is `first`. Returns its options, and the shape
    that `g` has to be viewed in.

    Raises:
        TypeError, ValueError: as `weight_norm`.
    """
    if not are_dense(v, v, g, None):
        reject(v=v, g=g)
    if v.device != first.device:
        raise ValueError(f"v is on {v.device}, but the first one is on {first.device}")
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype is {dtype!r}; expected float16, bfloat16, float32, float64 or None")
    check = check_weight if _has_symbols() else _checked_weight
    try:
        found = check(v.shape, g.shape, dim, eps, norm)
    except TypeError:  # an argument cannot be hashed, or a check failed
        found = check_weight(v.shape, g.shape, dim, eps, norm)
    return Member(found[0], found[1], dtype or v.dtype, found[2]), found[3]


def plan_native(
    rank: int,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    geometry: tuple[Any, ...],
    dim: int | None,
    eps: float,
    channels_last: bool,
    norm: Norm,
) -> tuple | None:
    """Returns the native library's plan of a layer's call, in the form that the library reads, or
    `None` if it does not serve the call. The library calls this once for each combination of shapes
    and options.

    Raises:
        TypeError, ValueError: as `prepare`.
    """
    x, v, g, bias = tensors
    shapes = x.shape, v.shape, g.shape, None if bias is None else bias.shape
    dtypes = x.dtype, v.dtype
    found = _prepare(*shapes, *dtypes, rank, geometry, dim, eps, norm, "native", channels_last)
    if not found.plan.forward:
        return None
    is_own = found.call.conv is None and plan.costs.is_own(found.call)
    return native.encoded(found.call, found.plan, is_own)


# --- looking and tuning --------------------------------------------------------------------------

_watched: list[tuple[Call, str]] | None = None
_fixed: dict[tuple[Call, str], Plan] = {}


# This counts how often plans were forgotten. It tells whoever keeps what follows from a plan that
# the plan is out of date.
epoch = 0


def forget() -> None:
    """Clears all memoised plans, so that every call is planned again."""
    global epoch
    epoch += 1
    _memoised.cache_clear()
    plan.sequences.forget()
    native.forget()


@contextmanager
def watching() -> Iterator[list[tuple[Call, str]]]:
    """Collects the layers' calls that are planned inside the block, with their backends."""
    global _watched
    before, _watched = _watched, []
    forget()
    try:
        yield _watched
    finally:
        _watched = before


def planned(call: Call, backend: str) -> Plan:
    """Returns the plan that a call gets: a fixed one, or the planner's."""
    return _fixed.get((call, backend)) or plan.choose(call, backend)


@contextmanager
def fixed(call: Call, chosen: Plan) -> Iterator[None]:
    """Makes a call use this plan inside the block."""
    _fixed[call, chosen.backend] = chosen
    forget()
    try:
        yield
    finally:
        del _fixed[call, chosen.backend]
        forget()

"""This file describes a call for every part of the engine.

`Call` holds the shapes, dtypes, layout and options that decide how a layer is computed. The other
definitions give the meaning of `dim`, `eps` and `norm`, the shapes that follow from them, the
geometry of a convolution, the dtypes of norms and products, and what records a call's operations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_exporting

# --- dim and eps -------------------------------------------------------------------------------


def canonical_dim(dim: int | None, ndim: int) -> int | None:
    """Returns the kept dimension as an index in `[0, ndim)`, or `None` for one norm over the whole
    tensor.

    As in `torch._weight_norm`, `-1` also means the whole tensor, and `-2`, `-3`, ... count from the
    end.

    Raises:
        TypeError: `dim` is neither an `int` nor `None`.
        ValueError: `dim` is out of range for a tensor of `ndim` dimensions.
    """
    if dim is None or dim == -1:
        return None
    if not is_integer(dim):
        raise TypeError(f"dim must be an int or None, got {dim!r}")
    if not -ndim <= dim < ndim:
        raise ValueError(
            f"dim={dim} is out of range for a weight of {ndim} dimensions: expected None, -1 "
            f"(both: one norm over the whole tensor) or a value in [{-ndim}, {ndim - 1}]"
        )
    return int(dim) % ndim


def is_integer(value: Any) -> bool:
    """Returns whether a value is an integer of Python or of NumPy, as which `torch.nn` takes both.
    A boolean is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def kept_shape(shape: Sequence[int], dim: int | None) -> tuple[int, ...]:
    """Returns the shape of `g` and of the norms. It is that of `V` with every dimension but `dim`
    set to 1, and `()` for the whole tensor."""
    if dim is None:
        return ()
    return tuple(size if i == dim else 1 for i, size in enumerate(shape))


def reduced_dims(ndim: int, dim: int | None) -> list[int]:
    """Returns the dimensions that the norm sums over."""
    return [i for i in range(ndim) if i != dim]


def canonical_eps(eps: float) -> float:
    """Returns `eps` as a float.

    Raises:
        TypeError: `eps` is not a number.
        ValueError: `eps` is negative, infinite or NaN, or larger than a float32 can be.
    """
    try:
        if isinstance(eps, (str, bytes)):
            raise TypeError
        value = float(eps)
    except (TypeError, ValueError):
        raise TypeError(f"eps must be a number, got {eps!r}") from None
    except OverflowError:
        value = math.inf
    if not 0.0 <= value < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {value}")
    if value > _LARGEST_EPS:
        raise ValueError(f"eps must be at most {_LARGEST_EPS:.1e}, got {value}")
    return value


_LARGEST_EPS = torch.finfo(torch.float32).max


# --- norms -------------------------------------------------------------------------------------

# The norm of a slice is the root of the sum of its squares, the sum of its magnitudes, or the
# largest magnitude (Hoffer et al. 2018, "Norm matters: efficient and accurate normalization schemes
# in deep networks").
Norm = Literal["l2", "l1", "linf"]
NORMS: tuple[Norm, ...] = get_args(Norm)


def canonical_norm(norm: str) -> Norm:
    """Returns the name of a norm.

    Raises:
        ValueError: `norm` is not one of `NORMS`.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {list(NORMS)}, got {norm!r}")
    return norm


class Slices(Protocol):
    """States how the slices of a weight are normalised, as a `Call` and a `Member` do."""

    @property
    def dim(self) -> int | None: ...

    @property
    def eps(self) -> float: ...

    @property
    def norm(self) -> Norm: ...


# --- a convolution -----------------------------------------------------------------------------


class Geometry(NamedTuple):
    """Holds the arguments of `torch.convolution` after `bias`, in its order.

    The weight is `(out, in / groups, *taps)`. That of a transposed convolution is
    `(in, out / groups, *taps)`. Every tuple has one number for each spatial dimension.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def packed(self) -> list[int]:
        """Returns all fields in one list of numbers, for an operator's schema."""
        lists = (self.stride, self.padding, self.dilation, self.output_padding)
        return [int(self.transposed), self.groups, *(n for numbers in lists for n in numbers)]

    @classmethod
    def unpacked(cls, numbers: Sequence[int]) -> Geometry:
        """Returns the geometry that `packed` turned into `numbers`."""
        transposed, groups, *rest = numbers
        rank = len(rest) // 4
        stride, padding, dilation, extra = (
            tuple(rest[i * rank : (i + 1) * rank]) for i in range(4)
        )
        return cls(stride, padding, dilation, bool(transposed), extra, groups)

    def out_channels(self, v_shape: Sequence[int]) -> int:
        return v_shape[1] * self.groups if self.transposed else v_shape[0]

    def output_sizes(self, x_sizes: Sequence[int], taps: Sequence[int]) -> list[int]:
        """Returns the spatial sizes of the output. `torch.nn.Conv3d` and `ConvTranspose3d` document
        the formula."""
        reach = [d * (t - 1) for d, t in zip(self.dilation, taps, strict=True)]
        axes = zip(x_sizes, reach, self.stride, self.padding, self.output_padding, strict=True)
        if self.transposed:
            return [(x - 1) * s - 2 * p + r + extra + 1 for x, r, s, p, extra in axes]
        return [(x + 2 * p - r - 1) // s + 1 for x, r, s, p, _ in axes]

    def scale_axis(self, dim: int | None) -> str:
        """Returns what the scale along `dim` of the weight multiplies. It is `"output"` or
        `"input"` for whole channels of that side, `"taps"` for positions of the kernel, or
        `"whole"` for everything."""
        if dim is None:
            return "whole"
        if dim > 1:
            return "taps"
        return "output" if (dim == 1) == self.transposed else "input"

    def owns_slices(self, dim: int | None) -> bool:
        """Returns whether each pixel of an output channel depends on all of a slice.

        In a transposed convolution with a stride, a pixel depends on some of the taps only.
        """
        if self.transposed:
            return dim == 1 and self.groups == 1 and set(self.stride) == {1}
        return dim == 0

    def has_small_groups(self, v_shape: Sequence[int]) -> bool:
        """Returns whether the groups have too few channels for a tile of a matrix product, whose
        sides are 16 at least. Depthwise convolutions have such groups."""
        return self.groups > 1 and max(v_shape[0] // self.groups, v_shape[1]) < 16

    def per_channel(self, s: Tensor, dim: int | None, ndim: int) -> Tensor:
        """Returns the scale, given in the kept shape, in a shape that broadcasts over the channels
        of an input or an output of `ndim` dimensions.

        Along the weight's second dimension, all groups have the same scales.
        """
        if dim is None:
            return s
        s = s.view(-1)
        return (s.repeat(self.groups) if dim == 1 else s).view(-1, *[1] * (ndim - 2))


# --- dtypes --------------------------------------------------------------------------------------


def scale_dtype(v: Tensor) -> torch.dtype:
    """Returns the dtype of norms and scales, which is float64 for a float64 `V` and else
    float32."""
    return torch.float64 if v.dtype == torch.float64 else torch.float32


def product_dtype(input: Tensor) -> torch.dtype:
    """Returns the dtype of a product with `input`. Under autocast it is autocast's, as for a linear
    layer, but float64 stays as it is."""
    if torch._C._is_any_autocast_enabled() and input.dtype != torch.float64:
        device_type = input.device.type
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
    return input.dtype


# Norms in this range may be squared, and divided by one another's squares, without leaving the
# range of the dtype that they are kept in.
NORM_RANGE = {torch.float32: (1e-10, 1e10), torch.float64: (1e-80, 1e80)}


def narrows_range(x_dtype: torch.dtype, v_dtype: torch.dtype) -> bool:
    """Returns whether unscaled elements of `V` may leave the range of the product's dtype. They may
    in a float16 product of a wider `V`. Such a `V` has to be scaled before it is cast."""
    return x_dtype == torch.float16 and v_dtype != torch.float16


def fits_unscaled(x_dtype: torch.dtype, v_dtype: torch.dtype) -> bool:
    """Returns whether a product of `x` with `V` itself stays in its dtype's range, to be scaled
    afterwards. Both have to be of that dtype, and float16 has too small a range."""
    return x_dtype == v_dtype != torch.float16


# This function reads the settings `fp32_precision` of torch 2.9 and later. A setting inherits from
# the more general one, and includes what the old settings have set. The old functions raise an
# error if a new setting is in use.
_fp32_precision = getattr(torch._C, "_get_fp32_precision_getter", None)


def takes_tf32(dtype: torch.dtype, op: str = "matmul") -> bool:
    """Returns whether PyTorch is set to compute products of this dtype in TF32 on a GPU. The op
    `"matmul"` means products of cuBLAS, and `"conv"` means those of cuDNN."""
    if dtype != torch.float32:
        return False
    if _fp32_precision is not None:
        return _fp32_precision("cuda", op) == "tf32"
    if op == "conv":
        return torch.backends.cudnn.allow_tf32
    return torch.get_float32_matmul_precision() != "highest"


# --- the call ------------------------------------------------------------------------------------


class Operands(NamedTuple):
    """Holds the tensors of a call. `x` is `None` for the weight alone, and `g` has the kept
    shape."""

    x: Tensor | None
    v: Tensor
    g: Tensor
    bias: Tensor | None


def rows_of(x: Tensor) -> Tensor:
    """Returns an `x` of shape `(*, K)` as `(M, K)`."""
    # A batch of gradients has no `flatten`.
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


# The order is `x`, `V`, `g` and the bias.
Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Needs = tuple[bool, bool, bool, bool]


class Call(NamedTuple):
    """Describes a call. It is planned and computed by this description.

    Attributes:
        x_shape: `(*, K)` for a linear layer, `(B, C, *sizes)` for a convolution, `()` for the
            weight alone.
        v_shape: the shape of `V`.
        x_dtype: the dtype of the product, or of `W` for the weight alone.
        v_dtype: the dtype of `V`.
        dim: the kept dimension, as `canonical_dim` returns it.
        conv: the geometry of a convolution.
        channels_last: whether `x` or `V` of a convolution is channels-last in memory.
        tf32: whether the product is computed in TF32.
        eps: the smallest norm.
        device: the GPU that the tensors are on, for the Triton path; `None` is the current one.
        norm: the norm of a slice.
    """

    x_shape: torch.Size
    v_shape: torch.Size
    x_dtype: torch.dtype
    v_dtype: torch.dtype
    dim: int | None
    conv: Geometry | None = None
    channels_last: bool = False
    tf32: bool = False
    eps: float = 0.0
    device: torch.device | None = None
    norm: Norm = "l2"

    def of_weight(self) -> Call:
        """Returns the call that forms the `W` of this one alone."""
        return self._replace(x_shape=torch.Size(()), conv=None)


class Member(NamedTuple):
    """Holds the options of one weight of a group.

    Attributes:
        dim, eps: as in `Call`.
        dtype: the dtype of `W`.
        norm: the norm of a slice.
    """

    dim: int | None
    eps: float
    dtype: torch.dtype
    norm: Norm = "l2"


# These tensor classes have torch's own operators.
PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))

# `torch.func`, forward-mode AD, tracing and dispatch modes have no public query. These private ones
# are stable across the supported releases.
_are_transforms_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_count_modes = torch._C._len_torch_dispatch_stack


def recorder(v: Tensor) -> Literal["", "compiler", "mode", "composite"]:
    """Returns what records the operations of a call with the weight `v`.

    ""           nothing does; the tensors can be read, and kernels launched on them
    "compiler"   `torch.compile` does
    "mode"       a dispatch mode does, such as that of fake tensors or a counter of operations
    "composite"  a `torch.func` transform, forward-mode AD, an export, a trace, or a tensor class
                 with operators of its own (such as `DTensor`) does; these need differentiable
                 operations
    """
    if (
        _are_transforms_active()
        or forward_ad._current_level >= 0
        or is_exporting()
        or _tracing_state() is not None
    ):
        return "composite"
    if is_compiling():
        return "compiler"
    if type(v) not in PLAIN_TYPES:
        return "composite"
    return "mode" if _count_modes() else ""


def are_modes_active() -> bool:
    """Returns whether forward-mode AD or a dispatch mode is active, which `guard` cannot see."""
    return forward_ad._current_level >= 0 or _count_modes() > 0


# This is what compiled code of torch recognises tensors by. It does not check its arguments, so it
# is used in the releases in which it was tried alone.
_Guards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)
if not (2, 11) <= tuple(map(int, torch.__version__.split(".")[:2])) <= (2, 13):
    _Guards = None


def guard(*tensors: Tensor) -> Callable[..., bool]:
    """Returns a function that takes as many arguments, and returns whether they are tensors like
    these: of the same classes, dtypes, devices, shapes, strides and `requires_grad`, under the same
    transforms, traces and autocast. It takes 0.2 µs."""
    if _Guards is not None:
        return _Guards(
            *tensors,
            dynamic_dims_sizes=[[*t.shape] for t in tensors],
            dynamic_dims_strides=[[*t.stride()] for t in tensors],
        ).check
    autocast = torch._C._is_any_autocast_enabled()
    return functools.partial(_are_like, autocast, [_layout(t) for t in tensors])


def _are_like(autocast: bool, layouts: list[tuple[Any, ...]], *tensors: Tensor) -> bool:
    return (
        not any(map(recorder, tensors))
        and torch._C._is_any_autocast_enabled() == autocast
        and [_layout(t) for t in tensors] == layouts
    )


def _layout(t: Tensor) -> tuple[Any, ...]:
    return type(t), t.dtype, t.device, t.shape, t.stride(), t.requires_grad


_MOST, _MOST_OF_A_KEY = 4096, 32


def keep(memo: dict[Any, list[Any]], key: Any, known: Any) -> None:
    """Adds what is known of a call to that of other calls with this key. The memo does not grow
    without end."""
    if len(memo) >= _MOST:
        memo.clear()
    of_key = memo.setdefault(key, [])
    if len(of_key) >= _MOST_OF_A_KEY:
        of_key.clear()
    of_key.append(known)
